"""All members of a fleet as one of them sees it, and what follows for the whole."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from msgspec import DecodeError

from buddy_server.engine.messages import Served, StepTime
from buddy_server.fleet.entry import Decision, EngineReport, Entry, decode_entry

log = logging.getLogger(__name__)

ALIVE_S = 2.0
"""A member is there for this long after its last entry, by the clock of the one who looks."""
FORGET_S = 60.0

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Seen:
    """`entry` is None if it cannot be read: another version of the server wrote it."""

    content: bytes
    entry: Entry | None
    since_s: float


class Fleet:
    """The members that are alive, as of the last `update`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._alive: dict[str, Entry] = {}
        self.inter_token_s = 0.0
        """The mean time of a step, over all engines, each counted with the sequences that waited for it: of the steps
        that the last update with news of an engine brought; 0.0 if there were none."""
        self._steps: Growth[str] = Growth()
        self._served: Growth[tuple[str, int]] = Growth()

    def update(self, entries: Mapping[str, bytes]) -> None:
        """Replace what is known of the members, by name."""
        now_s, before = self._clock(), self._seen
        self._seen = {name: self._look(name, content, now_s) for name, content in entries.items()}
        self._alive = {
            name: seen.entry
            for name, seen in self._seen.items()
            if seen.entry is not None and now_s - seen.since_s < ALIVE_S
        }
        if any(self._seen[name] is not before.get(name) for name in self.engines):
            self.inter_token_s = self._mean_step_s()

    def _mean_step_s(self) -> float:
        times = {name: report.step_time for name, report in self.engines.items()}
        grown = self._steps.take(
            {name: {"seconds": time.seconds, "num_steps": time.num_steps} for name, time in times.items()}
        )
        return StepTime(grown["seconds"], int(grown["num_steps"])).mean_s

    def _look(self, name: str, content: bytes, now_s: float) -> _Seen:
        before = self._seen.get(name)
        if before is not None and before.content == content:
            return before
        try:
            return _Seen(content, decode_entry(content), now_s)
        except DecodeError as error:
            if before is None or before.entry is not None:
                log.warning("member of another version", extra={"member": name, "reason": error})
            return _Seen(content, None, now_s)

    @property
    def gone(self) -> list[str]:
        """Members of which nobody has heard for long."""
        return [name for name, seen in self._seen.items() if self._clock() - seen.since_s >= FORGET_S]

    @property
    def engines(self) -> dict[str, EngineReport]:
        """The engines that take work, by their members."""
        reports = {name: entry.engine for name, entry in self._alive.items()}
        return {name: report for name, report in reports.items() if report is not None and report.is_ready}

    @property
    def deciders(self) -> list[str]:
        """The members that may decide how deep engines run. The first one does: all choose the same, without a word."""
        return sorted(name for name, entry in self._alive.items() if entry.decision is not None)

    @property
    def decision(self) -> Decision | None:
        """The one that holds for all engines; None if there is nobody to decide."""
        return self._alive[self.deciders[0]].decision if self.deciders else None

    def take_served(self, own: str) -> Served:
        """What all engines but that of the member `own` have run since the last call."""
        sums = {name: report.served for name, report in self.engines.items() if name != own}
        return {key: int(cost) for key, cost in self._served.take(sums).items() if cost}

    def waiting_tenants(self, own: str) -> frozenset[tuple[str, int]]:
        """The tenants that wait on other engines than that of the member `own`, with the priority."""
        reports = (report for name, report in self.engines.items() if name != own)
        return frozenset[tuple[str, int]]().union(*(report.waiting_tenants for report in reports))


class Growth(Generic[K]):
    """How much sums have grown from one look to the next. Those of a member that was not there at the last look have
    not: what it did before is past. One that is less than before has begun again at 0."""

    def __init__(self) -> None:
        self._last: Mapping[str, Mapping[K, float]] = {}

    def take(self, sums: Mapping[str, Mapping[K, float]]) -> dict[K, float]:
        """Since the last call, over all members. A key that is new to a member starts at 0."""
        grown: defaultdict[K, float] = defaultdict(float)
        for name in sums.keys() & self._last.keys():
            for key, total in sums[name].items():
                before = self._last[name].get(key, 0)
                grown[key] += total - before if total >= before else total
        self._last = sums
        return grown
