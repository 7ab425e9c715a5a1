"""The engine in a process of its own, which is started again when it dies."""

import asyncio
import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable

from buddy_server.engine.listeners import SHUTTING_DOWN, Listeners
from buddy_server.engine.messages import EngineInfo, Event, GenerationRequest, StepStats
from buddy_server.engine.settings import EnginePlan
from buddy_server.engine.wire import Cancel, PredictDepth, PredictedDepth, Ready, Report, Stop, Submit, WorkerEvent
from buddy_server.engine.worker_process import WorkerProcess
from buddy_server.errors import EngineStartError

log = logging.getLogger(__name__)

DIED = "the engine's process ended"
STOP_TIMEOUT_S = 2.0
"""How long the child may take over its last step; then it is killed."""
STABLE_S = 60.0
"""A child that lived as long is replaced at once, another after a pause, which doubles from time to time."""
LONGEST_PAUSE_S = 30.0


class EngineProcess:
    """An OwnedEngine (messages.py). It takes over `worker`, of which `ready` came, and closes it.

    `on_step` is called after every step and `on_restart` for every new process, on a thread of its own.
    """

    def __init__(
        self,
        plan: EnginePlan,
        worker: WorkerProcess,
        ready: Ready,
        on_step: Callable[[StepStats], None] = lambda _: None,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._plan = plan
        self._ready = ready
        self._on_step = on_step
        self._on_restart = on_restart
        self._listeners = Listeners(self._send)
        self._questions: dict[int, asyncio.Future[int | None]] = {}
        self._question_ids = itertools.count()
        self._num_running = 0
        self._kv_usage_ratio = 0.0
        self._pause_s = 0.0
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        # Under the lock: to send to it, or to say that nobody is there.
        self._worker: WorkerProcess | None = worker
        self._thread = threading.Thread(target=self._supervise, args=(worker,), name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._ready.info

    @property
    def is_ready(self) -> bool:
        return self._worker is not None and self._thread.is_alive()

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        worker = self._worker
        return None if worker is None else worker.pid

    @property
    def num_waiting(self) -> int:
        """Counted here, so that those on their way to the child are among them."""
        return max(0, len(self._listeners) - self._num_running)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def kv_usage_ratio(self) -> float:
        return self._kv_usage_ratio

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request as cancelled, then the child. May be called again, and from any thread but its own."""
        self._stopping.set()
        self._thread.join()

    def submit(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """As EngineClient has it: events until the FinishEvent."""
        return self._listeners.events(request)

    async def predict_depth(self, prompt_tokens: tuple[int, ...], lowest: int, highest: int) -> int | None:
        """Layers for a prompt, as EngineClient has it."""
        if not self._ready.has_predictor:
            return None
        question_id = next(self._question_ids)
        answer = self._questions[question_id] = asyncio.get_running_loop().create_future()
        try:
            if not self._send(PredictDepth(question_id, prompt_tokens, lowest, highest)):
                return None
            return await answer
        finally:
            del self._questions[question_id]

    def _send(self, command: Submit | Cancel | PredictDepth | Stop) -> bool:
        """Whether there is a child to answer."""
        with self._lock:
            if self._worker is not None:
                self._worker.send(command)
            return self._worker is not None

    def _supervise(self, worker: WorkerProcess | None) -> None:
        while worker is not None:
            try:
                self._relay(worker)
            except Exception:
                # A bug must not hang anyone, so it ends the child as well.
                log.exception("relaying the engine's events failed")
            self._lose(worker)
            worker = self._replacement()

    def _relay(self, worker: WorkerProcess) -> None:
        """Until the child has ended, or has been told to and took too long over it."""
        deadline_s = math.inf
        for event in worker.events():
            self._take(event)
            if deadline_s == math.inf and self._stopping.is_set():
                self._send(Stop())
                deadline_s = time.monotonic() + STOP_TIMEOUT_S
            if time.monotonic() > deadline_s:
                return

    def _take(self, event: WorkerEvent | None) -> None:
        match event:
            case Report():
                self._num_running, self._kv_usage_ratio = event.num_running, event.kv_usage_ratio
                self._listeners.deliver(event.events)
                if event.stats is not None:
                    self._on_step(event.stats)
            case PredictedDepth():
                self._answer(event.question_id, event.num_run_layers)

    def _lose(self, worker: WorkerProcess) -> None:
        """The child has ended, or is ended here: so does every request that it had."""
        with self._lock:
            self._worker = None
        self._num_running, self._kv_usage_ratio = 0, 0.0
        if self._stopping.is_set():
            self._listeners.end_all("cancelled", SHUTTING_DOWN)
        else:
            log.error("engine process ended", extra={"status": worker.returncode, "requests": len(self._listeners)})
            self._listeners.end_all("error", DIED)
        for question_id in list(self._questions):
            self._answer(question_id, None)
        worker.close()
        if time.monotonic() - worker.started_s > STABLE_S:
            self._pause_s = 0.0

    def _replacement(self) -> WorkerProcess | None:
        """A new child that is ready; None when stopping."""
        while not self._stopping.wait(self._pause_s):
            self._pause_s = min(LONGEST_PAUSE_S, max(1.0, 2 * self._pause_s))
            self._on_restart()
            try:
                worker = self._start_again()
            except Exception as error:
                # Whatever it is: while this thread goes on, there will be an engine again.
                if not self._stopping.is_set():
                    expected = isinstance(error, (EngineStartError, OSError))
                    log.error("engine does not start again", extra={"reason": error}, exc_info=not expected)
                continue
            with self._lock:
                self._worker = worker
            log.info("engine ready again", extra={"pid": worker.pid})
            return worker
        return None

    def _start_again(self) -> WorkerProcess:
        worker = WorkerProcess(self._plan)
        if worker.wait_until_ready(self._stopping.is_set) != self._ready:
            worker.close()
            # The tokenizer and what clients were told belong to the model of before.
            raise EngineStartError("the model or its router has changed; start the server again to serve it")
        return worker

    def _answer(self, question_id: int, num_run_layers: int | None) -> None:
        answer = self._questions.get(question_id)
        if answer is not None:
            # An event loop that is closed has nobody left to ask.
            with contextlib.suppress(RuntimeError):
                answer.get_loop().call_soon_threadsafe(_settle, answer, num_run_layers)


def _settle(answer: "asyncio.Future[int | None]", num_run_layers: int | None) -> None:
    if not answer.done():
        answer.set_result(num_run_layers)
