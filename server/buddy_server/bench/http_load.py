"""Requests over raw sockets: next to nothing is done at a token, as the client shares its cores with the server."""

import asyncio
import gc
import json
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from uvicorn.loops.auto import auto_loop_factory

from buddy_server.bench.contender import Tokens

REQUEST_TIMEOUT_S = 600
READ_BYTES = 16 * 1024
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and the model that it says it serves. `api_key` may be empty."""

    url: str
    model: str
    api_key: str = ""

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def request(self, prompt: Tokens, new_tokens: int, budget: float) -> bytes:
        """A streamed, greedy completion as it goes over the wire, on a connection that the server closes after it."""
        fields = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "budget": budget,
        }
        body = json.dumps(fields).encode()
        parts = urlsplit(self.url)
        lines = [f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1", f"Host: {parts.netloc}"]
        lines += ["Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        return "\r\n".join([*lines, "", ""]).encode() + body


class Exchange(asyncio.BufferedProtocol):
    """One request on a connection of its own. `reads` are what came and when; reply.py takes them apart once nothing is
    timed any more. Times are of time.perf_counter, in seconds; `cut` says that the bench itself ended it early."""

    def __init__(self, request: bytes) -> None:
        self.sent_s = 0.0
        self.reads: list[tuple[float, bytes]] = []
        self.failure: str | None = None
        self.cut = False
        self._request = request
        # A plain Protocol would have asyncio set aside 256 KiB at every read, which takes longer than all the rest.
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._ended = asyncio.Event()

    async def run(self, target: Target, due_s: float | None = None) -> None:
        """Until the server closes the connection; what goes wrong is kept in `failure`. With `due_s` it counts as sent
        then, so that a late client does not make the server look fast."""
        self.sent_s = time.perf_counter() if due_s is None else due_s
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                transport, _ = await loop.create_connection(lambda: self, *target.address)
                transport.write(self._request)
                await self._ended.wait()
        except TimeoutError:
            self.failure = f"no end within {REQUEST_TIMEOUT_S} s"
        except OSError as error:
            self.failure = f"no connection: {error}"
        except asyncio.CancelledError:
            self.cut = True
            raise
        finally:
            if transport is not None:
                transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.reads.append((time.perf_counter(), bytes(self._buffer[:nbytes])))

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self.failure = f"connection lost: {error}"
        self._ended.set()


def run_undisturbed(work: Coroutine[None, None, T]) -> tuple[T, float]:
    """`work`'s result and the CPU seconds that it took here. Garbage waits: a sweep would show as a pause of the
    server."""
    gc.disable()
    try:
        started_s = time.process_time()
        # The server's own kind of loop, where it can be had.
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
            return runner.run(work), time.process_time() - started_s
    finally:
        gc.enable()


async def closed_loop(target: Target, streams: Sequence[Sequence[bytes]]) -> list[Exchange]:
    """Every stream sends its requests one after the other, all streams side by side."""
    streams_of_exchanges = [[Exchange(request) for request in stream] for stream in streams]

    async def send(exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            await exchange.run(target)

    await asyncio.gather(*(send(exchanges) for exchanges in streams_of_exchanges))
    return [exchange for exchanges in streams_of_exchanges for exchange in exchanges]


async def open_loop(target: Target, requests: Sequence[bytes], arrivals_s: Sequence[float]) -> list[Exchange]:
    """Requests sent at `arrivals_s` from now on, whether or not earlier ones have ended."""
    exchanges = [Exchange(request) for request in requests]
    start_s = time.perf_counter()

    async def send(exchange: Exchange, due_s: float) -> None:
        await asyncio.sleep(due_s - time.perf_counter())
        await exchange.run(target, due_s)

    await asyncio.gather(*(send(one, start_s + at) for one, at in zip(exchanges, arrivals_s, strict=True)))
    return exchanges
