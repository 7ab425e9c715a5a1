"""The engine's replicas as one engine, for the ingress."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextvars import Context
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

from prometheus_client import Metric
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from buddy_server.engine.messages import Account, EngineInfo, Event, GenerationRequest, StepTime, Usage
from buddy_server.engine.open_requests import SHUTTING_DOWN, OpenRequests
from buddy_server.engine.wire import Cancel, Ready, Submit
from buddy_server.replicas.wire import ReplicaState, decode_progress, decode_state

log = logging.getLogger(__name__)

OBSERVE_EVERY_S = 0.25
ANSWER_TIMEOUT_S = 2.0
CANCEL_AGAIN_S = 0.05
IDLE_LOOK_S = 0.05
STOP_TIMEOUT_S = 2.0
READY_IN_S = 5.0
"""What clients are told when no replica is there: nobody knows how long Ray takes to start one."""
LOST = "the replica of the engine was lost"


class EngineReplicas:
    """An OwnedEngine (engine/messages.py) over the deployment of EngineReplica, of which every replica serves what
    `ready` describes. `settle` and `note` are called on the event loop, as EngineProcess calls them on a thread."""

    def __init__(
        self,
        deployment: DeploymentHandle,
        ready: Ready,
        settle: Callable[[Account], None],
        note: Callable[[list[tuple[str, Usage]]], None],
    ) -> None:
        self._deployment = deployment
        self._generate = deployment.generate.options(stream=True)
        self._info = ready.info
        self._requests = OpenRequests(self._send, settle, note)
        self._states: list[ReplicaState] = []
        self._step_time = StepTime()
        self._limits: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_draining = self._is_stopped = False

    @property
    def info(self) -> EngineInfo:
        """Of one replica, but the sequences are those that all of them run side by side."""
        return replace(self._info, max_sequences=self._info.max_sequences * max(1, len(self._states)))

    @property
    def is_ready(self) -> bool:
        return not self._is_draining and any(state.is_ready for state in self._states)

    @property
    def ready_in_s(self) -> float:
        return 0.0 if self.is_ready else READY_IN_S

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._requests) - self.num_running)

    @property
    def num_running(self) -> int:
        return sum(state.num_running for state in self._states)

    @property
    def kv_usage_ratio(self) -> float:
        """The mean."""
        return sum(state.kv_usage_ratio for state in self._states) / max(1, len(self._states))

    @property
    def queue_s(self) -> float:
        """The longest."""
        return max((state.queue_s for state in self._states), default=0.0)

    def take_inter_token_s(self) -> float:
        taken, self._step_time = self._step_time, StepTime()
        return taken.mean_s

    def limit_depth(self, limits: Mapping[str, int]) -> None:
        """Replicas hear of it when they are observed next, new ones too."""
        self._limits = dict(limits)

    def submit(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        return self._requests.events(request)

    def start(self) -> None:
        """In the event loop."""
        self._loop = asyncio.get_running_loop()
        self._spawn(self._observe())

    def stop(self) -> None:
        """As in OwnedEngine; from any thread but the event loop's. Replicas stay; Ray Serve ends them."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()

    async def drain(self, grace_period_s: float) -> None:
        """Take no more work, and return when what there is has ended: by itself within the grace period, or as
        cancelled."""
        self._is_draining = True
        await self._wait_until_idle(grace_period_s)
        await self._stop()

    async def _stop(self) -> None:
        for name in self._requests:
            self._send(Cancel(name))
        await self._wait_until_idle(STOP_TIMEOUT_S)
        self._is_stopped = True
        self._requests.end_all("cancelled", SHUTTING_DOWN)

    async def _wait_until_idle(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        # Once in the life of the server; not worth a signal.
        while len(self._requests) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(IDLE_LOOK_S)

    async def metrics(self) -> list[tuple[str, list[Metric]]]:
        """The name and the metrics of every replica; of none, if one of them does not answer."""
        try:
            return await self._ask_all("measure")
        except TimeoutError:
            log.warning("no metrics of replicas", extra={"timeout_s": ANSWER_TIMEOUT_S})
            return []

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # In a context of its own: in that of an HTTP request, Ray Serve gives all calls of its choices one id, and then
        # takes them for one call.
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, command: Submit | Cancel) -> bool:
        match command:
            case Submit(request):
                self._spawn(self._follow(request))
            case Cancel(request_id):
                self._spawn(self._cancel(request_id))
        return True

    async def _follow(self, request: GenerationRequest) -> None:
        """Pass on what a replica says of `request`, to its end or the replica's."""
        name = request.request_id
        try:
            async for message in self._generate.remote(request, self._info.system_fingerprint):
                progress = decode_progress(message)
                usages = [] if progress.usage is None else [(name, progress.usage)]
                self._requests.deliver([(name, event) for event in progress.events], usages)
        except Exception as error:
            # Whatever went wrong, its client must hear.
            log.error("request lost", extra={"request_id": name, "reason": _first_line(error)})
        finally:
            self._requests.end([name], "lost", LOST)

    async def _cancel(self, name: str) -> None:
        """The router sends it to where the request is. A request on its way there is asked for again."""
        while name in self._requests:
            try:
                if await self._deployment.cancel.remote(name):
                    return
            except Exception as error:
                log.warning("not cancelled", extra={"request_id": name, "reason": _first_line(error)})
            await asyncio.sleep(CANCEL_AGAIN_S)

    async def _observe(self) -> None:
        # Not cancelled: Ray would leave a future behind, and the log would complain.
        while not self._is_stopped:
            try:
                self._states = [decode_state(answer) for answer in await self._ask_all("observe", self._limits)]
                self._step_time = reduce(add, (state.step_time for state in self._states), self._step_time)
            except TimeoutError:
                # One of them hangs, until Ray Serve replaces it; the others are as they were.
                log.warning("a replica does not answer", extra={"timeout_s": ANSWER_TIMEOUT_S})
            except Exception:
                log.exception("replicas not observed")
            await asyncio.sleep(OBSERVE_EVERY_S)

    async def _ask_all(self, method: str, *arguments: object) -> list[Any]:
        """The answers of all replicas that are alive. Raises TimeoutError if any of them does not answer."""
        try:
            asked = self._deployment.broadcast(method, *arguments)
            answers = await asked.results_async(timeout_s=ANSWER_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
