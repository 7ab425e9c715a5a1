"""The engine's replicas as one engine, for the ingress."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context
from dataclasses import replace
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from buddy_server.engine.messages import Account, EngineInfo, Event, GenerationRequest, Usage
from buddy_server.engine.open_requests import SHUTTING_DOWN, OpenRequests
from buddy_server.engine.wire import Cancel, Ready, Submit
from buddy_server.fleet.entry import EngineReport
from buddy_server.fleet.member import FleetMember
from buddy_server.replicas.wire import STAY_S, decode_progress, is_of_version

log = logging.getLogger(__name__)

CANCEL_AGAIN_S = 0.05
IDLE_LOOK_S = 0.05
STOP_TIMEOUT_S = 2.0
READY_IN_S = 5.0
"""What clients are told when no replica is there: nobody knows how long Ray takes to start one."""
LOST = "the replica of the engine was lost"


class EngineReplicas:
    """An OwnedEngine (engine/messages.py) over the deployment of EngineReplica, of which every replica of `version`
    serves what `ready` describes. This ingress is a `member` of the fleet, as replicas are. `settle` and `note` are
    called on the event loop, as EngineProcess calls them on a thread."""

    def __init__(
        self,
        deployment: DeploymentHandle,
        version: str,
        ready: Ready,
        member: FleetMember,
        settle: Callable[[Account], None],
        note: Callable[[list[tuple[str, Usage]]], None],
    ) -> None:
        self._deployment = deployment
        self._version = version
        self._generate = deployment.generate.options(stream=True)
        self._info = ready.info
        self._member = member
        self._requests = OpenRequests(self._send, settle, note)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_draining = False

    @property
    def info(self) -> EngineInfo:
        """Of one replica, but the sequences are this ingress's share of those that all replicas run side by side."""
        places = sum(engine.max_sequences for engine in self._engines.values())
        num_ingresses = sum(is_of_version(name, self._version) for name in self._member.fleet.deciders)
        share = places // max(1, num_ingresses)
        return replace(self._info, max_sequences=max(self._info.max_sequences, share))

    @property
    def is_ready(self) -> bool:
        # While the board is away, nobody knows of replicas that have come, and Ray Serve finds them.
        return not self._is_draining and (bool(self._engines) or not self._member.is_reachable)

    @property
    def ready_in_s(self) -> float:
        return 0.0 if self.is_ready else READY_IN_S

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._requests) - self.num_running)

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self._engines.values())

    @property
    def kv_usage_ratio(self) -> float:
        """The mean."""
        engines = self._engines.values()
        return sum(engine.kv_usage_ratio for engine in engines) / max(1, len(engines))

    @property
    def _engines(self) -> Mapping[str, EngineReport]:
        """Those of this version: during an update, the fleet has others too."""
        engines = self._member.fleet.engines
        return {name: engine for name, engine in engines.items() if is_of_version(name, self._version)}

    def submit(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        return self._requests.events(request)

    def start(self) -> None:
        """In the event loop."""
        self._loop = asyncio.get_running_loop()
        self._spawn(self._hold())

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
        self._is_draining = True
        for name in self._requests:
            self._send(Cancel(name))
        await self._wait_until_idle(STOP_TIMEOUT_S)
        self._requests.end_all("cancelled", SHUTTING_DOWN)

    async def _wait_until_idle(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        # Once in the life of the server; not worth a signal.
        while len(self._requests) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(IDLE_LOOK_S)

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
            async for message in self._generate.remote(request, self._member.name):
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

    async def _hold(self) -> None:
        """Keep the replicas that the router knows (PlacementRouter), whatever else wants to end them, and tell them
        that this ingress is there (EngineReplica.stay)."""
        while not self._is_draining or len(self._requests):
            self._spawn(self._stay())
            await asyncio.sleep(STAY_S / 3)

    async def _stay(self) -> None:
        with suppress(DeploymentUnavailableError, TimeoutError):
            await self._deployment.broadcast("stay", self._member.name).results_async(
                timeout_s=2 * STAY_S, return_exceptions=True
            )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
