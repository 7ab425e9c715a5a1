"""Who runs next: the sequences that wait for a lane and blocks."""

from bisect import insort
from typing import Protocol

from buddy_server.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """An order of service. The scheduler takes from the front and tells what everybody has run."""

    def __len__(self) -> int: ...

    def push(self, sequence: Sequence) -> None:
        """A sequence that has arrived, or that was preempted."""
        ...

    def peek(self) -> Sequence | None:
        """The one to run next; None when nobody waits."""
        ...

    def pop(self) -> Sequence:
        """Take the one that `peek` names."""
        ...

    def remove(self, sequence: Sequence) -> bool:
        """Take out one that is not to run any more; False when it does not wait."""
        ...

    def charge(self, tenant: str, cost: int) -> None:
        """The tenant's tokens have run so many milli-layers."""
        ...


class FirstComeFirstServed:
    """By arrival: one that was preempted stands before all that came later."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda other: other.arrival)

    def peek(self) -> Sequence | None:
        return self._waiting[0] if self._waiting else None

    def pop(self) -> Sequence:
        return self._waiting.pop(0)

    def remove(self, sequence: Sequence) -> bool:
        waits = sequence in self._waiting
        if waits:
            self._waiting.remove(sequence)
        return waits

    def charge(self, tenant: str, cost: int) -> None:
        """Makes no difference here."""
