"""The engine in a separate process, which is restarted when it dies."""

import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Set

from buddy_server.engine.messages import (
    Account,
    EngineInfo,
    Event,
    GenerationRequest,
    Served,
    StepStats,
    StepTime,
    Usage,
)
from buddy_server.engine.open_requests import SHUTTING_DOWN, OpenRequests
from buddy_server.engine.settings import EnginePlan
from buddy_server.engine.wire import Cancel, ChargeElsewhere, LimitDepth, LoopCommand, Ready, Report, Stop
from buddy_server.engine.worker_process import TICK_S, WorkerProcess
from buddy_server.errors import EngineStartError

log = logging.getLogger(__name__)

DIED = "the engine's process ended"
STOP_TIMEOUT_S = 2.0
"""How long the child may take for its last step before it is killed."""
STABLE_S = 60.0
"""A child that lived this long is replaced at once; any other after a pause, which doubles each time."""
LONGEST_PAUSE_S = 30.0
HEARTBEAT_TIMEOUT_S = 5.0
"""A child that is silent for this long has stopped or hangs, and is treated like one that died."""
MOST_SERVED = 1000
"""How many pairs of tenant and priority `served` remembers."""


class EngineProcess:
    """An OwnedEngine (messages.py). It takes over `worker`, which has sent `ready`, and closes it.

    On a separate thread, `on_step` is called after every step, `on_restart` for every new process, `note` with the
    usage of open requests, and `settle` once for every request, with its Account.
    """

    def __init__(
        self,
        plan: EnginePlan,
        worker: WorkerProcess,
        ready: Ready,
        on_step: Callable[[StepStats], None] = lambda _: None,
        on_restart: Callable[[], None] = lambda: None,
        settle: Callable[[Account], None] = lambda _: None,
        note: Callable[[list[tuple[str, Usage]]], None] = lambda _: None,
    ) -> None:
        # Later children compute as the first one does, whatever is fastest or can be built by then.
        self._plan = plan.with_arithmetic(ready.info.arithmetic)
        self._ready = ready
        self._on_step = on_step
        self._on_restart = on_restart
        self._requests = OpenRequests(self._send, settle, note)
        self._num_running = 0
        self._kv_usage_ratio = 0.0
        self._queue_s = 0.0
        self._served: Served = {}
        self._waiting_tenants: Set[tuple[str, int]] = frozenset()
        self._step_time = StepTime()
        self._pause_s = 0.0
        self._load_s = worker.load_s
        self._lost_s = 0.0
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        # Guarded by the lock, both for sending to the worker and for marking it as gone.
        self._worker: WorkerProcess | None = worker
        self._limits = LimitDepth({})
        self._thread = threading.Thread(target=self._supervise, args=(worker,), name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._ready.info

    @property
    def is_ready(self) -> bool:
        return self._worker is not None and self._thread.is_alive()

    @property
    def ready_in_s(self) -> float:
        """Estimated from the pause before the next child and the load time of the last one."""
        if self.is_ready:
            return 0.0
        return max(1.0, self._pause_s + self._load_s - (time.monotonic() - self._lost_s))

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while there is none."""
        worker = self._worker
        return None if worker is None else worker.pid

    @property
    def num_waiting(self) -> int:
        """Counted here, to include requests on their way to the child."""
        return max(0, len(self._requests) - self._num_running)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def kv_usage_ratio(self) -> float:
        return self._kv_usage_ratio

    @property
    def queue_s(self) -> float:
        """How long the oldest request that has never run has been waiting, as of the last report; 0 if there is none.
        Requests of a tenant that already has more than its fair share of those that run do not count."""
        return self._queue_s

    @property
    def served(self) -> Mapping[tuple[str, int], int]:
        """Milli-layers that its children have run since the first, by tenant and priority (messages.Served): what the
        accounts of their requests add up to. If there are more than MOST_SERVED, those that were served longest ago
        are forgotten, and begin at 0 when they return."""
        return self._served

    @property
    def waiting_tenants(self) -> Set[tuple[str, int]]:
        """The tenants of which requests wait, with the priority, as of the last report."""
        return self._waiting_tenants

    def charge_elsewhere(self, served: Mapping[tuple[str, int], int], waiting: Set[tuple[str, int]]) -> None:
        """Say what other engines have run since the last call, in milli-layers by tenant and priority, and which
        tenants wait there: fair shares are those of all engines together (FairShare.charge_elsewhere). From any thread;
        without a child it is dropped, as nobody has work here."""
        self._send(ChargeElsewhere(dict(served), frozenset(waiting)))

    def take_step_time(self) -> StepTime:
        """Of the steps since the last call: what the engine makes of the time between two tokens, whatever clients
        do."""
        taken, self._step_time = self._step_time, StepTime()
        return taken

    def limit_depth(self, limits: Mapping[str, int]) -> None:
        """From now on, a token of a tier's requests costs at most its number of milli-layers, by the tier's name; tiers
        that are not named have no limit. Applies to all tokens that have not run yet, and replaces all earlier limits.
        """
        with self._lock:
            self._limits = LimitDepth(dict(limits))
            if self._worker is not None:
                self._worker.send(self._limits)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request as cancelled, then the child. May be called more than once, from any thread but its own."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """As in EngineClient: yields events up to the FinishEvent."""
        return self._requests.events(request)

    def cancel(self, request_id: str) -> None:
        """End a request, whose events are still awaited, with a FinishEvent; it may have ended already."""
        self._send(Cancel(request_id))

    def _send(self, command: LoopCommand) -> bool:
        """Send `command`; returns whether there is a child to answer it."""
        with self._lock:
            if self._worker is not None:
                self._worker.send(command)
            return self._worker is not None

    def _supervise(self, worker: WorkerProcess | None) -> None:
        while worker is not None:
            try:
                self._relay(worker)
            except Exception:
                # A bug must not hang any client, so it ends the child as well.
                log.exception("relaying the engine's events failed")
            self._lose(worker)
            worker = self._replacement()

    def _relay(self, worker: WorkerProcess) -> None:
        """Relay events until the child has ended, is silent for too long, or takes too long to stop."""
        deadline_s, looked_s, silent_s = math.inf, time.monotonic(), 0.0
        for event in worker.events():
            now_s = time.monotonic()
            # Bounded: if this process was paused too, by Ctrl-Z or with its machine, the silence means nothing.
            silent_s = 0.0 if event is not None else silent_s + min(now_s - looked_s, 2 * TICK_S)
            looked_s = now_s
            if isinstance(event, Report):
                self._take(event)
            if deadline_s == math.inf and self._stopping.is_set():
                self._send(Stop())
                deadline_s = now_s + STOP_TIMEOUT_S
            if now_s > deadline_s:
                return
            if silent_s > HEARTBEAT_TIMEOUT_S:
                log.error("engine process is silent", extra={"pid": worker.pid, "seconds": HEARTBEAT_TIMEOUT_S})
                return

    def _take(self, report: Report) -> None:
        self._num_running, self._kv_usage_ratio = report.num_running, report.kv_usage_ratio
        self._queue_s, self._waiting_tenants = report.queue_s, report.waiting_tenants
        if report.served:
            self._count(report.served)
        self._requests.deliver(report.events, report.usages)
        if report.stats is not None:
            self._step_time += report.stats.time
            self._on_step(report.stats)

    def _count(self, served: Served) -> None:
        # A new table: other threads may be reading the old one.
        table = dict(self._served)
        for line, cost in served.items():
            table[line] = table.pop(line, 0) + cost
        while len(table) > MOST_SERVED:
            del table[next(iter(table))]
        self._served = table

    def _lose(self, worker: WorkerProcess) -> None:
        """End the child, if it has not ended yet, and every request it had."""
        with self._lock:
            self._worker = None
        self._lost_s = time.monotonic()
        self._num_running, self._kv_usage_ratio, self._queue_s = 0, 0.0, 0.0
        self._waiting_tenants = frozenset()
        if self._stopping.is_set():
            self._requests.end_all("cancelled", SHUTTING_DOWN)
        else:
            log.error("engine process ended", extra={"status": worker.returncode, "requests": len(self._requests)})
            self._requests.end_all("lost", DIED)
        worker.close()
        if time.monotonic() - worker.started_s > STABLE_S:
            self._pause_s = 0.0

    def _replacement(self) -> WorkerProcess | None:
        """A new child that is ready; None if stopping."""
        while not self._stopping.wait(self._pause_s):
            self._pause_s = min(LONGEST_PAUSE_S, max(1.0, 2 * self._pause_s))
            self._on_restart()
            try:
                worker = self._start_again()
            except Exception as error:
                # Any error is retried: as long as this thread runs, the engine comes back.
                if not self._stopping.is_set():
                    expected = isinstance(error, (EngineStartError, OSError))
                    log.error("engine does not start again", extra={"reason": error}, exc_info=not expected)
                continue
            self._load_s = worker.load_s
            with self._lock:
                self._worker = worker
                worker.send(self._limits)
            log.info("engine ready again", extra={"pid": worker.pid})
            return worker
        return None

    def _start_again(self) -> WorkerProcess:
        worker = WorkerProcess(self._plan)
        if worker.wait_until_ready(self._stopping.is_set) != self._ready:
            worker.close()
            # The tokenizer and what clients have been sent belong to the previous model.
            raise EngineStartError("the model or its router has changed; start the server again to serve it")
        return worker
