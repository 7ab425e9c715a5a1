"""A real uvicorn on a real socket, in a thread."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from buddy_server.api.http_protocol import HttpProtocol

T = TypeVar("T")


class Socket:
    """A listening server whose `app` can be exchanged, as starting one for every test would take long."""

    def __init__(self) -> None:
        self.url = ""
        self.app: ASGIApp | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        self._loop = asyncio.get_running_loop()
        await self.app(scope, receive, send)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, done in the server's event loop, where its connections live. Needs a request before."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)


@contextmanager
def listening() -> Iterator[Socket]:
    """A server on a free port of the loopback, serving whatever app it is given."""
    served = Socket()
    port = socket.socket()
    port.bind(("127.0.0.1", 0))
    served.url = f"http://127.0.0.1:{port.getsockname()[1]}"
    config = uvicorn.Config(
        served, http=HttpProtocol, log_level="warning", ws="none", lifespan="off", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([port],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join(timeout=5)
        port.close()


def wait_until(condition: Callable[[], object], timeout_s: float = 5.0, pause_s: float = 0.005) -> None:
    """Return as soon as `condition` holds; AssertionError when it does not in time. It is asked with pauses between."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(pause_s)
