"""Runs decode rows by captured graphs, several steps at once, and all else as TorchStepper does.

A call's steps are launched without a look at their results: tokens are fed back, paths chosen and ended rows left out
on the device (buddy_kernels.gpu). The host may launch the next call before it collects this one.
"""

# N rows of the graphs, n rows of a call, S segments, W wanted rows, K steps, C columns of a path, V vocabulary

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Self, TypeVar

import torch
from torch import Tensor

from buddy_kernels import PathAction, RoutedOutput, SampledToken, StepRows, Wanted
from buddy_kernels.gpu.decode_graphs import DecodeGraphs
from buddy_kernels.gpu.decode_step import DecodeModel
from buddy_kernels.gpu.logit_adjustment import LogitAdjustments
from buddy_kernels.gpu.row_linear import MAX_ROWS
from buddy_kernels.gpu.row_state import MAX_END_TOKENS, MAX_STEPS, NO_TOKEN, RowState
from buddy_kernels.sampling import with_logprobs
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.kv_cache import KVCache
from buddy_routing.planner import PathPlanner
from buddy_routing.router import FIXED, NEVER
from buddy_routing.stepper import LaunchNext, TorchStepper, decoder_weights, router_weights

T = TypeVar("T")


class UnsupportedByGpuError(ValueError):
    """A model or router that the graphs do not run; the message says why."""


