"""The controller of elastic budgets, beside a simple model of an engine: a queue in front of places."""

import itertools
from dataclasses import dataclass, field

import pytest

from buddy_routing.action_space import ActionSpace
from buddy_server.config import ElasticSettings, ServerConfig
from buddy_server.fleet.board import Board, MemoryBoard
from buddy_server.fleet.member import FleetMember
from buddy_server.metrics import Metrics
from buddy_server.tenancy.elastic import (
    NUM_LEVELS,
    RESTORE_EVERY_S,
    TICK_S,
    DepthController,
    ElasticBudgets,
    Load,
    depth_limit,
)
from buddy_server.tenancy.policy import Tenant, Tier
from fakes.engine import FakeEngine
from fakes.site import Serve
from fakes.tenancy import tenancy_of

TARGETS = ElasticSettings()
CALM = Load(queue_s=0.0, inter_token_s=0.001, used=0.0)


@dataclass
class Simulation:
    """At full depth the engine ends `capacity` requests a second, at the deepest level three times as many."""

    capacity: float = 10.0
    num_places: int = 32
    controller: DepthController = field(default_factory=DepthController)
    now_s: float = 0.0
    waiting: float = 0.0
    levels: list[int] = field(default_factory=list)
    queues_s: list[float] = field(default_factory=list)

    def run(self, seconds: float, rate: float) -> None:
        """Let `rate` requests arrive each second."""
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            served = self.capacity * (1 + 2 * self.controller.level / NUM_LEVELS)
            self.waiting = max(0.0, self.waiting + (rate - served) * TICK_S)
            queue_s = self.waiting / served
            used = 1.0 if self.waiting else min(1.0, rate / served)
            self.controller.observe(self.now_s, Load(queue_s, 0.001, used), TARGETS)
            self.levels.append(self.controller.level)
            self.queues_s.append(queue_s)

    @property
    def num_changes(self) -> int:
        return sum(one != other for one, other in itertools.pairwise(self.levels))


def test_nothing_changes_below_the_targets() -> None:
    simulation = Simulation()
    simulation.run(60, rate=9)
    assert set(simulation.levels) == {0}


def test_twice_the_load_is_carried_within_the_target_by_lower_budgets() -> None:
    simulation = Simulation()
    simulation.run(60, rate=20)
    assert 4 <= simulation.controller.level <= NUM_LEVELS
    assert max(simulation.queues_s[80:]) < TARGETS.target_queue_s


def test_budgets_do_not_swing_under_steady_overload() -> None:
    simulation = Simulation()
    simulation.run(60, rate=20)
    changes_at_first = simulation.num_changes
    simulation.run(600, rate=20)
    assert simulation.num_changes - changes_at_first <= 20


def test_budgets_return_within_a_minute_after_the_load() -> None:
    simulation = Simulation()
    simulation.run(120, rate=30)
    assert simulation.controller.level > 0
    simulation.run(60, rate=1)
    assert simulation.controller.level == 0


def test_load_between_the_marks_is_tried_seldom_and_in_the_end_restored() -> None:
    controller = DepthController()
    controller.observe(0.0, Load(2.0, 0.001, 1.0), TARGETS)
    between = Load(0.3 * TARGETS.target_queue_s, 0.001, 1.0)
    levels = [controller.observe(tick * TICK_S, between, TARGETS) for tick in range(1, 600)]
    assert levels[0] == levels[int(29 / TICK_S)] == 3
    assert levels[-1] == 0


def test_full_engine_without_a_queue_gets_its_budgets_back() -> None:
    controller = DepthController()
    for tick in range(16):
        controller.observe(tick * TICK_S, Load(2.0, 0.001, 1.0), TARGETS)
    assert controller.level == NUM_LEVELS
    for tick in range(16, 16 + round(60 / TICK_S)):
        controller.observe(tick * TICK_S, Load(0.0, 0.001, 0.8), TARGETS)
    assert controller.level == 0


@pytest.mark.parametrize(("queue_s", "levels"), [(0.25, 1), (0.35, 2), (0.5, 3), (20.0, 3)])
def test_budgets_fall_faster_the_longer_the_queue_is(queue_s: float, levels: int) -> None:
    controller = DepthController()
    assert controller.observe(0.0, Load(queue_s, 0.001, 1.0), TARGETS) == levels


def test_slow_tokens_lower_budgets_too() -> None:
    controller = DepthController()
    assert controller.observe(0.0, Load(0.0, 0.2, 0.5), TARGETS) > 0


def test_failed_restoring_waits_longer_each_time() -> None:
    controller = DepthController()
    controller.observe(0.0, Load(2.0, 0.001, 0.4), TARGETS)
    restored: list[float] = []
    for tick in range(1, 1600):
        now_s, before = tick * TICK_S, controller.level
        # At the level before, the queue is long again.
        queue_s = 0.0 if before >= 2 else 0.4
        controller.observe(now_s, Load(queue_s, 0.001, 0.4), TARGETS)
        if controller.level < before:
            restored.append(now_s)
    pauses = [later - earlier for earlier, later in itertools.pairwise(restored)]
    assert pauses[0] < pauses[1] < pauses[2]


