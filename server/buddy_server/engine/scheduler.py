"""Decides what each step computes and records its results: continuous batching, chunked prefill, preemption.

Does not import torch.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from buddy_routing.action_space import ActionSpace
from buddy_server.engine.batch import Batch, BatchResult, Work, WorkResult
from buddy_server.engine.block_pool import BlockPool
from buddy_server.engine.fair_share import FairShare
from buddy_server.engine.messages import DepthCount, Event, StartEvent, StepStats, Usage
from buddy_server.engine.pace import BURST_S, Pace
from buddy_server.engine.prefix_keys import PrefixKeys
from buddy_server.engine.sequence import Sequence

MOST_STEPS = 64
"""The maximum number of steps in one batch, even if a burst's time limit (pace.py) would allow more."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a batch produced: (request id, event) pairs in order, the usage so far of its unfinished requests, and
    statistics."""

    events: list[tuple[str, Event]]
    usages: list[tuple[str, Usage]]
    stats: StepStats


class Scheduler:
    """Decode and prefill share one token budget per step. While others decode, prefill gets only as many tokens as do
    not slow them down too much (pace.py). Fair sharing (fair_share.py) decides whose turn it is, and who gives way.

    `route_block` is the number of prompt tokens that share one path. A route block keeps its path when it is computed
    in pieces, so chunking does not change results. With `prefix_keys`, full route blocks stay cached while there is
    room, and prompts with the same prefix reuse them; those that come together wait for the first to compute them. With
    `multi_step`, one runner call can run several steps.
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
    ) -> None:
        if max_step_tokens < max_sequences + route_block:
            raise ValueError(
                f"max_step_tokens {max_step_tokens} is too small: allowed is at least max_sequences "
                f"{max_sequences} + route_block {route_block}, so that prefill can continue beside a full batch"
            )
        if prefix_keys is not None and route_block % pool.block_size:
            raise ValueError(
                f"route_block {route_block} cannot be cached: allowed are multiples of block_size {pool.block_size}"
            )
        self.pool = pool
        self.fair_share = FairShare()
        self.running: list[Sequence] = []
        self.pace = Pace()
        self.route_block = route_block
        self.actions = actions
        self._num_preemptions = 0
        self._starts: list[tuple[str, Event]] = []
        self._max_step_tokens = max_step_tokens
        self._prefix_keys = prefix_keys
        self._multi_step = multi_step
        self._free_lanes = list(reversed(range(max_sequences)))

    @property
    def has_work(self) -> bool:
        return bool(self.fair_share or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Admission ensures that it fits into an otherwise empty cache, so it can always finish:
        cached blocks that no sequence uses are evicted when room is needed."""
        num_tokens = sequence.num_prompt + sequence.request.sampling.max_tokens
        assert self.pool.blocks_for(num_tokens) <= self.pool.num_blocks, f"{num_tokens} tokens can never fit"
        self._set_prefix_keys(sequence)
        self.fair_share.push(sequence)

    def change_depth(self, sequence: Sequence, max_cost: int) -> None:
        """Limit the sequence's tokens that no step has run yet to `max_cost` milli-layers. A sequence that has begun
        keeps its exit, if the model has exits: another one needs K/V of its own for all tokens so far."""
        if self.actions.exits and (sequence.num_computed or sequence.num_charged):
            return
        # Before add() a sequence has no keys.
        has_keys = bool(sequence.prefix_keys)
        sequence.change_depth(max_cost, self.route_block)
        if has_keys and len(sequence.depths) == 1:
            self._set_prefix_keys(sequence)

    def _set_prefix_keys(self, sequence: Sequence) -> None:
        if self._prefix_keys:
            sequence.prefix_keys = self._prefix_keys.of(sequence.request, sequence.max_cost(0))

    def schedule(self) -> Batch:
        """Build the next batch: decodes first, then prefill in the order of fair sharing. A batch with only decodes may
        run several steps."""
        num_preemptions = self._num_preemptions
        for sequence in [s for s in self.running if s.is_decoding]:
            # Room for an earlier sequence may have cost this one its lane.
            if sequence.lane >= 0:
                self._make_room(sequence, len(sequence.tokens))
        # Blocks that are left after a preemption will be needed by those that decode.
        if self._num_preemptions == num_preemptions:
            self._start_waiting()
        works = [self._work(sequence, sequence.num_computed, 1) for sequence in self._decoding()]
        most = self._max_step_tokens - len(works)
        num_left = self.pace.prefill_rows(most, self._multi_step) if works else most
        in_pieces = num_left < most
        under_way: set[bytes] = set()
        for sequence in sorted([s for s in self.running if not s.is_decoding], key=self.fair_share.prefill_rank):
            # Check the cache again: a sequence admitted earlier may have cached a shared prefix after the first check.
            self._reuse(sequence)
            next_block = sequence.num_computed // self.route_block
            if next_block < self._num_reusable(sequence) and sequence.prefix_keys[next_block] in under_way:
                # An earlier one computes this route block, and will cache it.
                continue
            chunk = list(self._chunk(sequence, num_left, in_pieces))
            if not chunk:
                break
            under_way.update(sequence.prefix_keys[next_block:])
            works += chunk
            num_left -= sum(work.length for work in chunk)
        num_prefill = sum(work.length for work in works if not work.is_decode)
        if self._multi_step and not num_prefill:
            return Batch(works, 0, self._reserve_steps(works), BURST_S)
        return Batch(works, num_prefill)

    def following(self, batch: Batch, num_steps: int) -> Batch | None:
        """The batch to launch while one of decodes is under way, before its results are known: the same sequences, as
        if each made `num_steps` tokens, and as many steps again. None if anything else is to be done first."""
        works = [work.after(num_steps) for work in batch.works]
        sequences = {work.sequence for work in works}
        if self.fair_share or any(s.has_ended for s in sequences) or not sequences.issuperset(self.running):
            return None
        if max(work.tokens_left for work in works) < 1 or self._num_missing(works, num_steps) > self.pool.num_free:
            return None
        self._grow(works, num_steps)
        return Batch(works, 0, num_steps, batch.most_s)

    def commit(self, batch: Batch, result: BatchResult, is_followed: bool = False) -> StepOutput:
        """Record a batch's results: append tokens, charge them, cache prefixes, release sequences that ended. One that
        `is_followed` leaves the blocks alone that the following batch uses already."""
        self.pace.observe(batch, result)
        sequences = dict.fromkeys(work.sequence for work in batch.works)
        depth: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        events, self._starts = self._starts, []
        for work, made in zip(batch.works, result.works, strict=True):
            request = work.sequence.request
            events += [(request.request_id, event) for event in self._book(work, made, depth[request.tenant])]
        for sequence in sequences:
            if sequence.has_ended:
                self.finish(sequence)
            elif batch.most_steps > 1 and not is_followed:
                # Frees blocks reserved for steps that did not run.
                self.pool.trim(sequence.block_table, len(sequence.tokens))
        stats = StepStats(
            num_steps=result.num_steps,
            num_rows=sum(len(made.paths) * work.length for work, made in zip(batch.works, result.works, strict=True)),
            num_sequences=len(sequences),
            num_layers_read=result.num_layers_read,
            num_preemptions=self._take_preemptions(),
            router_s=result.router_s,
            depth={tenant: DepthCount(*counts) for tenant, counts in depth.items()},
            seconds=result.seconds,
        )
        usages = [(s.request.request_id, s.usage) for s in sequences if not s.has_ended]
        return StepOutput(events, usages, stats)

    def finish(self, sequence: Sequence) -> None:
        """Release all that a sequence holds, whether it runs or waits."""
        if sequence in self.running:
            self._give_up_lane(sequence)
            self.fair_share.leave(sequence)
        else:
            self.fair_share.remove(sequence)

    def check_idle(self) -> None:
        """Check, between steps, that only running sequences and cached prefixes hold blocks."""
        self.pool.check([sequence.block_table for sequence in self.running])

    def _decoding(self) -> list[Sequence]:
        """The sequences that decode in the next batch: all, unless tenants with more than their share of lanes would
        slow down the others. Then their sequences take turns."""
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        num_lanes = len(self.running) + len(self._free_lanes)
        return self.fair_share.take_turns(decoding, num_lanes, self.pace.decode_rows)

    def _work(self, sequence: Sequence, start: int, length: int, ahead: int = 0, continues: bool = False) -> Work:
        return Work(sequence, start, length, sequence.max_cost(start), ahead, continues)

    def _reserve_steps(self, works: list[Work]) -> int:
        """Reserve blocks for several decode steps and return how many may run: limited by burst length, tokens
        remaining and free blocks."""
        steps = min(self.pace.burst_steps(MOST_STEPS), max((work.tokens_left for work in works), default=1))
        while self._num_missing(works, steps) > self.pool.num_free:
            steps //= 2
        self._grow(works, steps)
        return steps

    def _num_missing(self, works: list[Work], steps: int) -> int:
        """Blocks that decodes still lack for `steps` steps. For one step it is 0: schedule() allocated them."""
        return sum(
            max(0, self.pool.blocks_for(work.start + min(steps, work.tokens_left)) - len(work.sequence.block_table))
            for work in works
        )

    def _grow(self, works: list[Work], steps: int) -> None:
        for work in works:
            self.pool.grow(work.sequence.block_table, work.start + min(steps, work.tokens_left))

    def _book(self, work: Work, made: WorkResult, depth: list[int]) -> Iterator[Event]:
        """Record the result of one work. Adds its executed, skipped and uncharged milli-layers to `depth`."""
        sequence, whole = work.sequence, self.actions.full_cost
        sequence.scored_prompt += made.scored
        charged = 0
        for step, path in enumerate(made.paths):
            cost = self.actions.path_costs[path]
            executed = cost * work.length
            depth[0] += executed
            depth[1] += whole * work.length - executed
            # A batch of several steps may run past a stop string. Those tokens are not charged.
            newly = 0 if sequence.has_ended else sequence.charge(work.start + step, work.length, cost)
            charged += newly
            depth[2] += executed - newly
            if not sequence.has_ended and made.tokens:
                yield from sequence.accept(made.tokens[step], path)
        if charged:
            self.fair_share.charge(sequence, charged)
        if self._is_cacheable(work):
            self._cache(work, array("d", made.sums.tolist()))

    def _is_cacheable(self, work: Work) -> bool:
        """Whether the work completes a full route block that has a prefix cache key."""
        return work.end % self.route_block == 0 and work.end // self.route_block <= len(work.sequence.prefix_keys)

    def _cache(self, work: Work, sums: "array[float]") -> None:
        """Cache the route block that `work` completed. `sums` are the router's running features at its end."""
        table = work.sequence.block_table
        index = work.end // self.route_block - 1
        num_blocks = self.route_block // self.pool.block_size
        key, first = work.sequence.prefix_keys[index], index * num_blocks
        cached = self.pool.find(key)
        if cached is None:
            self.pool.cache(key, table[first : first + num_blocks], sums)
        else:
            # Another sequence cached this route block first. Sharing its blocks saves memory, and keeps them from
            # being evicted while this sequence caches the blocks that follow.
            self.pool.share(cached, table, first)

    def _start_waiting(self) -> None:
        """Give lanes and blocks to waiting sequences, in order, as far as there are any or fair sharing frees some."""
        while (first := self.fair_share.peek()) is not None and self._take_room(first):
            queue_s = self.fair_share.start(first)
            if queue_s is not None:
                self._starts.append((first.request.request_id, StartEvent(queue_s)))
            first.lane = self._free_lanes.pop()
            self.running.append(first)

    def _take_room(self, sequence: Sequence) -> bool:
        """Free a lane and allocate blocks for all known tokens, cached ones as far as there are any. Preempts others as
        far as that is fair, but nobody in vain. Returns False and changes nothing if there is too little room."""
        givers = self.fair_share.givers(sequence, self.running)
        victims = [] if self._free_lanes else list(islice(givers, 1))
        if not (self._free_lanes or victims):
            return False
        self._reuse(sequence)
        while not self._has_blocks(sequence, victims):
            giver = next(givers, None)
            if giver is None:
                self._empty(sequence)
                return False
            victims.append(giver)
        for victim in victims:
            self._preempt(victim)
        # All at once: two partly computed prompts could otherwise wait for each other's blocks forever.
        return self.pool.grow(sequence.block_table, len(sequence.tokens))

    def _has_blocks(self, sequence: Sequence, victims: list[Sequence]) -> bool:
        """Whether, without the `victims`, there are enough blocks for all of the sequence's tokens, and one more for
        each that runs, which would soon preempt it otherwise."""
        missing = self.pool.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        num_free = self.pool.num_free + self.pool.num_held_only_by([victim.block_table for victim in victims])
        return missing + len(self.running) - len(victims) <= num_free

    def _reuse(self, sequence: Sequence) -> None:
        """Take the sequence's next route blocks from the prefix cache, up to the first that is missing."""
        for index in range(sequence.num_computed // self.route_block, self._num_reusable(sequence)):
            cached = self.pool.find(sequence.prefix_keys[index])
            if cached is None:
                return
            self.pool.share(cached, sequence.block_table, index * len(cached.blocks))
            sequence.num_computed = sequence.num_restored = (index + 1) * self.route_block
            sequence.restored_sums = cached.sums

    def _num_reusable(self, sequence: Sequence) -> int:
        """How many of the sequence's route blocks may come from the prefix cache."""
        if sequence.request.sampling.prompt_logprobs is not None:
            return 0
        # The route block with the last prompt token is never reused: the token must be computed to get its logits.
        return min(len(sequence.prefix_keys), (sequence.num_prompt - 1) // self.route_block)

    def _chunk(self, sequence: Sequence, budget: int, in_pieces: bool) -> Iterator[Work]:
        """The sequence's next segments, at most `budget` tokens in total. With `in_pieces` a segment may be split."""
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

    def _make_room(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocate blocks for a decode step. If there are too few, preempt others, or `sequence` itself if it is the
        one to give way."""
        while sequence.lane >= 0 and not self.pool.grow(sequence.block_table, num_tokens):
            self._preempt(self.fair_share.most_over(self.running))

    def _preempt(self, sequence: Sequence) -> None:
        self._give_up_lane(sequence)
        self.fair_share.put_back(sequence)
        self._num_preemptions += 1

    def _take_preemptions(self) -> int:
        """The number of preemptions since the last call; starts counting anew."""
        count, self._num_preemptions = self._num_preemptions, 0
        return count

    def _give_up_lane(self, sequence: Sequence) -> None:
        self._empty(sequence)
        self.running.remove(sequence)
        self._free_lanes.append(sequence.lane)
        sequence.lane = -1

    def _empty(self, sequence: Sequence) -> None:
        """Release the sequence's blocks and mark all its tokens as not computed."""
        self.pool.release(sequence.block_table)
        sequence.num_computed = sequence.num_restored = 0
        sequence.restored_sums = None
