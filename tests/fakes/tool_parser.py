"""A made-up format of tool calls: `<name>arguments</>` within text."""

import re

from buddy_server.tools.pieces import CallPiece, Piece, TextPiece


class MarkedCalls:
    """A ToolParser of this format."""

    def __init__(self) -> None:
        self._held_back = ""
        self._num_calls = 0
        self._in_call = False

    def add(self, text: str) -> list[Piece]:
        *parts, self._held_back = re.split(r"(<\w+>|</>|(?=<[^>]*$))", self._held_back + text)
        if not self._held_back.startswith("<"):
            parts, self._held_back = [*parts, self._held_back], ""
        return [piece for part in parts if part for piece in self._pieces(part)]

    def finish(self) -> list[Piece]:
        return [TextPiece(self._held_back)]

    def _pieces(self, part: str) -> list[Piece]:
        if part == "</>":
            self._in_call = False
            return []
        if re.fullmatch(r"<\w+>", part):
            self._in_call = True
            self._num_calls += 1
            return [CallPiece(self._num_calls - 1, part[1:-1], "")]
        return [CallPiece(self._num_calls - 1, None, part) if self._in_call else TextPiece(part)]