def test_failed_level_holds_up_no_deeper_ones() -> None:
    controller = DepthController()
    now_s = 0.0

    def observe_for(seconds: float, queue_s: float) -> list[int]:
        nonlocal now_s
        levels = []
        for _ in range(round(seconds / TICK_S)):
            now_s += TICK_S
            levels.append(controller.observe(now_s, Load(queue_s, 0.001, 0.3), TARGETS))
        return levels

    observe_for(4, queue_s=2.0)
    assert observe_for(11, queue_s=0.0)[-1] == 4
    assert observe_for(0.5, queue_s=0.25)[-1] == 5
    assert set(observe_for(5, queue_s=0.0)) == {5}
    assert observe_for(2 * RESTORE_EVERY_S, queue_s=0.0)[-1] == 4
    assert observe_for(5 * RESTORE_EVERY_S, queue_s=0.0)[-1] == 0


@pytest.mark.parametrize(("level", "layers"), [(0, 16), (4, 10), (NUM_LEVELS, 4)])
def test_level_is_a_share_of_the_way_to_the_floor(level: int, layers: int) -> None:
    tier = Tier("free", elastic_floor=0.25)
    assert depth_limit(tier, level, ActionSpace.skip_or_run(16)) == 1000 * layers


def test_floor_below_the_forced_layers_is_the_forced_layers() -> None:
    tier = Tier("free", elastic_floor=0.0)
    assert depth_limit(tier, NUM_LEVELS, ActionSpace.skip_or_run(16)) == 2000


class Server:
    """A member of the fleet on `board`, its engine, and its elastic budgets."""

    def __init__(self, config: ServerConfig, name: str = "a", board: Board | None = None) -> None:
        self.engine = FakeEngine()
        self.metrics = Metrics(self.engine.info, config.tenants)
        self.member = FleetMember(board or MemoryBoard(), name, self.engine)
        book = tenancy_of(self.engine, config, self.metrics).book
        self.elastic = ElasticBudgets(self.member, self.engine.info, self.metrics, book)

    async def tick(self, now_s: float) -> None:
        await self.member.exchange()
        self.elastic.tick(now_s)
        await self.member.exchange()


@pytest.mark.anyio
async def test_engine_is_told_the_limits_of_elastic_tiers_alone() -> None:
    free, pro = Tier("free", elastic_floor=0.25), Tier("pro")
    server = Server(ServerConfig((Tenant("a", free), Tenant("b", pro))))
    server.engine.queue_s = 2.0
    await server.tick(0.0)
    assert server.engine.limits == {"free": 5000}
    for tick in range(1, 40):
        await server.tick(tick * TICK_S)
    assert server.engine.limits == {"free": 2000}
    server.engine.queue_s = 0.0
    for tick in range(40, 400):
        await server.tick(tick * TICK_S)
    assert server.engine.limits == {}
    assert server.metrics.registry.get_sample_value("buddy_budget_limit_ratio", {"tier": "free"}) == 1.0


@pytest.mark.anyio
async def test_engine_hears_nothing_while_budgets_are_whole() -> None:
    server = Server(ServerConfig((Tenant("a", Tier("free", elastic_floor=0.25)),)))
    server.engine.limits = {"left": 1}
    for tick in range(40):
        await server.tick(tick * TICK_S)
    assert server.engine.limits == {"left": 1}


@pytest.mark.anyio
async def test_servers_of_a_fleet_lower_budgets_together_by_the_load_of_all() -> None:
    config, board = ServerConfig((Tenant("a", Tier("free", elastic_floor=0.25)),)), MemoryBoard()
    servers = [Server(config, name, board) for name in "bcd"]
    servers[2].engine.queue_s = 2.0
    for tick in range(40):
        for server in servers:
            await server.tick(tick * TICK_S)
    assert [server.engine.limits for server in servers] == [{"free": 2000}] * 3
    # Neither high nor low enough for a change; one that comes now would start with whole budgets.
    servers[2].engine.queue_s = 0.15
    servers.append(Server(config, "a", board))
    for tick in range(40, 60):
        for server in servers:
            await server.tick(tick * TICK_S)
    assert servers[-1].member.fleet.deciders == ["a", "b", "c", "d"]
    assert [server.engine.limits for server in servers] == [{"free": 2000}] * 4
    for server in servers:
        assert server.metrics.registry.get_sample_value("buddy_budget_limit_ratio", {"tier": "free"}) == 0.25


def test_response_says_that_its_budget_was_lowered(serve: Serve) -> None:
    site = serve(
        FakeEngine(limits={"free": 4000}), ServerConfig((Tenant("default", Tier("free", elastic_floor=0.25)),))
    )
    lowered, untouched = (site.chat(budget=budget).json()["buddy"] for budget in (1.0, 0.5))
    assert (lowered["budget_requested"], lowered["budget_granted"], lowered["decided_by"]) == (1.0, 0.5, "elastic")
    assert (untouched["budget_granted"], untouched["decided_by"]) == (0.5, "request")
