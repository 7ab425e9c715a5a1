"""Lowers the budgets of elastic tiers while engines are overloaded, step by step, and restores them.

A level from 0 to NUM_LEVELS says how far: at level k, a tier's largest budget is max_budget less k / NUM_LEVELS of the
way to its elastic_floor. Requests that asked for less are not touched.
"""

import asyncio
import logging
import math
import time
from dataclasses import dataclass

from buddy_routing.action_space import ActionSpace
from buddy_server.config import ElasticSettings
from buddy_server.engine.messages import EngineInfo
from buddy_server.fleet.entry import Decision
from buddy_server.fleet.fleet import Fleet
from buddy_server.fleet.member import FleetMember
from buddy_server.metrics import Metrics
from buddy_server.tenancy.book import TenantBook
from buddy_server.tenancy.policy import Tier

log = logging.getLogger(__name__)

NUM_LEVELS = 8
TICK_S = 0.25
LOWER_EVERY_S = 0.5
"""A lowered budget needs about this long to show in the queue."""
MOST_STEPS = 3
"""How many levels budgets are lowered at once, at most: one at HIGH, one more for every LOWER_STEP of the target."""
LOWER_STEP = 0.25
RESTORE_EVERY_S = 3.0
TRY_AFTER_S = 30.0
LONGEST_PAUSE_S = 300.0
HIGH, LOW = 0.4, 0.2
"""Budgets are lowered when the load is above this share of a target, long before it is missed: at twice the load that
full depth carries, the queue grows by a second every second. They are restored when it is below the other. Between the
two, a level is tried when the load has not been high for TRY_AFTER_S."""
ROOM, IDLE = 0.5, 0.25
"""The same holds while answers use more than the share ROOM of the engine, since deeper answers take longer. Below IDLE
there is no pause after a failed attempt."""
MEMORY = 0.9
"""Weight of the past in the average use of the engine, per tick: about the last 3 seconds."""


@dataclass(frozen=True, slots=True)
class Load:
    """What clients feel, and how full the engines are: the seconds that requests wait for their first step, the mean
    seconds between two tokens, and the share of the engines' places or blocks that answers use."""

    queue_s: float
    inter_token_s: float
    used: float

    @classmethod
    def of(cls, fleet: Fleet) -> "Load":
        """Of all its engines; of their queues the longest."""
        engines = fleet.engines.values()
        places = sum(engine.num_running for engine in engines) / max(1, sum(engine.max_sequences for engine in engines))
        blocks = sum(engine.kv_usage_ratio for engine in engines) / max(1, len(engines))
        queue_s = max((engine.queue_s for engine in engines), default=0.0)
        return cls(queue_s, fleet.inter_token_s, max(places, blocks))


class DepthController:
    """Chooses the level from the load, observed at regular times. If a restored level led to overload, it waits
    before it tries that level again, each time twice as long, so that budgets do not swing."""

    def __init__(self) -> None:
        self.level = 0
        self._changed_s = self._high_s = -math.inf
        self._pause_s = RESTORE_EVERY_S
        self._has_restored = False
        self._failed_level = -1
        self._used = 0.0

    def observe(self, now_s: float, load: Load, targets: ElasticSettings) -> int:
        """The level from now on."""
        self._used = MEMORY * self._used + (1 - MEMORY) * load.used
        pressure = max(load.queue_s / targets.target_queue_s, load.inter_token_s / targets.target_inter_token_s)
        since_s = now_s - self._changed_s
        if pressure > HIGH:
            self._high_s = now_s
            if self.level < NUM_LEVELS and since_s >= LOWER_EVERY_S:
                if self._has_restored:
                    self._failed_level = self.level
                    self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
                num_steps = min(1 + int((pressure - HIGH) / LOWER_STEP), MOST_STEPS)
                self._change(now_s, min(NUM_LEVELS, self.level + num_steps))
        elif self.level and since_s >= self._needed_pause_s(now_s, pressure):
            self._change(now_s, self.level - 1)
        if since_s > 2 * LONGEST_PAUSE_S:
            self._pause_s = RESTORE_EVERY_S
        return self.level

    def follow(self, now_s: float, level: int) -> None:
        """Another controller has chosen the level. If this one is to go on, it has not seen yet that less would do."""
        self.level, self._changed_s, self._high_s = level, now_s, now_s

    def _needed_pause_s(self, now_s: float, pressure: float) -> float:
        """How long ago the last change must be for a level to be restored."""
        if pressure < LOW and self._used < IDLE:
            return RESTORE_EVERY_S
        if (pressure < LOW and self._used < ROOM) or now_s - self._high_s >= TRY_AFTER_S:
            return self._pause_s if self.level - 1 <= self._failed_level else RESTORE_EVERY_S
        return math.inf

    def _change(self, now_s: float, level: int) -> None:
        self._has_restored = level < self.level
        if level < self._failed_level:
            # The level that had failed has held this time.
            self._failed_level = -1
        self.level, self._changed_s = level, now_s


def depth_limit(tier: Tier, level: int, actions: ActionSpace) -> int:
    """The milli-layers that a token of an elastic tier may cost at `level`."""
    assert tier.elastic_floor is not None
    lowered = (tier.max_budget - tier.elastic_floor) * level / NUM_LEVELS
    return actions.max_cost(max(tier.max_budget - lowered, actions.smallest_budget))


class ElasticBudgets:
    """Watches the load of the whole fleet, and has `member` tell it the limits of the elastic tiers in `book`."""

    def __init__(self, member: FleetMember, info: EngineInfo, metrics: Metrics, book: TenantBook) -> None:
        self._member = member
        self._actions = info.actions
        self._metrics = metrics
        self._book = book
        self._controller = DepthController()
        self._decision: Decision | None = None

    async def run(self) -> None:
        """Control depth until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick(time.monotonic())

    def tick(self, now_s: float) -> None:
        """Observe the load once, and change the limits if it says so."""
        elastic = [tier for tier in self._book.tiers.values() if tier.elastic_floor is not None]
        actions, before, load = self._actions, self._controller.level, Load.of(self._member.fleet)
        follows, decided = self._member.follows, self._member.fleet.decision
        if follows and decided is not None:
            self._controller.follow(now_s, decided.level)
        elif elastic:
            self._controller.observe(now_s, load, self._book.config.elastic)
        level = self._controller.level
        limits = {tier.name: depth_limit(tier, level, actions) for tier in elastic} if level else {}
        for tier in elastic:
            self._metrics.depth_limit(tier.name, limits.get(tier.name, actions.full_cost) / actions.full_cost)
        decision = Decision(level, limits)
        if decision != self._decision:
            self._member.decide(decision)
        self._decision = decision
        if level != before and not follows:
            log.info(
                "budgets lowered" if level > before else "budgets restored",
                extra={
                    "level": level,
                    "queue_s": round(load.queue_s, 3),
                    "inter_token_s": round(load.inter_token_s, 4),
                    "used": round(load.used, 2),
                    "budgets": {name: cost / actions.full_cost for name, cost in limits.items()},
                },
            )
