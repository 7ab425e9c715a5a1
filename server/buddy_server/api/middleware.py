"""What wraps every request: ids, timing, the fallback for errors, the size limit.

Pure ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnect from the endpoint.
"""

import logging
import re
import time
import uuid

from anyio import fail_after
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from buddy_server.api.errors_handler import render_error
from buddy_server.errors import BodyTooLarge, BodyTooSlow, InternalError

_log = logging.getLogger(__name__)

_MAX_REQUEST_ID_CHARS = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._-]")


class RequestContext:
    """Gives each request its x-request-id (the client's, cleaned, or a new one) and adds openai-processing-ms.

    Answers an unforeseen exception with a 500 in the usual format; the traceback goes only to the log.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        response_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal response_started
            if message["type"] == "http.response.start":
                response_started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - started) * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            _log.exception("request failed", extra={"request_id": request_id})
            if response_started:
                # No valid response can follow half of another; the server closes the connection.
                raise
            await render_error(InternalError())(scope, receive, send_with_headers)


class BodyLimit:
    """Refuses bodies over `max_bytes`, whether announced by content-length or not, and bodies that stop arriving for
    `max_pause_s`.

    Raises BodyTooLarge or BodyTooSlow inside the app, where the error handler renders it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_pause_s: float):
        self._app = app
        self._max_bytes = max_bytes
        self._max_pause_s = max_pause_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        num_bytes = int(announced) if announced.isascii() and announced.isdigit() else 0
        is_complete = False

        async def receive_limited() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            if num_bytes > self._max_bytes:
                raise BodyTooLarge(self._max_bytes)
            try:
                with fail_after(self._max_pause_s):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(self._max_pause_s) from None
            is_complete = not message.get("more_body", False)
            if not announced:
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise BodyTooLarge(self._max_bytes)
            return message

        await self._app(scope, receive_limited, send)


def _request_id(given: str | None) -> str:
    cleaned = _NOT_IN_REQUEST_ID.sub("", given or "")[:_MAX_REQUEST_ID_CHARS]
    return cleaned or f"req_{uuid.uuid4().hex}"
