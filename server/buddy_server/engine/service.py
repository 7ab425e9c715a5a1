"""The engine on a thread of its own, seen from asyncio: `submit` yields a request's events."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from buddy_server.engine.depth_predictor import DepthPredictor
from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import EngineInfo, Event, FinishEvent, FinishReason, GenerationRequest, StepStats

log = logging.getLogger(__name__)

STEP_FAILED = "the engine failed while generating"
SHUTTING_DOWN = "the server is shutting down"


@dataclass(frozen=True, slots=True)
class _Submit:
    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Event]"


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class EngineService:
    """An EngineClient (messages.py). `on_step` is called on the engine's thread after every step."""

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        on_step: Callable[[StepStats], None] = lambda _: None,
        depth_predictor: DepthPredictor | None = None,
    ) -> None:
        self._engine = engine
        self._info = info
        self._depth_predictor = depth_predictor
        self._on_step = on_step
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._listeners: dict[str, _Submit] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return len(self._engine.scheduler.waiting) + self._inbox.qsize()

    @property
    def num_running(self) -> int:
        return len(self._engine.scheduler.running)

    @property
    def kv_usage_ratio(self) -> float:
        return self._engine.scheduler.pool.usage_ratio

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request as cancelled, then the thread. May be called again, and from any thread but its own."""
        self._inbox.put(_Stop())
        self._thread.join()

    async def predict_depth(self, prompt_tokens: tuple[int, ...], lowest: int, highest: int) -> int | None:
        """On a thread of its own: a long prompt takes a moment."""
        if self._depth_predictor is None:
            return None
        return await asyncio.to_thread(self._depth_predictor.choose, prompt_tokens, lowest, highest)

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Events until the FinishEvent. Closing the iterator at any point cancels the request."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._inbox.put(_Submit(request, asyncio.get_running_loop(), events))
        if self._closed:
            # Looked at after the put: what was put before closing is answered by the thread.
            events.put_nowait(_unaccounted(request, "cancelled", SHUTTING_DOWN))
        event: Event | None = None
        try:
            while not isinstance(event, FinishEvent):
                event = await events.get()
                yield event
        finally:
            if not isinstance(event, FinishEvent):
                self._inbox.put(_Cancel(request.request_id))

    def _run(self) -> None:
        try:
            while self._take_messages():
                if self._engine.has_work:
                    self._step()
                else:
                    self._engine.scheduler.check_idle()
        finally:
            self._closed = True
            while not self._inbox.empty():
                message = self._inbox.get()
                if isinstance(message, _Submit):
                    self._listeners[message.request.request_id] = message
            self._end_all("cancelled", SHUTTING_DOWN)

    def _step(self) -> None:
        try:
            output = self._engine.step()
            self._deliver(output.events)
            self._on_step(output.stats)
        except Exception:
            # A bug must not hang anyone: everybody in flight gets an answer, the next request a fresh start.
            log.exception("engine step failed")
            self._end_all("error", STEP_FAILED)

    def _end_all(self, reason: FinishReason, message: str) -> None:
        self._deliver(self._engine.end_all(reason, message))
        # The engine knows nothing, or nothing more, of those whose last event was lost in a step that failed.
        self._deliver([(name, _unaccounted(heard.request, reason, message)) for name, heard in self._listeners.items()])

    def _take_messages(self) -> bool:
        """Act on what has arrived, waiting for something when there is nothing to do; False to stop."""
        wait = not self._engine.has_work
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            wait = False
            match message:
                case _Submit():
                    self._add(message)
                case _Cancel():
                    self._listeners.pop(message.request_id, None)
                    self._engine.cancel(message.request_id)
                case _Stop():
                    return False
        return True

    def _add(self, message: _Submit) -> None:
        self._listeners[message.request.request_id] = message
        try:
            self._engine.add(message.request)
        except Exception:
            log.exception("engine refused a request", extra={"request_id": message.request.request_id})
            self._deliver([(message.request.request_id, _unaccounted(message.request, "error", STEP_FAILED))])

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        for request_id, event in events:
            listener = self._listeners.get(request_id)
            if listener is None:
                continue
            if isinstance(event, FinishEvent):
                del self._listeners[request_id]
            try:
                listener.loop.call_soon_threadsafe(listener.events.put_nowait, event)
            except RuntimeError:
                # The client's event loop is gone, and the client with it.
                log.info("event loop closed", extra={"request_id": request_id})
                self._listeners.pop(request_id, None)
                self._engine.cancel(request_id)


def _unaccounted(request: GenerationRequest, reason: FinishReason, message: str) -> FinishEvent:
    """The end of a request of which the engine has no account."""
    return FinishEvent(reason, len(request.prompt_tokens), 0, 0, 0, error=message)
