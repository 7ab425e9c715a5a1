"""One replica of the engine: a Ray actor around an EngineProcess."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, Metric
from ray import serve

from buddy_server.config import load_config
from buddy_server.engine.messages import Account, FinishEvent, GenerationRequest, StepStats, Usage
from buddy_server.engine.process import EngineProcess
from buddy_server.engine.settings import EnginePlan
from buddy_server.engine_metrics import EngineMetrics
from buddy_server.fleet.member import FleetMember
from buddy_server.logs import configure_logs
from buddy_server.replicas.absences import Absences
from buddy_server.replicas.alike import check_same, start_alike
from buddy_server.replicas.board import shared_board
from buddy_server.replicas.gather import Gathering
from buddy_server.replicas.scaling import LATE, LOWERED, RAN, WAITING
from buddy_server.replicas.waiting import WaitingRequests
from buddy_server.replicas.wire import STAY_S, VERSION, Progress, encode, member_name
from buddy_server.tenancy.tenancy import persistent

LOOK_S = 0.25
"""How often to look for requests whose ingress has gone."""


@dataclass(slots=True)
class _OpenRequest:
    """`ingress` has sent it. `ended` is set, on `loop`, when its last events are about to come. `usage` is the last
    reported by the engine."""

    ingress: str
    loop: asyncio.AbstractEventLoop
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    usage: Usage | None = None


class EngineReplica:
    """The deployment behind the ingress, which alone calls its methods. Answers are msgpack (wire.py). Those of Ray
    Serve are named record_.

    All replicas of a `version` serve the same.

    A replica ends with its engine, and Ray Serve starts another: one that waited for a new engine would look idle, and
    draw all requests.
    """

    def __init__(self, plan: EnginePlan, version: str, config: Path | None) -> None:
        """`config` names the configuration's file. Raises EngineStartError and ConfigError."""
        configure_logs()
        settings = load_config(config)
        # The child ends with the thread that starts it. This one lasts as long as the replica.
        plan, worker, self._ready = start_alike(plan)
        check_same(version, worker, self._ready)
        self._version = version
        self._target_queue_s = settings.elastic.target_queue_s
        self._name = serve.get_replica_context().replica_id.unique_id
        self._open: dict[str, _OpenRequest] = {}
        self._gathering = Gathering()
        self._ingresses: Counter[str] = Counter()
        """Those that are there, by the calls of `stay` that are under way."""
        self._absences = Absences()
        self._registry = CollectorRegistry()
        # Only the ingress knows the labels of tenants (metrics.py).
        self._metrics = EngineMetrics(self._ready.info, self._registry, lambda tenant: (tenant, ""))
        self._waiting = WaitingRequests(self._ready.info.actions.full_cost)
        Gauge(
            "buddy_waiting_layer_tokens",
            "What requests without a first token may cost until they have it, or all of it before their first step.",
            registry=self._registry,
        ).set_function(lambda: self._waiting.layer_tokens)
        self._engine = EngineProcess(
            plan,
            worker,
            self._ready,
            on_step=self._observe_step,
            on_restart=_leave,
            settle=self._settle,
            note=self._note,
        )
        self._engine.start()
        board = shared_board(settings.limits, self._ready.info)
        self._member = FleetMember(board, member_name(version, self._name), self._engine)
        self._loops = [asyncio.create_task(persistent(run)) for run in (self._member.run, self._end_orphans)]

    def __del__(self) -> None:
        """Called by Ray Serve, when no request is left or the time for that is over, and after a failed start."""
        if hasattr(self, "_engine"):
            self._engine.stop()

    async def describe(self) -> bytes:
        """Its `Ready`."""
        return encode(self._ready)

    async def stay(self, ingress: str) -> None:
        """Ray Serve ends no replica during a call, and the replica does not take `ingress` for gone."""
        self._ingresses[ingress] += 1
        try:
            await asyncio.sleep(STAY_S)
        finally:
            self._ingresses[ingress] -= 1
            if not self._ingresses[ingress]:
                del self._ingresses[ingress]

    async def record_replica_metadata(self) -> dict[str, str]:
        """What routers see of it."""
        return {VERSION: self._version}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What scaling.py decides by."""
        waiting, late_s, ran_per_s = self._waiting.report(time.monotonic())
        decision = self._member.fleet.decision
        is_lowered = decision is not None and bool(decision.limits)
        return {WAITING: waiting, LATE: late_s / self._target_queue_s, RAN: ran_per_s, LOWERED: float(is_lowered)}

    async def generate(self, request: GenerationRequest, ingress: str) -> AsyncGenerator[bytes, None]:
        """Yields its `Progress` up to the FinishEvent. The request ends with the `ingress` that sends it."""
        name = request.request_id
        opened = self._open[name] = _OpenRequest(ingress, asyncio.get_running_loop())
        self._waiting.add(request, time.monotonic())
        try:
            async with (
                aclosing(self._engine.submit(request)) as answer,
                aclosing(self._gathering.gathered(answer, opened.ended)) as lists,
            ):
                async for events in lists:
                    self._waiting.hear(name, events, time.monotonic())
                    ended = isinstance(events[-1], FinishEvent)
                    yield encode(Progress(events, None if ended else opened.usage))
        finally:
            del self._open[name]
            self._waiting.remove(name, time.monotonic())

    async def cancel(self, request_id: str) -> bool:
        """End a request, whose last `Progress` follows. Returns whether it is here."""
        if request_id in self._open:
            self._engine.cancel(request_id)
        return request_id in self._open

    async def measure(self) -> tuple[str, list[Metric]]:
        """A name of this replica, and its metrics, in which a tenant is a tenant's name."""
        self._metrics.show(self._engine)
        return self._name, list(self._registry.collect())

    async def _end_orphans(self) -> None:
        """End the requests of ingresses that have been gone for long: nobody reads their answers."""
        while True:
            await asyncio.sleep(LOOK_S)
            gone = self._absences.look({opened.ingress for opened in self._open.values()}, self._ingresses)
            for name, opened in self._open.items():
                if opened.ingress in gone:
                    self._engine.cancel(name)

    def _observe_step(self, stats: StepStats) -> None:
        self._metrics.observe_step(stats)
        self._waiting.ran(stats)

    def _settle(self, account: Account) -> None:
        if (opened := self._open.get(account.request_id)) is not None:
            opened.loop.call_soon_threadsafe(opened.ended.set)

    def _note(self, usages: Sequence[tuple[str, Usage]]) -> None:
        for name, usage in usages:
            if (opened := self._open.get(name)) is not None:
                opened.usage = usage


def _leave() -> None:
    """On the engine's thread, when its process has ended. Streams end with the connection to this process."""
    os._exit(1)
