"""Requests over raw sockets, with minimal work per token, because the client shares its cores with the server."""

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
    """The server, and the model it reports to serve. `api_key` may be empty."""

    url: str
    model: str
    api_key: str = ""

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def request(self, prompt: Tokens, new_tokens: int, budget: float, **others: object) -> bytes:
        """The bytes of a streamed, greedy completion request, on a connection that the server closes afterwards.
        `others` are further fields of its body."""
        fields = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "budget": budget,
            **others,
        }
        body = json.dumps(fields).encode()
        parts = urlsplit(self.url)
        lines = [f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1", f"Host: {parts.netloc}"]
        lines += ["Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        return "\r\n".join([*lines, "", ""]).encode() + body


class Exchange(asyncio.BufferedProtocol):
    """One request on a separate connection. `reads` are the received bytes with their times; reply.py parses them after
    the timing. Times are of time.perf_counter, in seconds; `cut` is true if the bench itself ended the request
    early."""

    def __init__(self, request: bytes) -> None:
        self.sent_s = 0.0
        self.reads: list[tuple[float, bytes]] = []
        self.failure: str | None = None
        self.cut = False
        self._request = request
        # With a plain Protocol, asyncio would allocate 256 KiB at every read, which takes longer than everything else.
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._ended = asyncio.Event()

    async def run(self, target: Target, due_s: float | None = None) -> None:
        """Run until the server closes the connection; `failure` records what goes wrong. With `due_s` the request
        counts as sent then, so that a late client does not make the server look fast."""
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
    """`work`'s result and the CPU seconds it took in this process. Garbage collection is off: it would look like a
    pause of the server."""
    gc.disable()
    try:
        started_s = time.process_time()
        # The server's own kind of event loop, if available.
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
            return runner.run(work), time.process_time() - started_s
    finally:
        gc.enable()


async def closed_loop(target: Target, streams: Sequence[Sequence[bytes]]) -> list[Exchange]:
    """All streams run in parallel; each sends its requests one after another."""
    streams_of_exchanges = [[Exchange(request) for request in stream] for stream in streams]

    async def send(exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            await exchange.run(target)

    await asyncio.gather(*(send(exchanges) for exchanges in streams_of_exchanges))
    return [exchange for exchanges in streams_of_exchanges for exchange in exchanges]


async def open_loop(target: Target, requests: Sequence[bytes], arrivals_s: Sequence[float]) -> list[Exchange]:
    """Sends requests at `arrivals_s` from now, whether or not earlier ones have ended."""
    exchanges = [Exchange(request) for request in requests]
    start_s = time.perf_counter()

    async def send(exchange: Exchange, due_s: float) -> None:
        await asyncio.sleep(due_s - time.perf_counter())
        await exchange.run(target, due_s)

    await asyncio.gather(*(send(one, start_s + at) for one, at in zip(exchanges, arrivals_s, strict=True)))
    return exchanges
