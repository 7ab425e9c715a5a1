"""The engine on a thread of its own; the server has it in a process."""

import threading
from collections.abc import AsyncGenerator, Callable, Mapping

from buddy_server.engine.engine import Engine
from buddy_server.engine.loop import EngineLoop
from buddy_server.engine.messages import Account, EngineInfo, Event, GenerationRequest, StepStats
from buddy_server.engine.open_requests import OpenRequests
from buddy_server.engine.wire import Cancel, LimitDepth, Report, Stop, Submit


class EngineService:
    """An OwnedEngine (messages.py). `on_step` is called on the engine's thread after every step."""

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        on_step: Callable[[StepStats], None] = lambda _: None,
        settle: Callable[[Account], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._info = info
        self._on_step = on_step
        self._loop = EngineLoop(engine, self._deliver)
        self._requests = OpenRequests(self._send, settle)
        self._thread = threading.Thread(target=self._loop.run, name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive()

    @property
    def ready_in_s(self) -> float:
        return 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._engine.scheduler.fair_share) + self._loop.inbox.qsize()

    @property
    def num_running(self) -> int:
        return len(self._engine.scheduler.running)

    @property
    def kv_usage_ratio(self) -> float:
        return self._engine.scheduler.pool.usage_ratio

    def limit_depth(self, limits: Mapping[str, int]) -> None:
        self._loop.inbox.put(LimitDepth(dict(limits)))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request as cancelled, then the thread. May be called again, and from any thread but its own."""
        self._loop.inbox.put(Stop())
        self._thread.join()

    def submit(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """As EngineClient has it: events until the FinishEvent."""
        return self._requests.events(request)

    def _send(self, order: Submit | Cancel) -> bool:
        self._loop.inbox.put(order)
        # Looked at after the put: what was put before closing is answered by the thread.
        return not self._loop.closed

    def _deliver(self, report: Report) -> None:
        self._requests.deliver(report.events, report.usages)
        if report.stats is not None:
            self._on_step(report.stats)
