"""Turns scheduled work into tensors, runs the model, samples. Takes masks as data; never asks about tenants."""

# S works, W wanted rows, V vocabulary, F width of one token's V

from dataclasses import dataclass

import torch
from torch import Tensor

from buddy_routing.segments import SegmentBatch
from buddy_routing.stepper import Stepper
from buddy_server.engine.sampler import Sampler, top_logprobs
from buddy_server.engine.sequence import SampledToken, Sequence, Work


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry a work: the layers it ran, the log probabilities of prompt tokens behind its rows if they were asked
    for, its token if it makes one, and the running features' `sums` [S, F] after it."""

    layers: list[tuple[int, ...]]
    scored: list[list[SampledToken]]
    tokens: list[SampledToken | None]
    sums: Tensor
    num_layers_read: int
    router_s: float


class ModelRunner:
    """Drives the stepper. Samplers belong to the sequences that made them."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    @property
    def num_layers(self) -> int:
        return self.stepper.num_layers

    @torch.inference_mode()
    def run(self, works: list[Work], samplers: dict[Sequence, Sampler]) -> StepResult:
        for work in works:
            if work.start == work.sequence.num_restored:
                self.stepper.planner.start(work.sequence.lane, work.sequence.restored_sums)
        output = self.stepper.step(self._batch(works))
        layers = [tuple(index for index, action in enumerate(row) if action) for row in output.masks.tolist()]
        scored, tokens = sample(works, samplers, output.logits)
        return StepResult(
            layers=layers,
            scored=scored,
            tokens=tokens,
            sums=output.sums,
            num_layers_read=len(set().union(*layers)),
            router_s=output.router_s,
        )

    def _batch(self, works: list[Work]) -> SegmentBatch:
        tokens: list[int] = []
        positions: list[int] = []
        for work in works:
            span = range(work.start, work.start + work.length)
            tokens += work.sequence.tokens[work.start : work.start + work.length]
            positions += span
        widest = max(len(work.sequence.block_table) for work in works)
        tables = [[*w.sequence.block_table, *[0] * (widest - len(w.sequence.block_table))] for w in works]
        every = self.stepper.planner.router.reroute_every
        num_outputs = (work.start - work.sequence.num_prompt for work in works)
        device = self.stepper.device
        return SegmentBatch(
            tokens=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            lengths=torch.tensor([work.length for work in works], device=device),
            block_tables=torch.tensor(tables, device=device),
            lanes=tuple(work.sequence.lane for work in works),
            wanted_rows=wanted_rows(works),
            budgets=tuple(work.sequence.request.num_run_layers for work in works),
            reroutes=tuple(output < 0 or (output + 1) % every == 0 for output in num_outputs),
        )


def wanted_rows(works: list[Work]) -> tuple[int, ...]:
    """Rows of the step whose logits are needed: a work's scored rows, then the last if it makes a token."""
    rows: list[int] = []
    start = 0
    for work in works:
        rows += range(start, start + work.num_scored)
        start += work.length
        if work.makes_token:
            rows.append(start - 1)
    return tuple(rows)


def sample(
    works: list[Work], samplers: dict[Sequence, Sampler], logits: Tensor
) -> tuple[list[list[SampledToken]], list[SampledToken | None]]:
    """From logits [W, V] fp32 of the wanted rows in their order: every work's scored prompt tokens, and its token."""
    rows = iter(zip(logits, logits.argmax(-1).tolist(), strict=True))
    scored: list[list[SampledToken]] = []
    tokens: list[SampledToken | None] = []
    for work in works:
        scored.append([_scored(work, index, next(rows)[0]) for index in range(work.num_scored)])
        tokens.append(_sampled(samplers[work.sequence], *next(rows)) if work.makes_token else None)
    return scored, tokens


def _scored(work: Work, index: int, logits: Tensor) -> SampledToken:
    token = work.sequence.tokens[work.start + index + 1]
    logprob, top = top_logprobs(logits, token, work.sequence.request.sampling.prompt_logprobs or 0)
    return SampledToken(token, logprob, tuple(top))


def _sampled(sampler: Sampler, logits: Tensor, likeliest: int) -> SampledToken:
    token = likeliest if sampler.is_plain_greedy else sampler.sample(logits)
    count = sampler.params.top_logprobs
    if count is None:
        return SampledToken(token)
    logprob, top = top_logprobs(logits, token, count)
    return SampledToken(token, logprob, tuple(top))
