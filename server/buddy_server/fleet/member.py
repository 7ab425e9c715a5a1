"""This process as a member of the fleet."""

import asyncio
import logging
from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Protocol

from buddy_server.engine.messages import EngineInfo, StepTime
from buddy_server.errors import BoardUnreachable
from buddy_server.fleet.board import Board
from buddy_server.fleet.entry import Decision, EngineReport, Entry, encode_entry
from buddy_server.fleet.fleet import Fleet

log = logging.getLogger(__name__)

EXCHANGE_EVERY_S = 0.25


class MeasuredEngine(Protocol):
    """An engine of this process, as EngineProcess is."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def num_running(self) -> int: ...

    @property
    def kv_usage_ratio(self) -> float: ...

    @property
    def queue_s(self) -> float: ...

    @property
    def served(self) -> Mapping[tuple[str, int], int]: ...

    @property
    def waiting_tenants(self) -> Set[tuple[str, int]]: ...

    def take_step_time(self) -> StepTime: ...

    def limit_depth(self, limits: Mapping[str, int]) -> None: ...

    def charge_elsewhere(self, served: Mapping[tuple[str, int], int], waiting: Set[tuple[str, int]]) -> None: ...


class FleetMember:
    """Tells the others on `board` about `engine`, if there is one, and tells it of them: how deep it may run, and what
    tenants get from other engines."""

    def __init__(self, board: Board, name: str, engine: MeasuredEngine | None = None) -> None:
        self.name = name
        self.fleet = Fleet()
        self._board = board
        self._engine = engine
        self._decision: Decision | None = None
        self._applied: Mapping[str, int] = {}
        self._waiting: Set[tuple[str, int]] = frozenset()
        """As the engine was last told of the others."""
        self._step_time = StepTime()
        self._count = 0
        self.is_reachable = True
        self._news = asyncio.Event()

    @property
    def follows(self) -> bool:
        """Whether another member decides."""
        return self.fleet.decision is not None and self.fleet.deciders[0] != self.name

    def decide(self, decision: Decision) -> None:
        """From now on this member may decide, and this is what it does."""
        self._decision = decision
        self._news.set()

    async def run(self) -> None:
        """Exchange entries until cancelled."""
        while True:
            await self.exchange()
            with suppress(TimeoutError):
                async with asyncio.timeout(EXCHANGE_EVERY_S):
                    await self._news.wait()
            self._news.clear()

    async def exchange(self) -> None:
        """Put the entry of now on the board, and follow those of the others. While the board is away, an engine follows
        its own member alone, and everything else stays as it was."""
        entry = self._entry()
        try:
            entries = await self._board.exchange(self.name, entry)
        except BoardUnreachable as error:
            if self.is_reachable:
                log.error("fleet unreachable", extra={"reason": error})
            self.is_reachable = False
            if self._engine is not None:
                self.fleet.update({self.name: entry})
        else:
            if not self.is_reachable:
                log.info("fleet reachable again")
            self.is_reachable = True
            self.fleet.update(entries)
            await self._forget(self.fleet.gone)
        self._tell_engine()

    async def leave(self) -> None:
        """Take the entry off the board, which is not used any more."""
        await self._forget([self.name])
        await self._board.close()

    async def _forget(self, names: list[str]) -> None:
        if names:
            with suppress(BoardUnreachable):
                await self._board.remove(names)

    def _entry(self) -> bytes:
        self._count += 1
        return encode_entry(Entry(self._count, None if self._engine is None else self._report(), self._decision))

    def _report(self) -> EngineReport:
        engine = self._engine
        assert engine is not None
        self._step_time += engine.take_step_time()
        return EngineReport(
            is_ready=engine.is_ready,
            num_running=engine.num_running,
            max_sequences=engine.info.max_sequences,
            kv_usage_ratio=engine.kv_usage_ratio,
            queue_s=engine.queue_s,
            step_time=self._step_time,
            served=dict(engine.served),
            waiting_tenants=frozenset(engine.waiting_tenants),
        )

    def _tell_engine(self) -> None:
        if self._engine is None:
            return
        served, waiting = self.fleet.take_served(self.name), self.fleet.waiting_tenants(self.name)
        if served or waiting != self._waiting:
            self._engine.charge_elsewhere(served, waiting)
            self._waiting = waiting
        decision = self.fleet.decision
        if decision is not None and decision.limits != self._applied:
            self._engine.limit_depth(decision.limits)
            self._applied = decision.limits
