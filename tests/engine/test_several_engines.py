"""Fair shares over several engines that tell each other what they serve: queues alone, then schedulers whose steps are
made up."""

import itertools
import random
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import pytest

from buddy_server.engine.fair_share import LONGEST_WAIT_S, LOOK_S, FairShare
from buddy_server.engine.messages import GenerationRequest, SamplingParams
from buddy_server.engine.sequence import Sequence
from made_up_steps import add, commit, make_scheduler
from tiny_engine import new_sequence

STEP_S = 0.1
LONGEST_ANSWER = 20
Weights = Mapping[str, float]
Placement = Mapping[str, tuple[int, ...]]
"""The engines on which a tenant has work."""

_names = itertools.count()


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def requested(tenant: str, weight: float, rng: random.Random) -> GenerationRequest:
    params = SamplingParams(rng.randint(1, LONGEST_ANSWER))
    prompt, cost = (7,) * rng.randint(1, 8), rng.choice((2000, 3000, 4000))
    return GenerationRequest(f"{tenant}{next(_names)}", tenant, prompt, cost, params, weight=weight)


@dataclass
class Queue:
    """An engine that is nothing but a queue and lanes, each of which runs a token in every step. The tenants in
    `weights` have more requests than it can run."""

    clock: Clock
    num_lanes: int
    weights: Weights
    rng: random.Random
    running: dict[Sequence, int] = field(default_factory=dict)
    longest_without_lane_s: float = 0.0
    _num_waiting: Counter[str] = field(default_factory=Counter)
    _ran_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fair_share = FairShare(self.clock)

    def step(self) -> list[str]:
        """The tenants whose requests have ended."""
        for tenant, weight in self.weights.items():
            while self._num_waiting[tenant] < 4:
                self.fair_share.push(new_sequence(requested(tenant, weight, self.rng)))
                self._num_waiting[tenant] += 1
        while len(self.running) < self.num_lanes and (first := self.fair_share.peek()) is not None:
            self.fair_share.start(first)
            self._num_waiting[first.request.tenant] -= 1
            self.running[first] = first.request.sampling.max_tokens
        self._look()
        ended = []
        for sequence in list(self.running):
            self.fair_share.charge(sequence, sequence.request.max_cost)
            self.running[sequence] -= 1
            if not self.running[sequence]:
                del self.running[sequence]
                self.fair_share.leave(sequence)
                ended.append(sequence.request.tenant)
        return ended

    def _look(self) -> None:
        now_s = self.clock()
        self._ran_s.update((sequence.request.tenant, now_s) for sequence in self.running)
        for tenant in self.weights:
            waited_s = now_s - self._ran_s.setdefault(tenant, now_s)
            self.longest_without_lane_s = max(self.longest_without_lane_s, waited_s)


