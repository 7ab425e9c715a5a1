"""What an answer consists of when its request has tools: text and calls, in pieces as they arrive."""

from typing import Protocol

from msgspec import Struct


class TextPiece(Struct, frozen=True):
    text: str


class CallPiece(Struct, frozen=True):
    """A piece of the call number `index` of an answer. Only a call's first piece has a `name`; `arguments` is the next
    part of its JSON text."""

    index: int
    name: str | None
    arguments: str


Piece = TextPiece | CallPiece


class ToolParser(Protocol):
    """Finds the calls in the text of one answer."""

    def add(self, text: str) -> list[Piece]:
        """The pieces that are certain once `text` has followed the earlier texts, wherever they were cut."""
        ...

    def finish(self) -> list[Piece]:
        """The pieces held back until now; the answer has ended."""
        ...
