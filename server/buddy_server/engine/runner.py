"""Turns scheduled work into rows, runs the model, samples. Takes masks as data; never asks about tenants."""

# S works, V vocabulary, F width of one token's V, L layers

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from buddy_kernels import GREEDY, RoutedOutput, Sampling, StepRows
from buddy_kernels.routed_step import CHOOSE, CONTINUE, KEEP
from buddy_routing.stepper import Stepper
from buddy_server.engine.pace import BURST_S
from buddy_server.engine.sampler import Sampler, top_logprobs
from buddy_server.engine.sequence import SampledToken, Sequence, Work


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry a work: the layers it ran, the log probabilities of prompt tokens behind its rows if they were asked
    for, its token if it makes one, and the running features' `sums` [S, F] after the block it belongs to; those of the
    last of several steps in a row."""

    layers: list[tuple[int, ...]]
    scored: list[list[SampledToken]]
    tokens: list[SampledToken | None]
    sums: Tensor
    router_s: float

    @property
    def num_layers_read(self) -> int:
        return len(set().union(*self.layers))


class ModelRunner:
    """Drives the stepper. Samplers belong to the sequences that made them."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    @property
    def num_layers(self) -> int:
        return self.stepper.num_layers

    def run(
        self,
        works: list[Work],
        samplers: dict[Sequence, Sampler],
        most_steps: int = 1,
        end_token_ids: Collection[int] = (),
    ) -> list[StepResult]:
        """One step, or as many as `most_steps` for answers that go on by themselves; fewer when one of them comes to an
        end token, or when BURST_S are over."""
        planner = self.stepper.planner
        for work in works:
            if work.start == work.sequence.num_restored:
                planner.start(work.sequence.lane, work.sequence.restored_sums)
        output = self.stepper.step(step_rows(works, samplers, planner.router.reroute_every, most_steps, end_token_ids))
        for work in works:
            if work.makes_token and samplers[work.sequence].is_drawn_by_the_step:
                samplers[work.sequence].used(len(output.next_tokens))
        masks, num_layers = output.masks.numpy().tobytes(), self.num_layers
        layers = [layers_of(masks[start : start + num_layers]) for start in range(0, len(masks), num_layers)]
        if len(output.next_tokens) == 1:
            scored, tokens = sample(works, samplers, output)
            return [StepResult(layers, scored, tokens, output.sums, output.router_s)]
        return [
            StepResult(
                layers=layers[step * len(works) : (step + 1) * len(works)],
                scored=[[] for _ in works],
                tokens=[SampledToken(token) for token in tokens],
                sums=output.sums,
                router_s=output.router_s / len(output.next_tokens),
            )
            for step, tokens in enumerate(output.next_tokens)
        ]


@lru_cache(maxsize=1 << 16)
def layers_of(mask: bytes) -> tuple[int, ...]:
    """The layers that a mask [L] runs; the same few come again and again."""
    return tuple(index for index, action in enumerate(mask) if action)


def step_rows(
    works: list[Work],
    samplers: dict[Sequence, Sampler],
    reroute_every: int,
    most_steps: int = 1,
    end_token_ids: Collection[int] = (),
) -> StepRows:
    """Works as the stepper takes them."""
    samplings, uniforms = draws(works, samplers, most_steps)
    tokens: list[int] = []
    positions: list[int] = []
    choices: list[int] = []
    aligned: list[int] = []
    leaders: dict[tuple[str, int], int] = {}
    ahead: list[int] = []
    for index, work in enumerate(works):
        end = work.start + work.length
        ahead += work.sequence.tokens[end : end + work.ahead]
        tokens += work.sequence.tokens[work.start : end]
        positions += range(work.start, end)
        request, output = work.sequence.request, work.start - work.sequence.num_prompt
        chooses = output < 0 or (output + 1) % reroute_every == 0
        choices.append(CONTINUE if work.continues else CHOOSE if chooses else KEEP)
        # Newest tokens only: a prompt's path is its own, for the prefix cache, and what is computed again has had its.
        alone = not (request.align_paths and chooses and work.is_decode)
        aligned.append(index if alone else leaders.setdefault((request.tenant, request.num_run_layers), index))
    return StepRows(
        tokens=tokens + ahead,
        positions=positions,
        lengths=[work.length for work in works],
        tables=[work.sequence.block_table for work in works],
        lanes=[work.sequence.lane for work in works],
        budgets=[work.sequence.request.num_run_layers for work in works],
        choices=choices,
        wanted=wanted_rows(works),
        aheads=[work.ahead for work in works],
        aligned=aligned,
        samplings=samplings,
        uniforms=uniforms,
        most_steps=most_steps,
        most_s=BURST_S,
        end_tokens=[
            *end_token_ids,
            *(token for work in works for token in work.sequence.request.sampling.stop_token_ids),
        ],
    )


def wanted_rows(works: list[Work]) -> list[int]:
    """Rows of the step whose logits are needed: a work's scored rows, then the last if it makes a token."""
    rows: list[int] = []
    start = 0
    for work in works:
        rows += (start + position - work.start for position in work.scored)
        start += work.length
        if work.makes_token:
            rows.append(start - 1)
    return rows


def draws(
    works: list[Work], samplers: dict[Sequence, Sampler], most_steps: int
) -> tuple[list[Sampling], list[list[float]]]:
    """How the wanted rows' next tokens are drawn, and by what numbers; nothing where all are the likeliest."""
    samplings: list[Sampling] = []
    uniforms: list[list[float]] = []
    if any(samplers[work.sequence].is_drawn_by_the_step for work in works):
        for work in works:
            sampler = samplers[work.sequence]
            is_drawn = [False for _ in work.scored] + [sampler.is_drawn_by_the_step] * work.makes_token
            samplings += [sampler.sampling if drawn else GREEDY for drawn in is_drawn]
            uniforms += [sampler.uniforms(most_steps) if drawn else [0.0] * most_steps for drawn in is_drawn]
    return samplings, uniforms


def sample(
    works: list[Work], samplers: dict[Sequence, Sampler], output: RoutedOutput
) -> tuple[list[list[SampledToken]], list[SampledToken | None]]:
    """From the logits of the wanted rows in their order: every work's scored prompt tokens, and its token."""
    rows = iter(zip(output.logits, output.next_tokens[0], strict=True))
    scored: list[list[SampledToken]] = []
    tokens: list[SampledToken | None] = []
    for work in works:
        scored.append([_scored(work.sequence, position, next(rows)[0]) for position in work.scored])
        tokens.append(_sampled(samplers[work.sequence], *next(rows)) if work.makes_token else None)
    return scored, tokens


def _scored(sequence: Sequence, position: int, logits: Tensor) -> SampledToken:
    token = sequence.tokens[position + 1]
    logprob, top = top_logprobs(logits, token, sequence.request.sampling.prompt_logprobs or 0)
    return SampledToken(token, logprob, tuple(top))


def _sampled(sampler: Sampler, logits: Tensor, next_token: int) -> SampledToken:
    params = sampler.params
    token = next_token if params.takes_logits_as_they_are else sampler.sample(logits)
    count = params.top_logprobs
    if count is None:
        return SampledToken(token)
    logprob, top = top_logprobs(logits, token, count)
    return SampledToken(token, logprob, tuple(top))
