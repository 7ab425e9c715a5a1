"""How many replicas a load gets."""

import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from buddy_server.replicas.scaling import (
    FIRST_PAUSE_S,
    LATE,
    LOWERED,
    MEAN_OVER_S,
    MOST_GROWTH,
    RAN,
    TRY_AFTER_S,
    WAITING,
    ReplicaCount,
    ReplicaLoad,
    Scaling,
)

SERVE_CONFIG = Path(__file__).parents[3] / "deploy" / "ray" / "serve.yaml"
FULL_PER_S = 1000.0
"""Layer-tokens per second that a replica can run."""
IDLE = ReplicaLoad(0.0, 0.0, 0.0)
TICK_S = 1.0
LATER_S = 250.0
"""When the load before no longer matters, and replicas are not yet taken away on trial."""


def overloaded(backlog_s: float = 1.0) -> ReplicaLoad:
    """With requests that wait for work of so many seconds."""
    return ReplicaLoad(backlog_s * FULL_PER_S, 3.0, FULL_PER_S)


def busy(share: float) -> ReplicaLoad:
    return ReplicaLoad(0.0, 0.0, share * FULL_PER_S)


def decide(loads: list[ReplicaLoad], before: tuple[ReplicaLoad, ...] = (overloaded(),)) -> int:
    """The number for these loads, with as many replicas, after others had been seen."""
    replicas = ReplicaCount()
    replicas.decide(0.0, before, len(loads))
    return replicas.decide(LATER_S, loads, len(loads))


def test_late_requests_get_one_more_replica() -> None:
    assert decide([overloaded()]) == 2
    assert decide([overloaded(), busy(0.9)]) == 3


def test_a_long_queue_gets_more_but_not_more_than_twice_as_many() -> None:
    assert decide([overloaded(5.0)] * 4) == 4 + 2
    assert decide([overloaded(1000.0)] * 4) == MOST_GROWTH * 4


def test_late_requests_where_nothing_has_run_yet_get_one_more() -> None:
    assert decide([ReplicaLoad(100.0, 2.0, 0.0)], ()) == 2


def test_replicas_that_are_starting_are_waited_for() -> None:
    assert ReplicaCount().decide(0.0, [overloaded()], 3) == 3


def test_lowered_budgets_get_one_more_replica_although_nobody_is_late() -> None:
    assert decide([ReplicaLoad(0.0, 0.3, FULL_PER_S, is_lowered=True)]) == 2


def test_one_late_request_in_one_of_many_replicas_changes_nothing() -> None:
    assert decide([ReplicaLoad(100.0, 2.0, FULL_PER_S), IDLE, IDLE, IDLE]) == 4


def test_a_load_that_fits_in_fewer_replicas_gets_one_fewer() -> None:
    assert decide([busy(0.3)] * 3) == 2
    assert decide([IDLE] * 3) == 2


@pytest.mark.parametrize("is_lowered", [False, True])
def test_replicas_end_after_a_load_that_was_late_to_its_end(is_lowered: bool) -> None:
    gone = ReplicaLoad(0.0, 3.0, 0.0, is_lowered)
    replicas = ReplicaCount()
    for now_s in range(4):
        replicas.decide(float(now_s), [overloaded() if now_s < 2 else gone] * 3, 3)
    assert replicas.decide(LATER_S, [IDLE] * 3, 3) == 2


def test_a_load_that_fits_only_barely_keeps_its_replicas() -> None:
    assert decide([busy(0.5)] * 3) == 3


def test_requests_that_are_a_little_late_keep_their_replicas() -> None:
    assert decide([ReplicaLoad(0.0, 0.5, 10.0)] * 3) == 3


def test_a_request_now_and_then_is_no_load_for_many_replicas() -> None:
    replicas = ReplicaCount()
    replicas.decide(0.0, [overloaded()] * 3, 3)
    sparse = [[busy(0.9 if now_s % 10 < 2 else 0.0), IDLE, IDLE] for now_s in range(1, 250)]
    numbers = [replicas.decide(float(now_s), loads, 3) for now_s, loads in enumerate(sparse, 1)]
    assert set(numbers[120:]) == {2}


def test_the_last_replica_stays() -> None:
    assert decide([IDLE]) == 1


def test_without_a_report_nothing_changes() -> None:
    assert ReplicaCount().decide(0.0, [], 3) == 3


def test_a_replica_less_is_tried_when_nobody_was_late_for_long() -> None:
    replicas = ReplicaCount()
    loads = [busy(0.5)] * 3
    numbers = [replicas.decide(now_s, loads, 3) for now_s in (0.0, TRY_AFTER_S - 1, TRY_AFTER_S)]
    assert numbers == [3, 3, 2]