class GpuStepper:
    """Raises UnsupportedByGpuError. On a CPU the graphs' kernels run in Triton's interpreter."""

    arithmetic = "triton"

    def __init__(self, model: RoutedDecoder, cache: KVCache, planner: PathPlanner) -> None:
        router = router_weights(planner)
        if router is None:
            raise UnsupportedByGpuError(f"a router of type {type(planner.router).__name__} is asked on the host")
        device = cache.k.device
        self.planner = planner
        self.multi_step = planner.router.reroute_every in (1, FIXED, NEVER)
        self._rest = TorchStepper(model, cache, planner)
        spec, num_rows = model.spec, min(MAX_ROWS, len(planner.last_paths))
        width = -(-spec.max_context // cache.block_size)
        self._state = RowState.empty(num_rows, width, spec.num_columns, device)
        self._adjustments = LogitAdjustments(
            presence=torch.zeros(num_rows, dtype=torch.float64, device=device),
            frequency=torch.zeros(num_rows, dtype=torch.float64, device=device),
            counts=torch.zeros(num_rows, spec.vocab_size, dtype=torch.int32, device=device),
            bias=torch.zeros(num_rows, spec.vocab_size, device=device),
            allowed=torch.zeros(num_rows, -(-spec.vocab_size // 8), dtype=torch.uint8, device=device),
        )
        weights = decoder_weights(model)
        costs, forced = (tensor.to(device) for tensor in (router.costs, router.forced))
        router = replace(router, costs=costs, forced=forced, prior=router.prior.to(device))
        of_steps = DecodeModel.of(weights, router, cache.k, cache.v, width * cache.block_size)
        self._graphs = DecodeGraphs(of_steps, self._state, self._adjustments)
        self._step_s, self._collected_s = float("inf"), 0.0

    def step(self, rows: StepRows) -> RoutedOutput:
        return self.launch(rows).collect()

    @torch.inference_mode()
    def launch(self, rows: StepRows) -> "Call":
        """Launch a step, or several of rows that all decode. Prompts among them are computed before this returns."""
        decoding = decoding_segments(rows)
        if len(decoding) > self._state.live.num_rows:
            decoding = []
        others = [segment for segment in range(len(rows.lanes)) if segment not in set(decoding)]
        decoded = rows_of_segments(rows, decoding)
        with_host = any(map(draws_with_host, decoded.wanted))
        # All steps repeat the rows' path actions.
        repeats = self.planner.router.reroute_every == 1 or set(decoded.path_actions) <= {PathAction.KEEP}
        is_single = with_host or bool(others) or not (self.multi_step and repeats)
        call = Call(self, rows, decoding, 1 if is_single else self._num_steps(rows), goes_on=not is_single)
        if decoding:
            self._bring(decoded, call.num_steps)
            if with_host:
                self._bring_adjustments(decoded.wanted)
            self._run(call, adjusts=with_host)
        if others:
            call.rest = self._rest.step(rows_of_segments(rows, others))
        return call

    @torch.inference_mode()
    def launch_after(
        self, call: "Call", tables: Sequence[Sequence[int]], uniforms: Sequence[Sequence[float]]
    ) -> "Call":
        """As LaunchNext."""
        after = Call(self, call.rows, call.decoding, call.num_steps, goes_on=True)
        self._bring_tables(tables)
        numbers = self._sent(columns(uniforms, call.num_steps), torch.float64)
        self._state.uniforms[: call.num_steps, : len(call.decoding)].copy_(numbers)
        self._run(after, adjusts=False)
        return after

    def logits(self, num_rows: int) -> Tensor:
        """[n, V] of the last step with so many rows, on the device."""
        return self._graphs.logits(num_rows)

    def _run(self, call: "Call", adjusts: bool) -> None:
        state, num_steps, num_rows = self._state, call.num_steps, len(call.decoding)
        state.step.zero_()
        state.made.fill_(NO_TOKEN)
        state.ran_paths.zero_()
        for _ in range(num_steps):
            self._graphs.run(num_rows, adjusts)
        made, ran_paths = state.made[:num_steps, :num_rows], state.ran_paths[:num_steps, :num_rows]
        call.fetched = Fetched.of(made, ran_paths, self.planner.features.sums[state.lanes[:num_rows]])

    def _num_steps(self, rows: StepRows) -> int:
        """As many as fit into the call's time, by the last call's; the first one is a single step."""
        return max(1, min(rows.most_steps, MAX_STEPS, int(rows.most_s / self._step_s)))

    def still_fits(self, call: "Call") -> bool:
        """Whether a call like this one takes about the time that it should, by what steps take now."""
        return call.num_steps / 2 < self._num_steps(call.rows) < 2 * call.num_steps

    def collected(self, call: "Call", num_steps: int) -> None:
        """Measure the `num_steps` of a call of decodes that has just ended: since its launch or, if later, the end of
        the one before."""
        now_s = time.perf_counter()
        if call.rest is None and num_steps:
            self._step_s = (now_s - max(call.launched_s, self._collected_s)) / num_steps
        self._collected_s = now_s

    def _bring(self, rows: StepRows, num_steps: int) -> None:
        """The rows' state, as a call begins with it."""
        state, num_rows, wanted = self._state, len(rows.lanes), rows.wanted
        sampling = [row.sampling for row in wanted]
        ints = [
            rows.tokens,
            rows.positions,
            rows.lanes,
            rows.max_costs,
            rows.aligned,
            [row.max_tokens if row.tokens_left is None else row.tokens_left for row in wanted],
            [how.top_k for how in sampling],
        ]
        reals = [
            [how.temperature for how in sampling],
            [how.top_p for how in sampling],
            [how.min_p for how in sampling],
            *columns([row.uniforms for row in wanted], num_steps),
        ]
        ends = [[*row.end_tokens, *[NO_TOKEN] * MAX_END_TOKENS][:MAX_END_TOKENS] for row in wanted]
        state.ints[:, :num_rows].copy_(self._sent(ints, torch.int64))
        state.reals[: len(reals), :num_rows].copy_(self._sent(reals, torch.float64))
        state.end_tokens[:num_rows].copy_(self._sent(ends, torch.int64))
        state.path_actions[:num_rows].copy_(self._sent(rows.path_actions, torch.uint8))
        state.live.indices[:num_rows].copy_(torch.arange(num_rows, dtype=torch.int32, device=state.step.device))
        state.live.count.fill_(num_rows)
        self._bring_tables(rows.tables)

    def _bring_tables(self, tables: Sequence[Sequence[int]]) -> None:
        widest = max(map(len, tables))
        padded = [[*table, *[0] * (widest - len(table))] for table in tables]
        self._state.block_tables[: len(tables), :widest].copy_(self._sent(padded, torch.int32))

    def _bring_adjustments(self, wanted: Sequence[Wanted]) -> None:
        """Penalties, bias and masks of rows that may have some."""
        made = self._adjustments
        assert made.allowed is not None
        num_rows, vocab_size = len(wanted), made.counts.shape[1]
        penalties = [[row.sampling.presence_penalty, row.sampling.frequency_penalty] for row in wanted]
        presence, frequency = self._sent(penalties, torch.float64).unbind(1)
        made.presence[:num_rows].copy_(presence)
        made.frequency[:num_rows].copy_(frequency)
        for table, values in (
            (made.counts, [row.counts if row.sampling.has_penalties else {} for row in wanted]),
            (made.bias, [row.sampling.bias for row in wanted]),
        ):
            flat = [index * vocab_size + token for index, of_row in enumerate(values) for token in of_row]
            entries = [value for of_row in values for value in of_row.values()]
            table[:num_rows].zero_()
            table.view(-1)[self._sent(flat, torch.int64)] = self._sent(entries, table.dtype)
        masks = torch.full((num_rows, made.allowed.shape[1]), 0xFF, dtype=torch.uint8)
        for mask, row in zip(masks, wanted, strict=True):
            if row.constraint is not None:
                mask.copy_(torch.frombuffer(row.constraint.allowed(), dtype=torch.uint8)[: len(mask)])
        made.allowed[:num_rows].copy_(self._sent(masks, torch.uint8))

    def _sent(self, values: object, dtype: torch.dtype) -> Tensor:
        """On the device, without waiting for it."""
        made = torch.as_tensor(values, dtype=dtype)
        device = self._state.step.device
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


class Call:
    """A StepCall on the device."""

    def __init__(
        self, stepper: GpuStepper, rows: StepRows, decoding: Sequence[int], num_steps: int, goes_on: bool
    ) -> None:
        self.rows, self.decoding, self.num_steps = rows, decoding, num_steps
        self.fetched: Fetched | None = None
        self.rest: RoutedOutput | None = None
        self.launched_s = time.perf_counter()
        self._stepper, self._goes_on = stepper, goes_on

    @property
    def launch_next(self) -> LaunchNext | None:
        if not (self._goes_on and self._stepper.still_fits(self)):
            return None
        return partial(self._stepper.launch_after, self)

    @torch.inference_mode()
    def collect(self) -> RoutedOutput:
        """Wait for the steps, and tell constraints of their tokens. `router_s` is 0: nobody sees it."""
        rows, place_of = self.rows, {segment: place for place, segment in enumerate(self.decoding)}
        made: list[list[int]] = []
        num_steps = 1
        if self.fetched is not None:
            self.fetched.wait()
            made = [[token for token in of_row if token != NO_TOKEN] for of_row in self.fetched.made.T.tolist()]
            num_steps = max(map(len, made))
            self._stepper.collected(self, num_steps)
            num_steps = max(1, num_steps)
        segment_of = segments_of_rows(rows)
        of_rest = iter(() if self.rest is None else self.rest.tokens)
        tokens: list[Sequence[SampledToken]] = []
        for wanted in rows.wanted:
            place = place_of.get(segment_of[wanted.row])
            tokens.append(next(of_rest) if place is None else self._sampled(wanted, place, made[place]))
        features, planner = self._stepper.planner.features, self._stepper.planner
        paths = torch.zeros(num_steps, len(rows.lanes), planner.last_paths.shape[1], dtype=torch.int8)
        sums = torch.empty(len(rows.lanes), features.sums.shape[1], dtype=torch.float64)
        if self.fetched is not None:
            paths[:, self.decoding], sums[self.decoding] = self.fetched.ran_paths[:num_steps], self.fetched.sums
        logits = torch.empty(0)
        if self.rest is not None:
            others = [segment for segment in range(len(rows.lanes)) if segment not in place_of]
            paths[:, others], sums[others], logits = self.rest.paths, self.rest.sums.cpu(), self.rest.logits
        return RoutedOutput(tokens, paths, sums, logits, 0.0)

    def _sampled(self, wanted: Wanted, place: int, made: Sequence[int]) -> list[SampledToken]:
        if wanted.constraint is not None:
            for token in made:
                wanted.constraint.accept(token)
        if wanted.num_likeliest is None:
            return [SampledToken(token) for token in made]
        logits = self._stepper.logits(len(self.decoding))[place].float().cpu()
        return [with_logprobs(logits, token, wanted.num_likeliest) for token in made]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a call's steps did, on its way to the host: `made` [K, n] and `ran_paths` [K, n, C] as in RowState, and the
    router's `sums` [n, F] after the last step."""

    made: Tensor
    ran_paths: Tensor
    sums: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, made: Tensor, ran_paths: Tensor, sums: Tensor) -> Self:
        tensors = (made, ran_paths, sums)
        hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=made.is_cuda) for tensor in tensors]
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        if not made.is_cuda:
            return cls(hosts[0], hosts[1], hosts[2])
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(hosts[0], hosts[1], hosts[2], arrived)

    def wait(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()


def decoding_segments(rows: StepRows) -> list[int]:
    """Segments of one row, the only one of its sequence, that make a token and have a path of their own."""
    of_lane, of_row = Counter(rows.lanes), Counter(wanted.row for wanted in rows.wanted)
    draws = {wanted.row for wanted in rows.wanted if wanted.given is None}
    return [
        segment
        for segment, start in enumerate(accumulate(rows.lengths[:-1], initial=0))
        if rows.lengths[segment] == 1
        and of_lane[rows.lanes[segment]] == 1
        and start in draws
        and of_row[start] == 1
        and rows.path_actions[segment] != PathAction.CONTINUE
    ]


def rows_of_segments(rows: StepRows, segments: Sequence[int]) -> StepRows:
    """The rows of these segments alone; those that are aligned are all among them or none is."""
    starts, ahead_starts = list(accumulate(rows.lengths, initial=0)), list(accumulate(rows.aheads, initial=0))
    spans = [range(starts[segment], starts[segment + 1]) for segment in segments]
    num_rows = len(rows.positions)
    aheads = [range(num_rows + ahead_starts[segment], num_rows + ahead_starts[segment + 1]) for segment in segments]
    place_of_row = {row: place for place, row in enumerate(row for span in spans for row in span)}
    place_of = {segment: place for place, segment in enumerate(segments)}

    def of_segments(values: Sequence[T]) -> list[T]:
        return [values[segment] for segment in segments]

    return StepRows(
        tokens=[rows.tokens[row] for span in (*spans, *aheads) for row in span],
        positions=[rows.positions[row] for row in place_of_row],
        lengths=of_segments(rows.lengths),
        tables=of_segments(rows.tables),
        lanes=of_segments(rows.lanes),
        max_costs=of_segments(rows.max_costs),
        path_actions=of_segments(rows.path_actions),
        wanted=[replace(wanted, row=place_of_row[wanted.row]) for wanted in rows.wanted if wanted.row in place_of_row],
        aheads=of_segments(rows.aheads),
        aligned=[place_of[rows.aligned[segment]] for segment in segments],
    )


def segments_of_rows(rows: StepRows) -> list[int]:
    """[N], the segment of each row."""
    return [segment for segment, length in enumerate(rows.lengths) for _ in range(length)]


def draws_with_host(wanted: Wanted) -> bool:
    """Whether the row's next token needs something of the host first, so that its steps are launched one by one."""
    return (
        wanted.constraint is not None
        or wanted.num_likeliest is not None
        or wanted.sampling.has_penalties
        or bool(wanted.sampling.bias)
        or len(wanted.end_tokens) > MAX_END_TOKENS
    )


def columns(values: Sequence[Sequence[float]], num_steps: int) -> list[list[float]]:
    """The rows' uniforms by step; 0 for what a row does not need."""
    return [[of_row[step] if step < len(of_row) else 0.0 for of_row in values] for step in range(num_steps)]
