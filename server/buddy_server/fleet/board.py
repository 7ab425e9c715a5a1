"""Where the members of a fleet leave their entries for each other."""

from collections.abc import Collection
from typing import Protocol


class Board(Protocol):
    """All methods may raise BoardUnreachable."""

    async def exchange(self, name: str, entry: bytes) -> dict[str, bytes]:
        """Put the entry of the member `name` in place of its last one. Returns the entries of all members, by name."""
        ...

    async def remove(self, names: Collection[str]) -> None:
        """Forget members that have gone."""
        ...

    async def close(self) -> None: ...


class MemoryBoard:
    """For members in one process."""

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}

    async def exchange(self, name: str, entry: bytes) -> dict[str, bytes]:
        self._entries[name] = entry
        return dict(self._entries)

    async def remove(self, names: Collection[str]) -> None:
        for name in names:
            self._entries.pop(name, None)

    async def close(self) -> None: ...
