"""Sends a generation as server-sent events."""

import logging
import math
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol

import msgspec
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from buddy_server.api.errors_handler import error_body
from buddy_server.api.generation import Generation
from buddy_server.engine.messages import AnswerEvent
from buddy_server.errors import ApiError, InternalError


class ChunkWriter(Protocol):
    """Turns the events of a generation into the chunks of its stream."""

    def chunks(self, index: int, events: list[AnswerEvent]) -> Iterable[dict[str, Any]]:
        """The chunks for `events` of choice `index`, which arrived together; possibly none."""
        ...

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose client requested usage."""
        ...


_log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 60.0
"""A client that reads nothing for this long has gone; its answer is cancelled."""


class CompletionStream(EventSourceResponse):
    """The streamed response. Cancels the generation if the client disconnects.

    It takes over `life`, the context of the request, and exits it when the stream ends, even before its first byte.
    """

    def __init__(
        self,
        generation: Generation,
        writer: ChunkWriter,
        life: AsyncExitStack,
        headers: Mapping[str, str],
        ping_interval_s: float,
    ) -> None:
        super().__init__(
            _lines(generation, writer),
            headers=dict(headers),
            ping=ping_interval_s,
            send_timeout=SEND_TIMEOUT_S,
            sep="\n",
            # By default every stream is cut off at SIGTERM, but the server decides how long a shutdown may take.
            shutdown_grace_period=math.inf,
        )
        self._life = life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._life:
            await super().__call__(scope, receive, send)


async def _lines(generation: Generation, writer: ChunkWriter) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(generation.events()) as events:
            async for index, together in events:
                # One send for all chunks, because each send costs time.
                if lines := b"".join(map(_data, writer.chunks(index, together))):
                    yield lines
        usage = _data(writer.usage_chunk()) if generation.admitted.body.wants_usage_chunk else b""
        yield usage + b"data: [DONE]\n\n"
    except ApiError as error:
        await generation.fail(error.outcome)
        yield _data(error_body(error))
    except Exception:
        _log.exception("stream failed", extra={"request_id": generation.admitted.request_id})
        await generation.fail("error")
        yield _data(error_body(InternalError()))


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
