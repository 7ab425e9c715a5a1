"""Tenants that wait with the same priority, in the order in which they are served. Does not import torch."""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace

from buddy_server.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Line:
    """A tenant's sequences of one priority, those that wait in the order in which they run. `counter` is what the
    tenant has run in this priority, in milli-layers over its weight. `prepaid` are the milli-layers of the prompts that
    have a lane and have not run yet. `elsewhere` are those that other engines have run since it last got a lane here,
    which the counter contains, and `ran_s` is when it last had one. `keeps_claim` says that it has always waited
    elsewhere since nothing of it waits here. `entry` is the one in the heap of its class."""

    tenant: str
    priority: int
    weight: float
    counter: float = -math.inf
    waiting: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    num_running: int = 0
    prepaid: int = 0
    elsewhere: int = 0
    ran_s: float = -math.inf
    keeps_claim: bool = False
    entry: "tuple[float, int, Line] | None" = None

    @property
    def key(self) -> tuple[str, int]:
        return self.tenant, self.priority

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    @property
    def first(self) -> Sequence:
        return next(iter(self.waiting))

    @property
    def place(self) -> tuple[float, int]:
        """Of the lines of one priority that wait, the lowest place is served next."""
        return self.counter + self.prepaid / self.weight, self.first.arrival


@dataclass(slots=True, eq=False)
class PriorityClass:
    """The lines of one priority. `weight` is the sum over the `num_active` lines that have work. Whoever begins to wait
    gets a counter of at least `level`, as idle time is no claim to later service, unless its line keeps its claim."""

    level: float = 0.0
    weight: float = 0.0
    num_active: int = 0
    num_waiting: int = 0
    heap: list[tuple[float, int, Line]] = field(default_factory=list)

    def next_line(self) -> Line | None:
        """The line to serve next; None if no sequence waits."""
        while self.heap:
            entry = self.heap[0]
            line = entry[2]
            if entry is not line.entry:
                # Replaced by one with a lower place.
                heappop(self.heap)
            elif not line.waiting:
                heappop(self.heap)
                line.entry = None
            elif entry[:2] != line.place:
                line.entry = (*line.place, line)
                heapreplace(self.heap, line.entry)
            else:
                return line
        return None

    def enter(self, line: Line) -> None:
        """Call this when the line may have a lower place than before. A higher one is noticed when its turn comes."""
        if line.waiting and (line.entry is None or line.place < line.entry[:2]):
            line.entry = (*line.place, line)
            heappush(self.heap, line.entry)
