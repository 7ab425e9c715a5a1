"""What an endpoint decides about its answers: how they look as one body, and as the blocks of a stream."""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from buddy_server.api.fold import Delta
from buddy_server.errors import ApiError


class AnswerFormat(Protocol):
    """Renders one generation, either by `body` alone or by the other methods in this order. They return whole blocks of
    server-sent events, or nothing."""

    def body(self, answers: Sequence[Delta]) -> dict[str, Any]:
        """The body of a response that is not streamed, from all answers, each whole."""
        ...

    def begin(self) -> bytes: ...

    def add(self, index: int, delta: Delta) -> bytes:
        """The blocks for the next `delta` of answer `index`."""
        ...

    def end(self) -> bytes: ...

    def fail(self, error: ApiError) -> bytes:
        """The last blocks of a stream that ends with an error, in place of `end`."""
        ...


def data_block(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
