"""The sequences that wait for a lane and blocks, and the order in which they run."""

from bisect import insort
from typing import Protocol

from buddy_server.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """An order of service. The scheduler takes sequences from the front and reports what each tenant has run."""

    def __len__(self) -> int: ...

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that has arrived or was preempted."""
        ...

    def peek(self) -> Sequence | None:
        """The sequence to run next; None if none waits."""
        ...

    def pop(self) -> Sequence:
        """Remove and return the sequence that `peek` returns."""
        ...

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence that should no longer run; False if it does not wait."""
        ...

    def charge(self, tenant: str, cost: int) -> None:
        """Record that the tenant's tokens ran `cost` milli-layers."""
        ...


class FirstComeFirstServed:
    """In order of arrival: a preempted sequence goes before all later ones."""

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
        """Has no effect here."""
