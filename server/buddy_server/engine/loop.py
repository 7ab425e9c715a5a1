"""The engine's loop: takes commands, steps, reports. The same on a thread (service.py) and in a process (worker.py)."""

import logging
import queue
from collections.abc import Callable

from buddy_server.engine.engine import Engine
from buddy_server.engine.listeners import SHUTTING_DOWN, unaccounted
from buddy_server.engine.messages import Event, FinishEvent, FinishReason, GenerationRequest, StepStats
from buddy_server.engine.wire import Cancel, LoopCommand, Report, Stop, Submit

log = logging.getLogger(__name__)

STEP_FAILED = "the engine failed while generating"


class EngineLoop:
    """Commands come through `inbox`, from any thread. `deliver` is called on the loop's thread, after every step and
    whenever requests end without one. Every request that was put before `closed` ends once."""

    def __init__(self, engine: Engine, deliver: Callable[[Report], None]) -> None:
        self.inbox: queue.SimpleQueue[LoopCommand] = queue.SimpleQueue()
        self.closed = False
        self._engine = engine
        self._deliver = deliver
        self._open: dict[str, GenerationRequest] = {}

    def run(self) -> None:
        """Until Stop."""
        try:
            while self._handle_commands():
                if self._engine.has_work:
                    self._step()
                else:
                    self._engine.scheduler.check_idle()
                    self._report([])
        finally:
            self.closed = True
            while not self.inbox.empty():
                command = self.inbox.get()
                if isinstance(command, Submit):
                    self._open[command.request.request_id] = command.request
            self._end_all("cancelled", SHUTTING_DOWN)

    def _step(self) -> None:
        try:
            output = self._engine.step()
            self._report(output.events, output.stats)
        except Exception:
            # A bug must not hang anyone: everybody in flight gets an answer, the next request a fresh start.
            log.exception("engine step failed")
            self._end_all("error", STEP_FAILED)

    def _handle_commands(self) -> bool:
        """Act on what has arrived, waiting for something when there is nothing to do; False to stop."""
        wait = not self._engine.has_work
        while wait or not self.inbox.empty():
            command = self.inbox.get()
            wait = False
            match command:
                case Submit():
                    self._add(command.request)
                case Cancel():
                    self._open.pop(command.request_id, None)
                    self._engine.cancel(command.request_id)
                case Stop():
                    return False
        return True

    def _add(self, request: GenerationRequest) -> None:
        self._open[request.request_id] = request
        try:
            self._engine.add(request)
        except Exception:
            log.exception("engine refused a request", extra={"request_id": request.request_id})
            self._report([(request.request_id, unaccounted(request, "error", STEP_FAILED))])

    def _end_all(self, reason: FinishReason, message: str) -> None:
        self._report(self._engine.end_all(reason, message))
        # The engine knows nothing, or nothing more, of those whose last event was lost in a step that failed.
        self._report([(name, unaccounted(request, reason, message)) for name, request in self._open.items()])

    def _report(self, events: list[tuple[str, Event]], stats: StepStats | None = None) -> None:
        scheduler = self._engine.scheduler
        self._deliver(Report(events, stats, len(scheduler.running), scheduler.pool.usage_ratio))
        for request_id, event in events:
            if isinstance(event, FinishEvent):
                self._open.pop(request_id, None)
