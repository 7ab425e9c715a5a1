"""Fair sharing between tenants: which waiting sequence runs next, and which running one gives way.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2), in
milli-layers: cached tokens and skipped layers cost nothing. Does not import torch.
"""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace

from buddy_server.engine.sequence import Sequence

LONGEST_WAIT_S = 30.0
"""After waiting this long a sequence rises to the highest priority present: many clients and proxies give up after
60 s."""
HEAD_START = 1.0
"""Who begins to wait goes before those who have been served as much and may have a whole line waiting. In milli-layers
over the weight: too little to matter otherwise."""
MOST_IDLE = 1000
"""How many tenants without work are remembered."""


@dataclass(slots=True, eq=False)
class _Line:
    """A tenant's sequences of one priority, those that wait in the order of arrival. `counter` is what the tenant has
    run in this priority, in milli-layers over its weight."""

    tenant: str
    priority: int
    weight: float
    counter: float = -math.inf
    waiting: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    num_running: int = 0
    in_heap: bool = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    @property
    def first(self) -> Sequence:
        return next(iter(self.waiting))


@dataclass(slots=True, eq=False)
class _PriorityClass:
    """The lines of one priority. `weight` is the sum over the `num_active` lines that have work. Whoever begins to wait
    gets a counter of at least `level`: idle time is no claim to later service."""

    level: float = 0.0
    weight: float = 0.0
    num_active: int = 0
    num_waiting: int = 0
    heap: list[tuple[float, int, _Line]] = field(default_factory=list)

    def next_line(self) -> _Line | None:
        """The line to serve next; None if no sequence waits."""
        # Counters never fall, so an entry that is out of date comes up too early, and is put right then.
        while self.heap:
            counter, arrival, line = self.heap[0]
            if not line.waiting:
                heappop(self.heap)
                line.in_heap = False
            elif (counter, arrival) != (line.counter, line.first.arrival):
                heapreplace(self.heap, (line.counter, line.first.arrival, line))
            else:
                return line
        return None

    def add_waiting(self, line: _Line) -> None:
        """Count one more waiting sequence, which is in `line` already."""
        self.num_waiting += 1
        if not line.in_heap:
            heappush(self.heap, (line.counter, line.first.arrival, line))
            line.in_heap = True