@dataclass
class MadeUpEngine:
    """A scheduler. Its tenants have more requests than it can run."""

    clock: Clock
    num_lanes: int
    weights: Weights
    rng: random.Random
    _open: dict[str, list[Sequence]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scheduler = make_scheduler(num_blocks=1000, max_sequences=self.num_lanes, max_step_tokens=64)
        self._scheduler.fair_share = self.fair_share = FairShare(self.clock)

    def step(self) -> None:
        for tenant, weight in self.weights.items():
            alive = [sequence for sequence in self._open.get(tenant, []) if not sequence.has_ended]
            new = range(2 * self.num_lanes - len(alive))
            self._open[tenant] = alive + [add(self._scheduler, requested(tenant, weight, self.rng)) for _ in new]
        commit(self._scheduler, self._scheduler.schedule())


@dataclass
class Site:
    """`ran` is what each engine ran for each tenant, in milli-layers. Every `exchange_every` steps each engine hears
    what the others have run since the last time; never with None."""

    num_lanes: tuple[int, ...]
    weights: Weights
    placement: Placement
    exchange_every: int | None
    kind: type[Queue] | type[MadeUpEngine] = Queue
    seed: int = 0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.engines = [
            self.kind(
                self.clock,
                num_lanes,
                {tenant: weight for tenant, weight in self.weights.items() if index in self.placement[tenant]},
                random.Random(self.seed + index),
            )
            for index, num_lanes in enumerate(self.num_lanes)
        ]
        self.ran: list[Counter[str]] = [Counter() for _ in self.engines]
        self._news: list[Counter[tuple[str, int]]] = [Counter() for _ in self.engines]

    @property
    def totals(self) -> Counter[str]:
        return sum(self.ran, Counter())

    def run(self, num_steps: int) -> None:
        for number in range(1, num_steps + 1):
            for engine, ran, news in zip(self.engines, self.ran, self._news, strict=True):
                engine.step()
                for (tenant, priority), cost in engine.fair_share.take_served().items():
                    ran[tenant] += cost
                    news[tenant, priority] += cost
            self.clock.now_s += STEP_S
            if self.exchange_every is not None and number % self.exchange_every == 0:
                exchange(self.engines, self._news)


@dataclass
class Clients:
    """So many of each tenant, each with one request at a time, to the emptier of two engines."""

    num: Mapping[str, int]
    weights: Weights
    num_lanes: tuple[int, ...]
    exchange_every: int
    clock: Clock = field(default_factory=Clock)
    rng: random.Random = field(default_factory=random.Random)

    def run(self, num_steps: int) -> Counter[str]:
        """What tenants got."""
        engines = [Queue(self.clock, lanes, {}, self.rng) for lanes in self.num_lanes]
        loads, ran = Counter[int](), Counter[str]()
        news: list[Counter[tuple[str, int]]] = [Counter() for _ in engines]
        idle = [tenant for tenant, num in self.num.items() for _ in range(num)]
        for number in range(1, num_steps + 1):
            for tenant in idle:
                index = min(self.rng.sample(range(len(engines)), 2), key=loads.__getitem__)
                engines[index].fair_share.push(new_sequence(requested(tenant, self.weights[tenant], self.rng)))
                loads[index] += 1
            idle.clear()
            for index, engine in enumerate(engines):
                idle += (ended := engine.step())
                loads[index] -= len(ended)
                for (tenant, priority), cost in engine.fair_share.take_served().items():
                    ran[tenant] += cost
                    news[index][tenant, priority] += cost
            self.clock.now_s += STEP_S
            if number % self.exchange_every == 0:
                exchange(engines, news)
        return ran


def exchange(engines: Collection[Queue | MadeUpEngine], news: Collection[Counter[tuple[str, int]]]) -> None:
    """Each engine hears what the others have run since the last time, and who waits there."""
    everything = sum(news, Counter())
    for engine, own in zip(engines, news, strict=True):
        waiting = (other.fair_share.waiting_tenants for other in engines if other is not engine)
        engine.fair_share.charge_elsewhere(everything - own, frozenset().union(*waiting))
    for own in news:
        own.clear()


def fair_totals(capacities: list[int], weights: Weights, placement: Placement) -> dict[str, float]:
    """The max-min shares of all engines together. Of all groups of tenants, that with the least capacity for its weight
    gets all of it, in proportion to weight; then the same with the tenants and the engines that are left."""
    totals: dict[str, float] = {}
    left = dict(enumerate(capacities))

    def engines(group: tuple[str, ...]) -> set[int]:
        return {engine for tenant in group for engine in placement[tenant]} & left.keys()

    def share(group: tuple[str, ...]) -> float:
        return sum(left[engine] for engine in engines(group)) / sum(weights[tenant] for tenant in group)

    while len(totals) < len(weights):
        others = weights.keys() - totals.keys()
        groups = (group for size in range(len(others)) for group in itertools.combinations(others, size + 1))
        least = min(groups, key=share)
        totals |= {tenant: share(least) * weights[tenant] for tenant in least}
        for engine in engines(least):
            del left[engine]
    return totals


@pytest.mark.parametrize("kind", [Queue, MadeUpEngine])
@pytest.mark.parametrize("exchange_every", [3, 30])
def test_tenants_with_work_everywhere_share_the_whole_by_weight(
    kind: type[Queue] | type[MadeUpEngine], exchange_every: int
) -> None:
    both = {"a": (0, 1), "b": (0, 1)}
    site = Site((4, 8), {"a": 3, "b": 1}, both, exchange_every, kind)
    site.run(1500)
    assert site.totals["a"] / site.totals["b"] == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(("num", "tolerance"), [(14, 0.1), (20, 0.05)])
@pytest.mark.parametrize("seed", range(3))
def test_tenants_that_wait_on_some_engines_now_and_on_others_then_share_the_whole_by_weight(
    num: int, tolerance: float, seed: int
) -> None:
    clients = Clients({"a": num, "b": num}, {"a": 3, "b": 1}, (4, 4, 4), exchange_every=3, rng=random.Random(seed))
    ran = clients.run(3000)
    assert ran["a"] / ran["b"] == pytest.approx(3, rel=tolerance)


@pytest.mark.parametrize("kind", [Queue, MadeUpEngine])
@pytest.mark.parametrize(("weights", "alone", "together"), [((1, 1), 3, 1), ((1, 3), 7, 3), ((3, 1), 5 / 3, 1)])
def test_tenant_with_work_on_one_engine_gets_its_share_of_two_where_local_shares_miss_it(
    kind: type[Queue] | type[MadeUpEngine], weights: tuple[int, int], alone: float, together: float
) -> None:
    ratios = []
    for exchange_every in (None, 5):
        site = Site((6, 6), dict(zip("xy", weights, strict=True)), {"x": (0,), "y": (0, 1)}, exchange_every, kind)
        site.run(1500)
        ratios.append(site.totals["y"] / site.totals["x"])
    assert ratios == [pytest.approx(alone, rel=0.1), pytest.approx(together, rel=0.1)]


@pytest.mark.parametrize("seed", range(30))
def test_wherever_tenants_have_work_shares_are_those_of_the_whole_and_nobody_starves(seed: int) -> None:
    rng = random.Random(seed)
    num_lanes = tuple(rng.choice((4, 6, 8)) for _ in range(rng.choice((2, 3))))
    weights = {tenant: rng.choice((0.5, 1, 1, 3)) for tenant in "abcdef"[: rng.randint(2, 6)]}
    engines = range(len(num_lanes))
    placement = {tenant: tuple(rng.sample(engines, rng.randint(1, len(engines)))) for tenant in weights}
    site = Site(num_lanes, weights, placement, rng.choice((1, 5, 20)), seed=seed)
    site.run(1500)
    capacities = [sum(ran.values()) for ran in site.ran]
    assert site.totals == pytest.approx(fair_totals(capacities, weights, placement), rel=0.1)
    for engine, lanes, capacity in zip(site.engines, num_lanes, capacities, strict=True):
        if engine.weights:
            # All lanes ran in all steps. Answers cost 2000, 3000 or 4000 a token.
            assert capacity == pytest.approx(1500 * lanes * 3000, rel=0.1)
        assert engine.longest_without_lane_s <= LONGEST_WAIT_S + LOOK_S + LONGEST_ANSWER * STEP_S


def test_tenant_whose_other_engine_is_gone_gets_its_share_of_the_one_that_is_left() -> None:
    site = Site((4, 40), {"x": 1, "y": 1}, {"x": (0,), "y": (0, 1)}, exchange_every=5)
    site.run(3000)
    # y has run ten times as much, and almost nothing here.
    assert site.ran[0]["y"] < site.ran[0]["x"] / 10
    left = site.engines[0]
    site.engines, site.ran, site._news = [left], [Counter()], [Counter()]
    site.run(round(LONGEST_WAIT_S / STEP_S))
    site.ran = [Counter()]
    site.run(1000)
    assert site.totals["y"] / site.totals["x"] == pytest.approx(1, rel=0.05)
