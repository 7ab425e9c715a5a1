"""Sends a generation as server-sent events."""

import logging
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing

from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from buddy_server.api.answer_format import AnswerFormat
from buddy_server.api.generation import Generation
from buddy_server.errors import ApiError, InternalError

_log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 60.0
"""A client that reads nothing for this long has gone; its answer is cancelled."""


class AnswerStream(EventSourceResponse):
    """The streamed response. Cancels the generation if the client disconnects.

    It takes over `life`, the context of the request, and exits it when the stream ends, even before its first byte.
    """

    def __init__(
        self,
        generation: Generation,
        answer_format: AnswerFormat,
        life: AsyncExitStack,
        headers: Mapping[str, str],
        ping_interval_s: float,
    ) -> None:
        super().__init__(
            _blocks(generation, answer_format),
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


async def _blocks(generation: Generation, answer_format: AnswerFormat) -> AsyncGenerator[bytes, None]:
    try:
        if opening := answer_format.begin():
            yield opening
        async with aclosing(generation.deltas()) as deltas:
            async for index, delta in deltas:
                if blocks := answer_format.add(index, delta):
                    yield blocks
        yield answer_format.end()
    except ApiError as error:
        await generation.fail(error.outcome)
        yield answer_format.fail(error)
    except Exception:
        _log.exception("stream failed", extra={"request_id": generation.admitted.request_id})
        await generation.fail("error")
        yield answer_format.fail(InternalError())
