"""Runs a routed decoder the server's way without an engine: chosen segments, a paged cache, a planner."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from buddy_kernels import PathAction, RoutedOutput, RoutedStep, StepRows, Wanted, WeightKind
from buddy_kernels.arithmetics import arithmetics
from buddy_kernels.routed_step import BLOCK_SIZE as NATIVE_BLOCK_SIZE
from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.kv_cache import KVCache
from buddy_routing.planner import PathPlanner
from buddy_routing.router import Router
from buddy_routing.stepper import NativeStepper, TorchStepper, decoder_weights

NATIVE = [(kind, arithmetic) for kind in get_args(WeightKind) for arithmetic in arithmetics(kind)]
"""What the native step can compute with on this processor."""
BLOCK_SIZE = 4
NUM_THREADS = 2


class SparseDecode:
    """One sequence, or several of the same length side by side, fed segment by segment. `native` is a kind of weights
    for the native step, with an `arithmetic` or always the same one."""

    def __init__(
        self,
        model: RoutedDecoder,
        router: Router,
        tokens: Tensor,
        num_run: Sequence[float],
        native: WeightKind | None = None,
        arithmetic: str | None = None,
    ) -> None:
        self.tokens = tokens  # [B, T]
        self.num_run = tuple(num_run)
        self.block_size = NATIVE_BLOCK_SIZE if native else BLOCK_SIZE
        num_sequences, num_tokens = tokens.shape
        blocks = -(-num_tokens // self.block_size)
        # Interleaved and backwards, so that nothing works by the accident of contiguous blocks.
        order = torch.arange(num_sequences * blocks).flip(0).view(blocks, num_sequences)
        self.tables = order.T.contiguous()  # [B, blocks]
        planner = PathPlanner(router, model.spec, num_sequences, torch.device("cpu"))
        num_blocks = num_sequences * blocks
        self.stepper = (
            native_stepper(model, planner, native, num_blocks, arithmetic or arithmetics(native)[-1])
            if native
            else torch_stepper(model, planner, num_blocks)
        )
        for lane in range(num_sequences):
            planner.start(lane, int(MILLI_LAYERS * self.num_run[lane]))

    def step(
        self,
        spans: Sequence[tuple[int, int, int]],
        block_ends: Sequence[int] | None = None,
        path_actions: Sequence[int] | None = None,
        aligned: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run (sequence, start, end) segments in one step: logits [S, V] and paths [S, L]. `block_ends` says up to
        where each looks ahead, the others what StepRows says."""
        output = self.run(spans, block_ends, path_actions, aligned)
        return output.logits.clone(), output.paths[0]

    def run(
        self,
        spans: Sequence[tuple[int, int, int]],
        block_ends: Sequence[int] | None = None,
        path_actions: Sequence[int] | None = None,
        aligned: Sequence[int] | None = None,
        wanted: Sequence[dict[str, Any]] | None = None,
        most_s: float = 0.0,
    ) -> RoutedOutput:
        """All that a step gives; `wanted` are further fields of each segment's Wanted."""
        ends = block_ends or [end for _, _, end in spans]
        ahead = [(sequence, end, ahead_end) for (sequence, _, end), ahead_end in zip(spans, ends, strict=True)]
        rows = StepRows(
            tokens=[
                token
                for sequence, start, end in [*spans, *ahead]
                for token in self.tokens[sequence, start:end].tolist()
            ],
            positions=[position for _, start, end in spans for position in range(start, end)],
            lengths=[end - start for _, start, end in spans],
            tables=[self.tables[sequence].tolist() for sequence, _, _ in spans],
            lanes=[sequence for sequence, _, _ in spans],
            max_costs=[int(MILLI_LAYERS * self.num_run[sequence]) for sequence, _, _ in spans],
            path_actions=path_actions or [PathAction.CHOOSE] * len(spans),
            wanted=[
                Wanted(end - 1, **fields)
                for end, fields in zip(
                    accumulate(end - start for _, start, end in spans), wanted or [{}] * len(spans), strict=True
                )
            ],
            aheads=[end - start for _, start, end in ahead],
            aligned=aligned or range(len(spans)),
            most_s=most_s,
        )
        return self.stepper.step(rows)


def torch_stepper(model: RoutedDecoder, planner: PathPlanner, num_blocks: int) -> TorchStepper:
    dtype = model.embed_tokens.weight.dtype
    cache = KVCache.allocate(model.spec, num_blocks, BLOCK_SIZE, dtype, torch.device("cpu"))
    # Whoever reads what was not written gets no number.
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return TorchStepper(model, cache, planner)


def native_stepper(
    model: RoutedDecoder, planner: PathPlanner, kind: WeightKind, num_blocks: int, arithmetic: str
) -> NativeStepper:
    routed_step = RoutedStep(decoder_weights(model), kind, num_blocks, NUM_THREADS, arithmetic)
    routed_step.cache_k.fill_(torch.nan)
    routed_step.cache_v.fill_(torch.nan)
    return NativeStepper(routed_step, planner)


def segment_bounds(num_prompt: int, num_tokens: int, route_block: int) -> list[tuple[int, int]]:
    """The segments of a sequence: prompt blocks, then single tokens."""
    ends = [*range(route_block, num_prompt, route_block), *range(num_prompt, num_tokens + 1)]
    return list(pairwise([0, *ends]))


def grouped(bounds: Sequence[tuple[int, int]], sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Cut segments into steps of the given numbers of segments, the sizes repeating."""
    steps, at = [], 0
    for size in [*sizes] * len(bounds):
        if at < len(bounds):
            steps.append(list(bounds[at : at + size]))
            at += size
    assert list(accumulate(len(step) for step in steps))[-1] == len(bounds)
    return steps
