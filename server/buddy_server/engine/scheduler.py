"""Decides what each step computes and records its results: continuous batching, chunked prefill, preemption.

Does not import torch.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from buddy_routing.action_space import ActionSpace
from buddy_server.engine.batch import Batch, BatchResult, Work, WorkResult
from buddy_server.engine.block_pool import BlockPool
from buddy_server.engine.messages import DepthCount, Event, StepStats, Usage
from buddy_server.engine.pace import BURST_S, Pace
from buddy_server.engine.prefix_keys import PrefixKeys
from buddy_server.engine.sequence import Sequence
from buddy_server.engine.waiting_queue import FirstComeFirstServed, WaitingQueue

MOST_STEPS = 64
"""Most steps of one call: as many as the smallest models run in a burst (pace.py)."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Events by request id, in order; usage so far of the step's unfinished requests; the step's statistics."""

    events: list[tuple[str, Event]]
    usages: list[tuple[str, Usage]]
    stats: StepStats


class Scheduler:
    """Decode and prefill share one token budget per step. Beside decodes, prefill gets only as many tokens as keep
    their pace (pace.py). The `waiting` queue decides who is next.

    `route_block` is the unit of routing in a prompt: each route block runs one path, at once or in pieces, so chunking
    changes no result. With `prefix_keys`, full route blocks stay in the pool while there is room, and prompts that
    begin with them reuse them. With `multi_step`, one call of the runner can run several steps.
    """

    def __init__(
        self,
        pool: BlockPool,
        actions: ActionSpace,
        max_sequences: int,
        max_step_tokens: int,
        route_block: int,
        prefix_keys: PrefixKeys | None = None,
        multi_step: bool = True,
        waiting: WaitingQueue | None = None,
    ) -> None:
        if max_step_tokens < max_sequences + route_block:
            raise ValueError(
                f"max_step_tokens {max_step_tokens} is too small: allowed is at least max_sequences "
                f"{max_sequences} + route_block {route_block}, so that prefill continues beside a full batch"
            )
        if prefix_keys is not None and route_block % pool.block_size:
            raise ValueError(
                f"route_block {route_block} cannot be cached: allowed are multiples of block_size {pool.block_size}"
            )
        self.pool = pool
        self.waiting: WaitingQueue = FirstComeFirstServed() if waiting is None else waiting
        self.running: list[Sequence] = []
        self.pace = Pace()
        self.route_block = route_block
        self._actions = actions
        self._num_preemptions = 0
        self._max_step_tokens = max_step_tokens
        self._prefix_keys = prefix_keys
        self._multi_step = multi_step
        self._free_lanes = list(reversed(range(max_sequences)))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It must fit the cache on its own, as admission ensures. Then it can always finish, because
        blocks without holders can be allocated whatever they contain."""
        num_tokens = sequence.num_prompt + sequence.request.sampling.max_tokens
        assert self.pool.blocks_for(num_tokens) <= self.pool.num_blocks, f"{num_tokens} tokens can never fit"
        if self._prefix_keys:
            sequence.prefix_keys = self._prefix_keys.of(sequence.request, sequence.max_cost(0))
        self.waiting.push(sequence)

    def schedule(self) -> Batch:
        """The next step's segments: decodes first, then prefill, both in order of arrival. If only decodes run and no
        prompt can join them, the batch may take several steps."""
        works = [
            self._work(sequence, sequence.num_computed, 1)
            for sequence in [s for s in self.running if s.is_decoding]
            # A sequence preempted in favour of an earlier one has lost its lane.
            if sequence.lane >= 0 and self._make_room(sequence, len(sequence.tokens))
        ]
        most = self._max_step_tokens - len(works)
        num_left = self.pace.prefill_rows(most, self._multi_step) if works else most
        in_pieces = num_left < most
        for sequence in self._prefilling():
            chunk = list(self._chunk(sequence, num_left, in_pieces))
            if not chunk:
                break
            works += chunk
            num_left -= sum(work.length for work in chunk)
        if self._multi_step and all(work.is_decode for work in works):
            return Batch(works, self._reserve_steps(works), BURST_S)
        return Batch(works)

    def commit(self, batch: Batch, result: BatchResult) -> StepOutput:
        """Record what a batch produced: tokens and their cost, blocks for the prefix cache, requests that ended."""
        self.pace.observe(batch, result)
        sequences = dict.fromkeys(work.sequence for work in batch.works)
        depth: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        events: list[tuple[str, Event]] = []
        for work, made in zip(batch.works, result.works, strict=True):
            request = work.sequence.request
            events += [(request.request_id, event) for event in self._book(work, made, depth[request.tenant])]
        for sequence in sequences:
            if sequence.has_ended:
                self.finish(sequence)
            elif batch.most_steps > 1:
                # Frees blocks reserved for steps that did not run.
                self.pool.trim(sequence.block_table, len(sequence.tokens))
        for tenant, (executed, _, _) in depth.items():
            self.waiting.charge(tenant, executed)
        stats = StepStats(
            num_steps=result.num_steps,
            num_rows=sum(len(made.paths) * work.length for work, made in zip(batch.works, result.works, strict=True)),
            num_sequences=len(sequences),
            num_layers_read=result.num_layers_read,
            num_preemptions=self._take_preemptions(),
            router_s=result.router_s,
            depth={tenant: DepthCount(*counts) for tenant, counts in depth.items()},
        )
        usages = [(s.request.request_id, s.usage) for s in sequences if not s.has_ended]
        return StepOutput(events, usages, stats)

    def finish(self, sequence: Sequence) -> None:
        """Release all that a sequence holds, whether it runs or waits."""
        if sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def check_idle(self) -> None:
        """The integrity check between steps: apart from cached prefixes, only running sequences hold blocks."""
        self.pool.check([sequence.block_table for sequence in self.running])

    def _work(self, sequence: Sequence, start: int, length: int, ahead: int = 0, continues: bool = False) -> Work:
        return Work(sequence, start, length, sequence.max_cost(start), ahead, continues)

    def _reserve_steps(self, works: list[Work]) -> int:
        """How many steps in a row the decodes may take: limited by burst length, tokens remaining and free blocks.
        Reserves blocks for all of them."""
        remaining = [work.sequence.request.sampling.max_tokens - work.sequence.num_output for work in works]
        steps = min(self.pace.burst_steps(MOST_STEPS), max(remaining, default=1))
        while self._num_missing(works, remaining, steps) > self.pool.num_free:
            steps //= 2
        for work, left in zip(works, remaining, strict=True):
            self.pool.grow(work.sequence.block_table, len(work.sequence.tokens) + min(steps, left) - 1)
        return steps

    def _num_missing(self, works: list[Work], remaining: list[int], steps: int) -> int:
        """Blocks that `steps` steps need beyond the block tables; none for one step."""
        missing = 0
        for work, left in zip(works, remaining, strict=True):
            num_tokens = len(work.sequence.tokens) + min(steps, left) - 1
            missing += max(0, self.pool.blocks_for(num_tokens) - len(work.sequence.block_table))
        return missing

    def _book(self, work: Work, made: WorkResult, depth: list[int]) -> Iterator[Event]:
        """Record one work. `depth` counts executed, skipped and uncharged milli-layers."""
        sequence, whole = work.sequence, self._actions.full_cost
        sequence.scored_prompt += made.scored
        for step, path in enumerate(made.paths):
            cost = self._actions.path_costs[path]
            executed = cost * work.length
            depth[0] += executed
            depth[1] += whole * work.length - executed
            # Steps may have run past a stop string.
            charged = 0 if sequence.has_ended else sequence.charge(work.start + step, work.length, cost)
            depth[2] += executed - charged
            if not sequence.has_ended and made.tokens:
                yield from sequence.accept(made.tokens[step], path)
        if self._is_cacheable(work):
            self._cache(work, array("d", made.sums.tolist()))

    def _is_cacheable(self, work: Work) -> bool:
        """Whether the work completes a full route block whose key is known."""
        return work.end % self.route_block == 0 and work.end // self.route_block <= len(work.sequence.prefix_keys)

    def _cache(self, work: Work, sums: "array[float]") -> None:
        """Cache the route block that a cacheable work completed; `sums` are the running features after it."""
        table = work.sequence.block_table
        index = work.end // self.route_block - 1
        num_blocks = self.route_block // self.pool.block_size
        key, first = work.sequence.prefix_keys[index], index * num_blocks
        cached = self.pool.find(key)
        if cached is None:
            self.pool.cache(key, table[first : first + num_blocks], sums)
        else:
            # Another sequence was faster. Holding its blocks saves room, and keeps the chain before what this one adds.
            self.pool.share(cached, table, first)

    def _prefilling(self) -> Iterator[Sequence]:
        """Running sequences with a prompt to compute, then newly admitted ones, while the caller iterates."""
        yield from [s for s in self.running if not s.is_decoding]
        while self._free_lanes and (first := self.waiting.peek()):
            self._reuse(first)
            # Allocates all blocks at once: otherwise two half-prefilled prompts could wait for each other's blocks
            # forever.
            if not self.pool.grow(first.block_table, len(first.tokens)):
                self._empty(first)
                return
            self.waiting.pop()
            first.lane = self._free_lanes.pop()
            self.running.append(first)
            yield first

    def _reuse(self, sequence: Sequence) -> None:
        """Extend the computed tokens from the prefix cache, as far as it holds the next ones."""
        if sequence.request.sampling.prompt_logprobs is not None:
            return
        # The last prompt token is always computed, because its logits are needed.
        last = min(len(sequence.prefix_keys), (sequence.num_prompt - 1) // self.route_block)
        for index in range(sequence.num_computed // self.route_block, last):
            cached = self.pool.find(sequence.prefix_keys[index])
            if cached is None:
                return
            self.pool.share(cached, sequence.block_table, index * len(cached.blocks))
            sequence.num_computed = sequence.num_restored = (index + 1) * self.route_block
            sequence.restored_sums = cached.sums

    def _chunk(self, sequence: Sequence, budget: int, in_pieces: bool) -> Iterator[Work]:
        """The sequence's next segments, at most `budget` tokens in total."""
        # Look again: among sequences admitted together, an earlier one may have cached the shared prefix since.
        self._reuse(sequence)
        start = sequence.num_computed
        while start < len(sequence.tokens):
            whole = sequence.next_segment(self.route_block, start)
            length = min(whole, budget) if in_pieces else whole
            if length > budget or length == 0:
                return
            continues = start < sequence.num_prompt and start % self.route_block > 0
            yield self._work(sequence, start, length, 0 if continues else whole - length, continues)
            start += length
            budget -= length

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Get blocks for a decode step, preempting the latest arrivals if needed; False if `sequence` itself was
        preempted."""
        while not self.pool.grow(sequence.block_table, num_tokens):
            latest = self.running[-1]
            self._preempt(latest)
            if latest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.push(sequence)
        self._num_preemptions += 1

    def _take_preemptions(self) -> int:
        """How many sequences were preempted since the last call."""
        count, self._num_preemptions = self._num_preemptions, 0
        return count

    def _leave(self, sequence: Sequence) -> None:
        self._empty(sequence)
        self.running.remove(sequence)
        self._free_lanes.append(sequence.lane)
        sequence.lane = -1

    def _empty(self, sequence: Sequence) -> None:
        """Reset the sequence to nothing computed."""
        self.pool.release(sequence.block_table)
        sequence.num_computed = sequence.num_restored = 0
        sequence.restored_sums = None
