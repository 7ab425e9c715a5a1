"""A generation as server-sent events."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

import anyio
import msgspec
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from buddy_server.api.errors_handler import error_body
from buddy_server.api.generation import Generation
from buddy_server.engine.messages import Event
from buddy_server.errors import ApiError, InternalError
from buddy_server.metrics import RequestMetrics


class ChunkWriter(Protocol):
    """Turns the events of a generation into the chunks of its stream."""

    def chunks(self, index: int, event: Event) -> Iterable[dict[str, Any]]:
        """The chunks that `event` of choice `index` gives."""
        ...

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for usage."""
        ...


_log = logging.getLogger(__name__)


class CompletionStream(EventSourceResponse):
    """The streamed response. A client that leaves cancels the generation.

    It takes over `measured`, entered already, and closes it when the stream ends, even before its first byte.
    """

    def __init__(self, generation: Generation, writer: ChunkWriter, measured: RequestMetrics, ping_interval_s: float):
        super().__init__(
            _together(_lines(generation, writer, measured)),
            ping=ping_interval_s,
            sep="\n",
            # By default every stream is cut at SIGTERM. How long a shutdown may take is the server's to say.
            shutdown_grace_period=math.inf,
        )
        self._measured = measured

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._measured:
            await super().__call__(scope, receive, send)


async def _lines(generation: Generation, writer: ChunkWriter, measured: RequestMetrics) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(generation.events()) as events:
            async for index, event in events:
                for chunk in writer.chunks(index, event):
                    yield _data(chunk)
        if generation.admitted.body.wants_usage_chunk:
            yield _data(writer.usage_chunk())
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        measured.finish(error.outcome)
        yield _data(error_body(error))
    except Exception:
        _log.exception("stream failed", extra={"request_id": generation.admitted.request_id})
        measured.finish("error")
        yield _data(error_body(InternalError()))


async def _together(lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Lines that are there at the same time as one: tokens come in groups, and each thing sent has its price."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    task = asyncio.create_task(_pump(lines, queue))
    try:
        group: list[bytes | None] = [b""]
        while group[-1] is not None:
            group = [await queue.get()]
            while not queue.empty():
                group.append(queue.get_nowait())
            if text := b"".join(line for line in group if line):
                yield text
    finally:
        # A disconnect cancels again at every await; the generation must hear of it all the same.
        with anyio.CancelScope(shield=True):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _pump(lines: AsyncGenerator[bytes, None], queue: "asyncio.Queue[bytes | None]") -> None:
    try:
        async with aclosing(lines):
            async for line in lines:
                queue.put_nowait(line)
    finally:
        queue.put_nowait(None)


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
