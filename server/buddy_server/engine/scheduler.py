"""Decides what each step computes: continuous batching, chunked prefill, preemption. Knows no torch."""

from collections import deque
from collections.abc import Iterator

from buddy_server.engine.block_pool import BlockPool
from buddy_server.engine.messages import GenerationRequest
from buddy_server.engine.sequence import Sequence, Work


class Scheduler:
    """Decode and prefill share one token budget a step; who came first is served first.

    `route_block` is the unit of prefill: chunks end where paths may change, so chunking changes no result.
    """

    def __init__(self, pool: BlockPool, max_sequences: int, max_step_tokens: int, route_block: int) -> None:
        if max_step_tokens < max_sequences + route_block:
            raise ValueError(
                f"max_step_tokens {max_step_tokens} is too small: allowed is at least max_sequences "
                f"{max_sequences} + route_block {route_block}, so that prefill goes on beside a full batch"
            )
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._num_preemptions = 0
        self._max_step_tokens = max_step_tokens
        self._route_block = route_block
        self._free_lanes = list(reversed(range(max_sequences)))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request. It must fit the cache on its own, which admission has seen to."""
        num_tokens = len(request.prompt_tokens) + request.sampling.max_tokens
        assert self.pool.blocks_for(num_tokens) <= self.pool.num_blocks, f"{num_tokens} tokens can never fit"
        sequence = Sequence(request, list(request.prompt_tokens))
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> list[Work]:
        """The segments of the next step: decode first, then prefill, both in order of arrival."""
        works: list[Work] = []
        num_tokens = 0
        decoding = [s for s in self.running if s.num_computed == len(s.tokens) - 1]
        for sequence in decoding:
            # One preempted for the sake of an earlier one has lost its lane.
            if sequence.lane >= 0 and self._make_room(sequence, len(sequence.tokens)):
                works.append(Work(sequence, sequence.num_computed, 1))
                num_tokens += 1
        for sequence in self._prefilling(skip=decoding):
            chunk = list(self._chunk(sequence, self._max_step_tokens - num_tokens))
            if not chunk:
                break
            works += chunk
            num_tokens += sum(work.length for work in chunk)
        return works

    def finish(self, sequence: Sequence) -> None:
        """Take everything back from a sequence, wherever it stands."""
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def take_preemptions(self) -> int:
        """How many sequences were preempted since the last call."""
        count, self._num_preemptions = self._num_preemptions, 0
        return count

    def check_idle(self) -> None:
        """The integrity check between steps: nothing but running sequences holds blocks."""
        self.pool.check([sequence.block_table for sequence in self.running])

    def _prefilling(self, skip: list[Sequence]) -> Iterator[Sequence]:
        """Running sequences with a prompt to compute, then newly admitted ones, as long as the caller asks."""
        yield from [s for s in self.running if s not in skip]
        while self.waiting and self._free_lanes:
            first = self.waiting[0]
            # All its blocks at once: two half-prefilled prompts could otherwise wait for each other's for ever.
            if not self.pool.grow(first.block_table, len(first.tokens)):
                return
            self.waiting.popleft()
            first.lane = self._free_lanes.pop()
            self.running.append(first)
            yield first

    def _chunk(self, sequence: Sequence, budget: int) -> Iterator[Work]:
        start = sequence.num_computed
        while start < len(sequence.tokens):
            length = sequence.next_segment(self._route_block, start)
            if length > budget:
                return
            yield Work(sequence, start, length)
            start += length
            budget -= length

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for a decode step, taken from the latest arrivals if need be; False if it was its own turn."""
        while not self.pool.grow(sequence.block_table, num_tokens):
            latest = self.running[-1]
            self._preempt(latest)
            if latest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        self.running.remove(sequence)
        self._free_lanes.append(sequence.lane)
        sequence.lane = -1