class FairShare:
    """The highest priority goes first, then the tenant with the lowest counter, then the earliest arrival. A tenant's
    own sequences run in order of arrival.

    A tenant's fair share of the sequences that run is that of its weight among the tenants that have work of its
    priority or above. The newest request states the weight.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines: dict[tuple[str, int], _Line] = {}
        self._classes: dict[int, _PriorityClass] = {}
        self._idle: dict[_Line, None] = {}
        # Both with times, the earliest first: when those that never ran have arrived, when those that wait will rise.
        self._arrived_s: OrderedDict[Sequence, float] = OrderedDict()
        self._rises_s: OrderedDict[Sequence, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rises_s)

    @property
    def queue_s(self) -> float:
        """How long the oldest sequence that has never run has been waiting; 0 if there is none."""
        return self._clock() - next(iter(self._arrived_s.values())) if self._arrived_s else 0.0

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that has arrived."""
        self._arrived_s[sequence] = self._clock()
        self._join(sequence)

    def peek(self) -> Sequence | None:
        """The sequence to run next; None if none waits."""
        self._raise_priorities()
        for priority in sorted(self._classes, reverse=True):
            if (line := self._classes[priority].next_line()) is not None:
                return line.first
        return None

    def start(self, sequence: Sequence) -> float | None:
        """A waiting sequence runs now. Returns the seconds that it waited, if it is the first time."""
        self._line(sequence).num_running += 1
        self._stop_waiting(sequence)
        arrived_s = self._arrived_s.pop(sequence, None)
        return None if arrived_s is None else self._clock() - arrived_s

    def put_back(self, sequence: Sequence) -> None:
        """A running sequence was preempted: it waits before all others of its tenant."""
        line = self._line(sequence)
        line.num_running -= 1
        line.waiting[sequence] = None
        line.waiting.move_to_end(sequence, last=False)
        self._wait(line, sequence)

    def leave(self, sequence: Sequence) -> None:
        """A running sequence has ended."""
        line = self._line(sequence)
        line.num_running -= 1
        self._rest_if_idle(line)

    def remove(self, sequence: Sequence) -> None:
        """A sequence should no longer run. Ignores one that does not wait."""
        if sequence in self._rises_s:
            self._stop_waiting(sequence)
            self._arrived_s.pop(sequence, None)
            self._rest_if_idle(self._line(sequence))

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Record that a running sequence ran `cost` milli-layers."""
        line, group = self._line(sequence), self._classes[sequence.priority]
        line.counter += cost / line.weight
        if not group.num_waiting:
            # Everybody gets what they ask for, so nobody has a claim to more.
            group.level = max(group.level, line.counter)

    def rank(self, sequence: Sequence) -> tuple[int, float, int]:
        """Lower goes first."""
        return -sequence.priority, self._line(sequence).counter, sequence.arrival

    def most_over(self, running: Iterable[Sequence]) -> Sequence:
        """The one of `running` that gives way when there are too few blocks: of the lowest priority, then of the tenant
        that would keep most, relative to its weight. Of a tenant it is the latest arrival, so the earliest always get
        on, and the latest have the least to compute again."""

        def order(sequence: Sequence) -> tuple[int, float, int]:
            line = self._line(sequence)
            return line.priority, -(line.num_running - 1) / line.weight, -sequence.arrival

        return min(running, key=order)

    def gives_way_to(self, waiting: Sequence, running: list[Sequence]) -> Sequence | None:
        """The one of `running` to preempt so that `waiting` can run; None if that would be unfair.

        Fair is to take from a lower priority. In the same priority it is to take from a tenant that has been served as
        much or more and keeps its fair share, for one that then has no more than half of its own: the rest comes as
        sequences end. Tenants whose numbers swing around their shares would preempt each other all the time otherwise.
        """
        taker = self._line(waiting)
        givers = {
            line
            for line in {self._line(sequence) for sequence in running}
            if line.priority < taker.priority or self._may_take(taker, line, len(running))
        }
        candidates = [sequence for sequence in running if self._line(sequence) in givers]
        return self.most_over(candidates) if candidates else None

    def num_within_share(self, decoding: list[Sequence], num_lanes: int) -> int:
        """How many of `decoding` run if no tenant has more than its fair share of `num_lanes`. All of them if there is
        nobody to protect: a tenant that has all it asks for and no more than its share."""
        counts = self._counts(decoding)
        fair = {line: min(count, int(self._share(line, num_lanes))) for line, count in counts.items()}
        is_one_small = any(count == fair[line] and not line.waiting for line, count in counts.items())
        return sum(fair.values()) if is_one_small else len(decoding)

    def within_share(self, decoding: list[Sequence], num_lanes: int, most: int) -> list[Sequence]:
        """At most `most` of `decoding`, which must be room for the fair shares: all of the tenants within theirs. The
        others divide the rest in proportion to what they have beyond their share, each to those whose turn was longest
        ago. In the order of turns."""
        counts = self._counts(decoding)
        fair = {line: min(count, int(self._share(line, num_lanes))) for line, count in counts.items()}
        extra = (most - sum(fair.values())) / (len(decoding) - sum(fair.values()))
        left = {line: fair[line] + int(extra * (count - fair[line])) for line, count in counts.items()}
        chosen: list[Sequence] = []
        for sequence in sorted(decoding, key=lambda other: other.turn):
            line = self._line(sequence)
            if left[line]:
                left[line] -= 1
                chosen.append(sequence)
        return chosen

    def _counts(self, sequences: Iterable[Sequence]) -> Counter[_Line]:
        return Counter(map(self._line, sequences))

    def _may_take(self, taker: _Line, giver: _Line, num_lanes: int) -> bool:
        return (
            giver.priority == taker.priority
            and giver.counter >= taker.counter
            and giver.num_running - 1 >= self._share(giver, num_lanes)
            and taker.num_running + 1 <= max(1.0, self._share(taker, num_lanes) / 2)
        )

    def _share(self, line: _Line, num_lanes: int) -> float:
        """The line's fair share of the sequences that run, at least one."""
        weights = sum(group.weight for priority, group in self._classes.items() if priority >= line.priority)
        return max(1.0, num_lanes * line.weight / weights)

    def _line(self, sequence: Sequence) -> _Line:
        return self._lines[sequence.request.tenant, sequence.priority]

    def _join(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the line of its tenant and priority."""
        tenant, weight, priority = sequence.request.tenant, sequence.request.weight, sequence.priority
        group = self._classes.setdefault(priority, _PriorityClass())
        line = self._lines.get((tenant, priority))
        if line is None:
            line = self._lines[tenant, priority] = _Line(tenant, priority, weight)
        self._idle.pop(line, None)
        group.num_active += not line.has_work
        group.weight += weight - line.weight if line.has_work else weight
        line.weight = weight
        if not line.waiting:
            if (lowest := group.next_line()) is not None:
                group.level = max(group.level, lowest.counter)
            line.counter = max(line.counter, group.level - HEAD_START)
        line.waiting[sequence] = None
        self._wait(line, sequence)

    def _wait(self, line: _Line, sequence: Sequence) -> None:
        self._classes[line.priority].add_waiting(line)
        self._rises_s[sequence] = self._clock() + LONGEST_WAIT_S

    def _stop_waiting(self, sequence: Sequence) -> None:
        del self._line(sequence).waiting[sequence]
        self._classes[sequence.priority].num_waiting -= 1
        del self._rises_s[sequence]

    def _raise_priorities(self) -> None:
        """Move those that have waited too long to the highest priority that has work."""
        now_s = self._clock()
        while self._rises_s:
            sequence, rises_s = next(iter(self._rises_s.items()))
            if rises_s > now_s:
                return
            highest = max(priority for priority, group in self._classes.items() if group.num_active)
            if sequence.priority < highest:
                line = self._line(sequence)
                self._stop_waiting(sequence)
                sequence.priority = highest
                self._join(sequence)
                self._rest_if_idle(line)
            else:
                self._rises_s[sequence] = now_s + LONGEST_WAIT_S
                self._rises_s.move_to_end(sequence)

    def _rest_if_idle(self, line: _Line) -> None:
        """Without work, the line is forgotten as soon as its counter is not above the level that it would return to."""
        if line.has_work:
            return
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

    def _forget(self, line: _Line) -> None:
        """Who returns unknown gets the level as its counter, which must not be less than the forgotten one."""
        group = self._classes[line.priority]
        group.level = max(group.level, line.counter)
        del self._idle[line], self._lines[line.tenant, line.priority]
