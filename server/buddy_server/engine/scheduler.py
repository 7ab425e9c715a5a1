"""Decides what each step computes: continuous batching, chunked prefill, preemption. Knows no torch."""

from array import array
from collections import deque
from collections.abc import Iterator

from buddy_server.engine.block_pool import BlockPool
from buddy_server.engine.messages import GenerationRequest
from buddy_server.engine.pace import Pace
from buddy_server.engine.prefix_keys import PrefixKeys
from buddy_server.engine.sequence import Sequence, Work

MOST_STEPS = 64
"""Steps that may be asked for at once: as many as the smallest models take in a burst (pace.py)."""


class Scheduler:
    """Decode and prefill share one token budget a step; who came first is served first. Beside answers, prefill gets as
    much as leaves these their pace.

    `route_block` is the unit of prefill: a block runs one path, at once or in pieces, so chunking changes no result.
    With `prefix_keys` full prefill blocks stay in the pool as long as there is room, and prompts that begin with them
    take them from there. `multi_step`: one call of the runner can be several steps.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_sequences: int,
        max_step_tokens: int,
        route_block: int,
        prefix_keys: PrefixKeys | None = None,
        multi_step: bool = True,
    ) -> None:
        if max_step_tokens < max_sequences + route_block:
            raise ValueError(
                f"max_step_tokens {max_step_tokens} is too small: allowed is at least max_sequences "
                f"{max_sequences} + route_block {route_block}, so that prefill goes on beside a full batch"
            )
        if prefix_keys is not None and route_block % pool.block_size:
            raise ValueError(
                f"route_block {route_block} cannot be cached: allowed are multiples of block_size {pool.block_size}"
            )
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.pace = Pace()
        self._num_preemptions = 0
        self._max_step_tokens = max_step_tokens
        self._route_block = route_block
        self._prefix_keys = prefix_keys
        self._multi_step = multi_step
        self._free_lanes = list(reversed(range(max_sequences)))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request. It must fit the cache on its own, which admission has seen to: then it can always finish,
        for blocks that nobody holds can be had, whatever they contain."""
        num_tokens = len(request.prompt_tokens) + request.sampling.max_tokens
        assert self.pool.blocks_for(num_tokens) <= self.pool.num_blocks, f"{num_tokens} tokens can never fit"
        keys = self._prefix_keys.of(request) if self._prefix_keys else ()
        sequence = Sequence(request, list(request.prompt_tokens), keys)
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> list[Work]:
        """The segments of the next step: decode first, then prefill, both in order of arrival."""
        works: list[Work] = []
        num_tokens = 0
        for sequence in [s for s in self.running if s.is_decoding]:
            # One preempted for the sake of an earlier one has lost its lane.
            if sequence.lane >= 0 and self._make_room(sequence, len(sequence.tokens)):
                works.append(Work(sequence, sequence.num_computed, 1))
                num_tokens += 1
        most = self._max_step_tokens - num_tokens
        num_left = self.pace.prefill_rows(most, self._go_on(works)) if works else most
        in_pieces = num_left < most
        for sequence in self._prefilling():
            chunk = list(self._chunk(sequence, num_left, in_pieces))
            if not chunk:
                break
            works += chunk
            num_left -= sum(work.length for work in chunk)
        return works

    def reserve_steps(self, works: list[Work]) -> int:
        """How many steps in a row the works may take by themselves, with blocks for all of them: as many as a burst may
        come to, as all have to come, and as there are blocks that nobody runs in."""
        if not self._go_on(works):
            return 1
        to_come = [work.sequence.request.sampling.max_tokens - work.sequence.num_output for work in works]
        steps = min([self.pace.burst_steps(MOST_STEPS), *to_come])
        while self._num_missing(works, steps) > self.pool.num_free:
            steps //= 2
        for work in works:
            self.pool.grow(work.sequence.block_table, len(work.sequence.tokens) + steps - 1)
        return steps

    def _go_on(self, works: list[Work]) -> bool:
        """Whether all are answers whose logits nobody but the step has a use for."""
        samplings = [work.sequence.request.sampling for work in works]
        return (
            self._multi_step
            and all(work.is_decode for work in works)
            and all(one.takes_logits_as_they_are and one.top_logprobs is None for one in samplings)
        )

    def _num_missing(self, works: list[Work], steps: int) -> int:
        """Blocks that so many steps need beyond those there are; none for one step."""
        ends = [(work.sequence.block_table, len(work.sequence.tokens) + steps - 1) for work in works]
        return sum(max(0, self.pool.blocks_for(end) - len(table)) for table, end in ends)

    def give_back(self, works: list[Work]) -> None:
        """Blocks that were reserved for steps which did not come about."""
        for work in works:
            self.pool.trim(work.sequence.block_table, len(work.sequence.tokens))

    def is_cacheable(self, work: Work) -> bool:
        """Whether the work completes a full prefill block, and there is a prefix cache."""
        end = work.start + work.length
        return bool(work.sequence.prefix_keys) and end % self._route_block == 0 and end <= work.sequence.num_prompt

    def cache(self, work: Work, sums: "array[float]") -> None:
        """Keep the block that a cacheable work has completed; `sums` are the running features after it."""
        table = work.sequence.block_table
        index = (work.start + work.length) // self._route_block - 1
        num_blocks = self._route_block // self.pool.block_size
        key, first = work.sequence.prefix_keys[index], index * num_blocks
        cached = self.pool.find(key)
        if cached is None:
            self.pool.cache(key, table[first : first + num_blocks], sums)
        else:
            # Someone else was quicker. To hold theirs saves room, and keeps the chain before what this one adds to it.
            self.pool.share(cached, table, first)

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
        """The integrity check between steps: nothing but running sequences holds blocks, cached ones apart."""
        self.pool.check([sequence.block_table for sequence in self.running])

    def _prefilling(self) -> Iterator[Sequence]:
        """Running sequences with a prompt to compute, then newly admitted ones, as long as the caller asks."""
        yield from [s for s in self.running if not s.is_decoding]
        while self.waiting and self._free_lanes:
            first = self.waiting[0]
            self._reuse(first)
            # All its blocks at once: two half-prefilled prompts could otherwise wait for each other's for ever.
            if not self.pool.grow(first.block_table, len(first.tokens)):
                self._empty(first)
                return
            self.waiting.popleft()
            first.lane = self._free_lanes.pop()
            self.running.append(first)
            yield first

    def _reuse(self, sequence: Sequence) -> None:
        """Take what follows on the computed tokens from the prefix cache, as far as it has it."""
        if sequence.request.sampling.prompt_logprobs is not None:
            return
        # The last token of the prompt is computed always: its logits are wanted.
        for index in range(sequence.num_computed // self._route_block, (sequence.num_prompt - 1) // self._route_block):
            cached = self.pool.find(sequence.prefix_keys[index]) if sequence.prefix_keys else None
            if cached is None:
                return
            self.pool.share(cached, sequence.block_table, index * len(cached.blocks))
            sequence.num_computed = sequence.num_restored = (index + 1) * self._route_block
            sequence.restored_sums = cached.sums

    def _chunk(self, sequence: Sequence, budget: int, in_pieces: bool) -> Iterator[Work]:
        # Again: those admitted together with others of the same prompt find what the first of them has computed since.
        self._reuse(sequence)
        start = sequence.num_computed
        while start < len(sequence.tokens):
            whole = sequence.next_segment(self._route_block, start)
            length = min(whole, budget) if in_pieces else whole
            if length > budget or length == 0:
                return
            continues = start < sequence.num_prompt and start % self._route_block > 0
            yield Work(sequence, start, length, 0 if continues else whole - length, continues)
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
        self.waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        self._empty(sequence)
        self.running.remove(sequence)
        self._free_lanes.append(sequence.lane)
        sequence.lane = -1

    def _empty(self, sequence: Sequence) -> None:
        """As if nothing of the sequence had been computed."""
        self.pool.release(sequence.block_table)
        sequence.num_computed = sequence.num_restored = 0
        sequence.restored_sums = None
