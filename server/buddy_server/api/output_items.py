"""The items in the output of /v1/responses: each tells by events how it grows, and has all of it in its body."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol

from buddy_server.tools.pieces import CallPiece, Piece, TextPiece

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ItemEvent = dict[str, Any]


class OutputItem(Protocol):
    def takes(self, piece: Piece) -> bool:
        """Whether `piece` continues this item."""
        ...

    def open(self) -> Iterator[ItemEvent]: ...

    def add(self, piece: Piece, entries: list[dict[str, Any]]) -> Iterator[ItemEvent]:
        """Continue with `piece`; `entries` are the log probabilities of its tokens."""
        ...

    def close(self, status: ItemStatus) -> Iterator[ItemEvent]: ...

    def body(self, status: ItemStatus) -> dict[str, Any]: ...


class MessageItem:
    """A message of one part, a text."""

    def __init__(self, item_id: str, position: int) -> None:
        self._id = item_id
        self._position = position
        self._texts: list[str] = []
        self._entries: list[dict[str, Any]] = []

    def takes(self, piece: Piece) -> bool:
        return isinstance(piece, TextPiece)

    def open(self) -> Iterator[ItemEvent]:
        yield _item_event("added", self._position, self.body("in_progress") | {"content": []})
        yield self._event("response.content_part.added", part=self._part())

    def add(self, piece: Piece, entries: list[dict[str, Any]]) -> Iterator[ItemEvent]:
        assert isinstance(piece, TextPiece)
        self._texts.append(piece.text)
        self._entries += entries
        yield self._event("response.output_text.delta", delta=piece.text, logprobs=entries)

    def close(self, status: ItemStatus) -> Iterator[ItemEvent]:
        part = self._part()
        yield self._event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._event("response.content_part.done", part=part)
        yield _item_event("done", self._position, self.body(status))

    def body(self, status: ItemStatus) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": "".join(self._texts),
            "annotations": [],
            "logprobs": self._entries.copy(),
        }

    def _event(self, kind: str, **fields: object) -> ItemEvent:
        return {"type": kind, "item_id": self._id, "output_index": self._position, "content_index": 0, **fields}


class CallItem:
    """A call of a function, which begins with `first`."""

    def __init__(self, item_id: str, position: int, call_id: str, first: CallPiece) -> None:
        self._id = item_id
        self._position = position
        self._call_id = call_id
        self._first = first
        self._arguments: list[str] = []

    def takes(self, piece: Piece) -> bool:
        return isinstance(piece, CallPiece) and piece.index == self._first.index

    def open(self) -> Iterator[ItemEvent]:
        yield _item_event("added", self._position, self.body("in_progress"))

    def add(self, piece: Piece, _entries: list[dict[str, Any]]) -> Iterator[ItemEvent]:
        assert isinstance(piece, CallPiece)
        if piece.arguments:
            self._arguments.append(piece.arguments)
            yield self._event("response.function_call_arguments.delta", delta=piece.arguments)

    def close(self, status: ItemStatus) -> Iterator[ItemEvent]:
        body = self.body(status)
        yield self._event("response.function_call_arguments.done", name=body["name"], arguments=body["arguments"])
        yield _item_event("done", self._position, body)

    def body(self, status: ItemStatus) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._first.name,
            "arguments": "".join(self._arguments),
        }

    def _event(self, kind: str, **fields: object) -> ItemEvent:
        return {"type": kind, "item_id": self._id, "output_index": self._position, **fields}


def _item_event(what: str, position: int, body: dict[str, Any]) -> ItemEvent:
    return {"type": f"response.output_item.{what}", "output_index": position, "item": body}