@dataclass
class Cluster:
    """Replicas that share a load evenly. What they cannot run waits. They start and end `delay_s` after the number is
    wanted, if it is wanted all that time."""

    delay_s: float = 20.0
    most: int = 8
    num: int = 1
    waiting: float = 0.0
    now_s: float = 0.0
    count: ReplicaCount = field(default_factory=ReplicaCount)
    wanted_s: float = 0.0
    numbers: list[int] = field(default_factory=list)

    def run(self, per_s: float, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            work = self.waiting + per_s * TICK_S
            ran = min(work, self.num * FULL_PER_S * TICK_S)
            self.waiting, self.now_s = work - ran, self.now_s + TICK_S
            late = self.waiting / (self.num * FULL_PER_S) / 0.5
            loads = [ReplicaLoad(self.waiting / self.num, late, ran / TICK_S / self.num)] * self.num
            wanted = min(self.count.decide(self.now_s, loads, self.num), self.most)
            if wanted == self.num:
                self.wanted_s = self.now_s
            elif self.now_s - self.wanted_s >= self.delay_s:
                self.num, self.wanted_s = wanted, self.now_s
            self.numbers.append(self.num)


def test_number_follows_the_load_up_and_down() -> None:
    cluster = Cluster()
    cluster.run(500.0, 120)
    assert cluster.num == 1
    cluster.run(4500.0, 300)
    assert cluster.num >= 5
    assert cluster.waiting < FULL_PER_S
    cluster.run(500.0, 600)
    assert cluster.num == 1


def test_number_swings_less_and_less_under_a_steady_load() -> None:
    """A replica less is tried now and then, whatever the load is."""
    for per_s in range(300, 6000, 450):
        cluster = Cluster()
        cluster.run(per_s, 3 * 3600)
        changes = [one != other for one, other in pairwise(cluster.numbers)]
        first, *later = (sum(changes[hour * 3600 : (hour + 1) * 3600]) for hour in range(3))
        assert max(later) <= first / 2, per_s
        assert sum(later) <= 8, per_s


def test_each_failed_try_waits_twice_as_long_for_the_next() -> None:
    replicas, now_s, pauses = ReplicaCount(), 0.0, []
    replicas.decide(now_s, [overloaded()], 2)
    for _ in range(4):
        began_s = now_s
        while replicas.decide(now_s, [IDLE] * 2, 2) == 2:
            now_s += 1.0
        pauses.append(now_s - began_s)
        replicas.decide(now_s, [IDLE], 1)
        now_s += 1.0
        assert replicas.decide(now_s, [overloaded()], 1) == 2
        replicas.decide(now_s, [overloaded()] * 2, 2)
    assert pauses[0] <= MEAN_OVER_S
    assert pauses[1:] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]


def context(metrics: dict[str, dict[str, list[float]]], replicas: list[str]) -> Any:
    raw: defaultdict[str, dict[str, list[Any]]] = defaultdict(dict)
    for name, of_replicas in metrics.items():
        for replica, values in of_replicas.items():
            raw[name][replica] = [SimpleNamespace(timestamp=float(at), value=value) for at, value in enumerate(values)]
    return SimpleNamespace(
        raw_metrics=dict(raw), running_replicas=replicas, current_time=100.0, target_num_replicas=len(replicas)
    )


def test_policy_reads_the_newest_reports_of_the_replicas_that_run() -> None:
    scaling = Scaling()
    reports = {
        WAITING: {"a": [0.0, 1000.0], "gone": [9e9]},
        LATE: {"a": [0.0, 3.0], "gone": [100.0]},
        RAN: {"a": [0.0, 1000.0], "gone": [1.0]},
        LOWERED: {"a": [0.0, 0.0], "gone": [0.0]},
    }
    assert scaling(context(reports, ["a", "starting"])) == (2, {})
    assert scaling(context(reports, ["a"])) == (2, {})
    assert scaling(context({}, ["a"])) == (1, {})


def test_policy_is_what_ray_serve_takes() -> None:
    pytest.importorskip("ray")
    with warnings.catch_warnings(action="ignore"):
        # Ray Serve uses what its libraries no longer recommend.
        from ray.serve.config import AutoscalingPolicy
    policy = AutoscalingPolicy(policy_function="buddy_server.replicas.scaling:Scaling")
    assert policy.get_policy()()(context({}, ["a"])) == (1, {})


def test_config_file_scales_as_the_command_does() -> None:
    pytest.importorskip("ray")
    with warnings.catch_warnings(action="ignore"):
        # Ray Serve uses what its libraries no longer recommend.
        from ray.serve.config import AutoscalingConfig

        from buddy_server.replicas.application import scaled

        (application,) = yaml.safe_load(SERVE_CONFIG.read_text())["applications"]
        (engines,) = application["deployments"]
        config = AutoscalingConfig(**engines["autoscaling_config"])
        ours = scaled(config.min_replicas, config.max_replicas)
    # The policies are the same too, by names that are written in two ways (test_kuberay.py).
    assert config.model_dump(exclude={"policy"}) == ours.model_dump(exclude={"policy"})
