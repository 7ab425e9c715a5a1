"""The requests that clients wait for, each with its queue of events on the client's event loop."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass

from buddy_server.engine.messages import Event, FinishEvent, FinishReason, GenerationRequest
from buddy_server.engine.wire import Cancel, Submit

log = logging.getLogger(__name__)

SHUTTING_DOWN = "the server is shutting down"

_Queue = asyncio.Queue[list[Event]]


@dataclass(frozen=True, slots=True)
class _Listener:
    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    events: _Queue


class Listeners:
    """`send` gives an command to the engine, from any thread, and says whether the engine will answer it."""

    def __init__(self, send: Callable[[Submit | Cancel], bool]) -> None:
        self._send = send
        self._listeners: dict[str, _Listener] = {}

    def __len__(self) -> int:
        return len(self._listeners)

    async def events(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """Submit `request`: its events until the FinishEvent, those delivered together as one list. Closing the
        iterator at any point cancels it."""
        listener = _Listener(request, asyncio.get_running_loop(), asyncio.Queue())
        self._listeners[request.request_id] = listener
        ended = False
        try:
            if not self._send(Submit(request)):
                listener.events.put_nowait([unaccounted(request, "cancelled", SHUTTING_DOWN)])
            while not ended:
                events = await listener.events.get()
                ended = isinstance(events[-1], FinishEvent)
                yield events
        finally:
            self._listeners.pop(request.request_id, None)
            if not ended:
                self._send(Cancel(request.request_id))

    def deliver(self, events: Iterable[tuple[str, Event]]) -> None:
        """Hand over events, in order, waking each event loop once. On one thread at a time."""
        by_request: defaultdict[str, list[Event]] = defaultdict(list)
        for request_id, event in events:
            by_request[request_id].append(event)
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Queue, list[Event]]]] = defaultdict(list)
        for request_id, together in by_request.items():
            ended = isinstance(together[-1], FinishEvent)
            listener = self._listeners.pop(request_id, None) if ended else self._listeners.get(request_id)
            if listener is not None:
                by_loop[listener.loop].append((listener.events, together))
        for loop, groups in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, groups)
            except RuntimeError:
                self._forget(loop)

    def end_all(self, reason: FinishReason, message: str) -> None:
        """End every request of which the engine will say nothing more."""
        waiting = list(self._listeners.items())
        self.deliver([(name, unaccounted(heard.request, reason, message)) for name, heard in waiting])

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """The clients' event loop is gone, and the clients with it."""
        for request_id, listener in list(self._listeners.items()):
            if listener.loop is loop:
                log.info("event loop closed", extra={"request_id": request_id})
                self._listeners.pop(request_id, None)
                self._send(Cancel(request_id))


def unaccounted(request: GenerationRequest, reason: FinishReason, message: str) -> FinishEvent:
    """The end of a request of which the engine has no account."""
    return FinishEvent(reason, len(request.prompt_tokens), 0, 0, 0, error=message)


def _put_all(groups: list[tuple[_Queue, list[Event]]]) -> None:
    for queue, together in groups:
        queue.put_nowait(together)
