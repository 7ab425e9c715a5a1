"""Fair sharing between tenants: which waiting sequence runs next, and which running one gives way.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2), in
milli-layers: cached tokens and skipped layers cost nothing. Does not import torch.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set

from buddy_server.engine.messages import Served
from buddy_server.engine.priority_class import Line, PriorityClass
from buddy_server.engine.sequence import Sequence

LONGEST_WAIT_S = 30.0
"""A sequence that still waits this long after its arrival may rise to the highest priority present: many clients and
proxies give up after 60 s. A prompt that is not computed this long after its sequence got a lane goes before others.
A tenant that has had no lane for this long is no longer held back by what other engines run for it."""
LOOK_S = 1.0
"""How often to look for those that have waited too long."""
HEAD_START = 1.0
"""A tenant that begins to wait is placed this far before the level of its class, in milli-layers over its weight: it
goes before the long queues of those who have been served as much. Too little to matter otherwise."""
MOST_IDLE = 1000
"""How many lines without work are remembered."""


class FairShare:
    """The highest priority goes first, then the tenant with the lowest counter, then the earliest arrival. A tenant's
    own sequences of one priority run in order of arrival; those that were preempted or have risen go before the others.
    A prompt counts as soon as its sequence has a lane: otherwise one tenant would get all lanes that are free at once.

    A tenant's fair share of the sequences that run is that of its weight among the tenants that have work of its
    priority or above. The newest request states the weight.

    Several engines share as one if each is told, every second or more often, what the others have served and who waits
    there (`take_served` and `waiting_tenants` there, `charge_elsewhere` here): a tenant that has work on this engine
    alone may then get all of it, while another gets as much elsewhere. Lanes and turns are still shared by each engine
    for itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines: dict[tuple[str, int], Line] = {}
        self._classes: dict[int, PriorityClass] = {}
        self._idle: dict[Line, None] = {}
        self._raised: dict[str, Sequence] = {}
        self._next_look_s = -math.inf
        self._served: Counter[tuple[str, int]] = Counter()
        self._waiting_elsewhere: Set[tuple[str, int]] = frozenset()
        self._num_turns = 0

    def __len__(self) -> int:
        """How many sequences wait."""
        return sum(group.num_waiting for group in self._classes.values())

    @property
    def queue_s(self) -> float:
        """How long the oldest sequence that has never run has been waiting; 0 if there is none. Those of a tenant that
        has more than its fair share of the sequences that run do not count, nor those of one that waits because other
        engines serve it, nor those that have risen."""
        now_s = oldest_s = self._clock()
        num_running = sum(line.num_running for line in self._lines.values())
        for line in self._lines.values():
            new = (one.arrived_s for one in line.waiting if not (one.has_started or one.is_raised))
            arrived_s = next(new, now_s)
            if arrived_s < oldest_s and not line.elsewhere and line.num_running <= self._share(line, num_running):
                oldest_s = arrived_s
        return now_s - oldest_s

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that has arrived."""
        sequence.arrived_s = self._clock()
        self._join(sequence)

    def peek(self) -> Sequence | None:
        """The sequence to run next; None if none waits."""
        self._help_late()
        for priority in sorted(self._classes, reverse=True):
            if (line := self._classes[priority].next_line()) is not None:
                return line.first
        return None

    def start(self, sequence: Sequence) -> float | None:
        """A waiting sequence gets a lane; `num_computed` says what the prefix cache had. Returns the seconds that it
        waited, if it is the first time."""
        line = self._line(sequence)
        self._stop_waiting(sequence)
        line.num_running += 1
        # Its turn has come, so what other engines ran for it no longer holds it back.
        line.elsewhere = 0
        start = max(sequence.num_computed, sequence.num_charged)
        sequence.prepaid = max(0, sequence.num_prompt - start) * sequence.max_cost(start)
        line.prepaid += sequence.prepaid
        queue_s = None if sequence.has_started else self._clock() - sequence.arrived_s
        sequence.started_s = self._clock()
        return queue_s

    def put_back(self, sequence: Sequence) -> None:
        """A running sequence was preempted: it waits before all others of its line."""
        self._stop_running(sequence)
        self._wait(sequence, is_first=True)

    def leave(self, sequence: Sequence) -> None:
        """A running sequence has ended."""
        self._stop_running(sequence)
        self._forget_sequence(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence should no longer run. Ignores one that does not wait."""
        line = self._lines.get((sequence.request.tenant, sequence.priority))
        if line is not None and sequence in line.waiting:
            self._stop_waiting(sequence)
            self._forget_sequence(sequence)

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Record that a running sequence ran `cost` milli-layers."""
        line = self._line(sequence)
        self._served[line.key] += cost
        self._advance(line, cost)
        prepaid = min(cost, sequence.prepaid)
        line.prepaid -= prepaid
        sequence.prepaid -= prepaid

    def charge_elsewhere(self, served: Mapping[tuple[str, int], int], waiting: Set[tuple[str, int]]) -> None:
        """Record what other engines have run since the last call, in milli-layers by tenant and priority, and which
        tenants wait there now, with which priority.

        Only tenants that have work here are charged. Others take nothing away from those who wait here, so they owe
        them nothing when they come.

        A tenant that gets more elsewhere than others get here gets no lane here while they wait, but not for longer
        than LONGEST_WAIT_S. Then it is as far as they are, and is not charged until it has a lane: they had all that
        this engine could run, so they have no claim to more, and the other engines may be gone.

        A tenant of which something runs here keeps its claim while nothing waits here, as long as it always waits
        elsewhere: where its requests go is not its choice.
        """
        self._waiting_elsewhere = waiting
        for known in self._lines.values():
            known.keeps_claim = known.keeps_claim and known.key in waiting
        now_s = self._clock()
        for key, cost in served.items():
            line = self._lines.get(key)
            if line is not None and line.has_work and not self._is_late(line, now_s):
                line.elsewhere += cost
                self._advance(line, cost)

    @property
    def waiting_tenants(self) -> frozenset[tuple[str, int]]:
        """The tenants that wait here, with the priority."""
        return frozenset(line.key for line in self._lines.values() if line.waiting)

    def take_served(self) -> Served:
        """What was charged here since the last call."""
        served, self._served = self._served, Counter()
        return served

    def prefill_rank(self, sequence: Sequence) -> tuple[float, int, float, int]:
        """The order in which the prompts of running sequences are computed: lower goes first."""
        is_late = self._clock() - sequence.started_s >= LONGEST_WAIT_S
        late_s = sequence.started_s if is_late else math.inf
        return late_s, -sequence.priority, self._line(sequence).counter, sequence.arrival

    def most_over(self, running: list[Sequence]) -> Sequence:
        """The one of `running` that gives way when there are too few blocks: of the lowest priority, then of the tenant
        that would keep most, relative to its weight. Of a tenant it is the latest arrival, so the earliest always get
        on, and the latest have the least to compute again."""
        counts = self._counts(running)

        def order(sequence: Sequence) -> tuple[int, float, int]:
            line = self._line(sequence)
            return line.priority, -(counts[line] - 1) / line.weight, -sequence.arrival

        return min(running, key=order)

    def givers(self, waiting: Sequence, running: list[Sequence]) -> Iterator[Sequence]:
        """Those of `running` that may be preempted so that `waiting` can run, the first to give way first.

        It is fair to take from a lower priority. In the same priority it is fair to take from a tenant that has been
        served as much or more and keeps its fair share, for one that then has no more than half of its own: the rest
        comes as sequences end. Tenants whose numbers swing around their shares would preempt each other all the time
        otherwise.
        """
        taker, left = self._line(waiting), list(running)
        may_take_equal = taker.num_running + 1 <= max(1.0, self._share(taker, len(running)) / 2)

        def may_take(giver: Line, num_kept: int) -> bool:
            if giver.priority != taker.priority:
                return giver.priority < taker.priority
            is_ahead = may_take_equal and giver.counter >= taker.counter
            return is_ahead and num_kept >= self._share(giver, len(running))

        while True:
            lines = {line for line, count in self._counts(left).items() if may_take(line, count - 1)}
            if not lines:
                return
            giver = self.most_over([sequence for sequence in left if self._line(sequence) in lines])
            left.remove(giver)
            yield giver

    def take_turns(
        self, decoding: list[Sequence], num_lanes: int, most_rows: Callable[[int, int], int]
    ) -> list[Sequence]:
        """Those of `decoding` that decode in the next step: all, if every tenant has no more than its fair share of
        `num_lanes`, or if there is nobody to protect, that is a tenant that has all it asks for and no more than its
        share.

        Otherwise at most `most_rows(fair, wanted)`, of which `fair` are within the shares and `wanted` are all. Tenants
        with more than their share divide the rest in proportion to what they have beyond it. Of each, those decode
        whose last turn was longest ago.
        """
        lines = [self._line(sequence) for sequence in decoding]
        counts = Counter(lines)
        fair = {line: min(count, int(self._share(line, num_lanes))) for line, count in counts.items()}
        num_fair, wanted = sum(fair.values()), len(decoding)
        is_one_small = any(count == fair[line] and not line.waiting for line, count in counts.items())
        if num_fair == wanted or not is_one_small or (most := most_rows(num_fair, wanted)) >= wanted:
            return decoding
        extra = (most - num_fair) / (wanted - num_fair)
        left = {line: fair[line] + int(extra * (count - fair[line])) for line, count in counts.items()}
        chosen: list[Sequence] = []
        for sequence, line in sorted(zip(decoding, lines, strict=True), key=lambda pair: pair[0].turn):
            if left[line]:
                left[line] -= 1
                sequence.turn = self._num_turns = self._num_turns + 1
                chosen.append(sequence)
        return chosen

    def _advance(self, line: Line, cost: int) -> None:
        group = self._classes[line.priority]
        line.counter += cost / line.weight
        if not group.num_waiting:
            # Everybody gets what they ask for, so nobody has a claim to more.
            group.level = max(group.level, line.counter)

    def _counts(self, sequences: Iterable[Sequence]) -> Counter[Line]:
        return Counter(map(self._line, sequences))

    def _share(self, line: Line, num_lanes: int) -> float:
        """The line's fair share of the sequences that run, at least one."""
        weights = sum(group.weight for priority, group in self._classes.items() if priority >= line.priority)
        # The sums of weights are not exact, and a whole share must be.
        return max(1.0, round(num_lanes * line.weight / weights, 6))

    def _line(self, sequence: Sequence) -> Line:
        return self._lines[sequence.request.tenant, sequence.priority]

    def _join(self, sequence: Sequence, is_first: bool = False) -> None:
        """Put a sequence at the end, or the beginning, of the line of its tenant and priority."""
        tenant, weight, priority = sequence.request.tenant, sequence.request.weight, sequence.priority
        group = self._classes.setdefault(priority, PriorityClass())
        line = self._lines.get((tenant, priority))
        if line is None:
            line = self._lines[tenant, priority] = Line(tenant, priority, weight)
        self._idle.pop(line, None)
        group.num_active += not line.has_work
        group.weight += weight - line.weight if line.has_work else weight
        if (lowest := group.next_line()) is not None:
            group.level = max(group.level, lowest.counter)
        # What the tenant is ahead of others counts under its new weight.
        line.counter = min(line.counter, group.level) + max(0.0, line.counter - group.level) * line.weight / weight
        line.weight = weight
        if not (line.waiting or line.keeps_claim):
            line.counter = max(line.counter, group.level - HEAD_START)
        self._wait(sequence, is_first)

    def _wait(self, sequence: Sequence, is_first: bool) -> None:
        line, group = self._line(sequence), self._classes[sequence.priority]
        line.waiting[sequence] = None
        line.waiting.move_to_end(sequence, last=not is_first)
        group.num_waiting += 1
        group.enter(line)

    def _stop_waiting(self, sequence: Sequence) -> None:
        line = self._line(sequence)
        del line.waiting[sequence]
        line.keeps_claim = line.key in self._waiting_elsewhere
        self._classes[sequence.priority].num_waiting -= 1

    def _stop_running(self, sequence: Sequence) -> None:
        line = self._line(sequence)
        line.num_running -= 1
        line.ran_s = self._clock()
        line.prepaid -= sequence.prepaid
        sequence.prepaid = 0
        self._classes[line.priority].enter(line)

    def _help_late(self) -> None:
        now_s = self._clock()
        if now_s >= self._next_look_s and self:
            self._next_look_s = now_s + LOOK_S
            self._raise_priorities(now_s)
            self._forgive(now_s)

    def _raise_priorities(self, now_s: float) -> None:
        """Move sequences that have waited too long to the highest priority that has work, of each tenant one at a time:
        with all of them, a long queue would be the end of priorities."""
        highest = max(priority for priority, group in self._classes.items() if group.num_active)
        lower = [line for line in self._lines.values() if line.waiting and line.priority < highest]
        for line in lower:
            sequence = line.first
            is_late = now_s - sequence.arrived_s >= LONGEST_WAIT_S
            if is_late and self._raised.setdefault(line.tenant, sequence) is sequence:
                self._stop_waiting(sequence)
                sequence.priority = highest
                self._join(sequence, is_first=True)
                self._rest_if_idle(line)

    def _forgive(self, now_s: float) -> None:
        """Let tenants that have had no lane for too long go next, as far as other engines are the reason."""
        for line in [line for line in self._lines.values() if line.elsewhere and self._is_late(line, now_s)]:
            group = self._classes[line.priority]
            lowest = group.next_line()
            assert lowest is not None, "the late one waits"
            own = line.counter - line.elsewhere / line.weight
            line.counter = min(line.counter, max(own, lowest.counter - HEAD_START))
            line.elsewhere = 0
            group.enter(line)

    def _is_late(self, line: Line, now_s: float) -> bool:
        """Whether sequences wait, but none has had a lane for LONGEST_WAIT_S."""
        if line.num_running or not line.waiting:
            return False
        return now_s - max(line.first.arrived_s, line.ran_s) >= LONGEST_WAIT_S

    def _forget_sequence(self, sequence: Sequence) -> None:
        if self._raised.get(sequence.request.tenant) is sequence:
            del self._raised[sequence.request.tenant]
        self._rest_if_idle(self._line(sequence))

    def _rest_if_idle(self, line: Line) -> None:
        """If the line has no work left, forget it, or remember it if it would lose a counter above the level that it
        would return to. If too many are remembered, forget the one with the lowest counter."""
        if line.has_work:
            return
        line.keeps_claim = False
        group = self._classes[line.priority]
        group.num_active -= 1
        # Exactly 0 in the end, whatever the rounding.
        group.weight = group.weight - line.weight if group.num_active else 0.0
        if not group.num_active:
            group.level = max(group.level, line.counter)
        self._idle[line] = None
        if line.counter <= group.level:
            self._forget(line)
        elif len(self._idle) > MOST_IDLE:
            self._forget(min(self._idle, key=lambda idle: idle.counter))

    def _forget(self, line: Line) -> None:
        """Who returns unknown gets the level as its counter, which must not be less than the forgotten one."""
        group = self._classes[line.priority]
        group.level = max(group.level, line.counter)
        del self._idle[line], self._lines[line.key]
