"""A constraint that always allows the same tokens."""

from collections.abc import Iterable


class FixedMask:
    """`allowed` are bytes, or how many bytes there are without a bit. Remembers what it is told."""

    def __init__(self, allowed: int | Iterable[int]) -> None:
        self._allowed = bytearray(allowed)
        self.accepted: list[int] = []

    def allowed(self) -> bytearray:
        return self._allowed

    def accept(self, token: int) -> None:
        self.accepted.append(token)
