"""Turns a batch into rows, runs the model, and sorts its output by work. Never asks about tenants' policies."""

# S works, W wanted rows, C columns of a path

import time
from dataclasses import dataclass

from buddy_kernels import GREEDY, PathAction, RoutedOutput, SampledToken, Sampling, StepRows, Wanted
from buddy_routing.action_space import SKIP
from buddy_routing.router import FIXED
from buddy_routing.stepper import StepCall, Stepper
from buddy_server.engine.batch import Batch, BatchResult, Work, WorkResult
from buddy_server.engine.messages import SamplingParams


class ModelRunner:
    """Drives the stepper."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self._collected_s = 0.0

    def launch(self, batch: Batch) -> "RunningBatch":
        """Begin one step, or up to the batch's `most_steps`."""
        started_s = time.perf_counter()
        planner = self.stepper.planner
        for work in batch.works:
            if work.start == work.sequence.num_restored:
                planner.start(work.sequence.lane, work.max_cost, work.sequence.restored_sums)
        asked = [WorkTokens(len(work.scored), work.makes_token) for work in batch.works]
        call = self.stepper.launch(step_rows(batch, planner.router.reroute_every))
        return RunningBatch(batch, call, asked, started_s)

    def launch_after(self, running: "RunningBatch", following: Batch) -> "RunningBatch":
        """Begin the batch that follows one whose call goes on, collected or not."""
        started_s, num_steps = time.perf_counter(), running.call.num_steps
        tables = [work.sequence.block_table for work in following.works]
        uniforms = [work.sequence.sampler.uniforms(2 * num_steps)[num_steps:] for work in following.works]
        assert running.call.launch_next is not None
        return RunningBatch(following, running.call.launch_next(tables, uniforms), running.asked, started_s)

    def collect(self, running: "RunningBatch") -> BatchResult:
        """Wait for the batch."""
        output = running.call.collect()
        collected_s, before_s = time.perf_counter(), max(running.started_s, self._collected_s)
        self._collected_s = collected_s
        runs = output.paths != SKIP  # [steps, S, C]
        return BatchResult(
            works=work_results(running.asked, output),
            num_steps=len(output.paths),
            num_layers_read=int(runs.any(1).sum()),
            router_s=output.router_s,
            seconds=collected_s - before_s,
        )


@dataclass(frozen=True, slots=True)
class WorkTokens:
    """How many prompt tokens a work scores, and whether it makes tokens, as it was when it was launched."""

    num_scored: int
    makes_token: bool


@dataclass(frozen=True, slots=True)
class RunningBatch:
    """A batch under way. `asked` has an entry for each work; `started_s` is by the clock."""

    batch: Batch
    call: StepCall
    asked: list[WorkTokens]
    started_s: float


def work_results(asked: list[WorkTokens], output: RoutedOutput) -> list[WorkResult]:
    """What each work ran and made. In the output, a work's scored prompt tokens precede its own."""
    _, num_works, num_columns = output.paths.shape
    paths = output.paths.numpy().tobytes()
    made = iter(output.tokens)
    results = []
    for index, work in enumerate(asked):
        scored = [next(made)[0] for _ in range(work.num_scored)]
        tokens: list[SampledToken] = list(next(made)) if work.makes_token else []
        starts = range(index * num_columns, len(paths), num_works * num_columns)
        # A work that ended before the last of several steps ran no path in the later ones.
        own = [paths[start : start + num_columns] for start in starts[: len(tokens) if work.makes_token else 1]]
        results.append(WorkResult(own, tokens, scored, output.sums[index]))
    return results


def step_rows(batch: Batch, reroute_every: int) -> StepRows:
    """A batch in the stepper's format."""
    tokens: list[int] = []
    positions: list[int] = []
    path_actions: list[PathAction] = []
    aligned: list[int] = []
    leaders: dict[tuple[str, int], int] = {}
    ahead: list[int] = []
    wanted: list[Wanted] = []
    for index, work in enumerate(batch.works):
        sequence, request = work.sequence, work.sequence.request
        # All steps of a call repeat one path action, so a work that chooses out of turn runs one step.
        most_steps = 1 if work.begins_depth and reroute_every != 1 else batch.most_steps
        wanted += wanted_rows(work, len(tokens), most_steps)
        ahead += sequence.tokens[work.end : work.end + work.ahead]
        tokens += sequence.tokens[work.start : work.end]
        positions += range(work.start, work.end)
        path_action = path_action_of(work, reroute_every)
        path_actions.append(path_action)
        # Newest tokens only: a prompt keeps its own path, for the prefix cache, and recomputed tokens already have
        # theirs. A newest one behind recomputed ones is computed with them.
        shares = request.align_paths and sequence.is_decoding and path_action == PathAction.CHOOSE
        aligned.append(leaders.setdefault((request.tenant, work.max_cost), index) if shares else index)
    return StepRows(
        tokens=tokens + ahead,
        positions=positions,
        lengths=[work.length for work in batch.works],
        tables=[work.sequence.block_table for work in batch.works],
        lanes=[work.sequence.lane for work in batch.works],
        max_costs=[work.max_cost for work in batch.works],
        path_actions=path_actions,
        wanted=wanted,
        aheads=[work.ahead for work in batch.works],
        aligned=aligned,
        most_s=batch.most_s,
    )


def path_action_of(work: Work, reroute_every: int) -> PathAction:
    if work.continues:
        return PathAction.CONTINUE
    if reroute_every == FIXED:
        return PathAction.KEEP
    num_output = work.start - work.sequence.num_prompt
    chooses = num_output < 0 or (num_output + 1) % reroute_every == 0 or work.begins_depth
    return PathAction.CHOOSE if chooses else PathAction.KEEP


def wanted_rows(work: Work, first_row: int, most_steps: int) -> list[Wanted]:
    """The rows of a work whose logits are needed: those whose next token is scored, then the last if it makes one."""
    sequence, params = work.sequence, work.sequence.request.sampling
    rows = [
        Wanted(first_row + place - work.start, given=sequence.tokens[place + 1], num_likeliest=params.prompt_logprobs)
        for place in work.scored
    ]
    if work.makes_token:
        tokens_left = params.max_tokens - sequence.num_output
        max_tokens = min(most_steps, tokens_left)
        rows.append(
            Wanted(
                row=first_row + work.length - 1,
                sampling=sampling_of(params),
                uniforms=sequence.sampler.uniforms(max_tokens),
                counts=sequence.sampler.counts,
                constraint=sequence.constraint,
                num_likeliest=params.top_logprobs,
                max_tokens=max_tokens,
                tokens_left=tokens_left,
                end_tokens=sequence.end_token_ids,
            )
        )
    return rows


def sampling_of(params: SamplingParams) -> Sampling:
    """Sampling in the step's format; `GREEDY` itself for the usual case, which the step recognises."""
    if params.temperature == 0 and not (params.presence_penalty or params.frequency_penalty or params.logit_bias):
        return GREEDY
    return Sampling(
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.logit_bias,
    )
