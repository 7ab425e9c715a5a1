"""How many replicas of the engine there are: Ray Serve asks the AutoscalingPolicy here, several times a second.

Ray Serve puts the class into its controller by value. It needs nothing of the server there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

WAITING, LATE, RAN, LOWERED = "waiting_layer_tokens", "late_ratio", "layer_tokens_per_s", "budgets_lowered"
"""What a replica reports (EngineReplica.record_autoscaling_stats)."""
HIGH, LOW = 1.0, 0.2
"""There are more replicas when requests are later than this share of the target, and may be fewer below the other."""
CATCH_UP_S = 10.0
"""Replicas are added so that what waits would be run in this time."""
MOST_GROWTH = 2
"""How many times as many replicas there may be after one decision."""
ROOM = 0.6
"""The load may take this share of what replicas can run when one of them ends."""
MEAN_OVER_S = 30.0
"""The load is a mean of about so long: a single request every now and then is little."""
TRY_AFTER_S = 300.0
"""Without that, one replica ends when no request has been late for so long: the speed may be underestimated."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 600.0, 4800.0
"""When requests are late again less than TRY_AFTER_S after replicas ended, the next ones end only after this pause, and
each time after twice as long, so that their number does not swing."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica: what its waiting requests may cost, in layer-tokens; how late requests are, as a share of the target
    (WaitingRequests); what it ran, in layer-tokens per second; whether budgets were lowered to run more."""

    waiting: float
    late: float
    ran_per_s: float
    is_lowered: bool = False


class ReplicaCount:
    """Decides from the loads, observed at regular times. What a replica can run is what one ran while requests waited
    and were late: it depends on the model, its device and the mix of prompts and answers."""

    def __init__(self) -> None:
        self._full_per_s: float | None = None
        self._mean_per_s = 0.0
        self._observed_s: float | None = None
        self._late_s: float | None = None
        """When requests were late last."""
        self._shrunk_s = self._failed_s = -math.inf
        """When replicas ended last, and when there were too few after that."""
        self._pause_s = 0.0
        self._target = 0

    def decide(self, now_s: float, loads: Sequence[ReplicaLoad], target: int) -> int:
        """The number of replicas from now on, if Ray Serve starts and ends them without delay. `loads` are those of the
        replicas that run, `target` is how many there are to be so far."""
        if target < self._target:
            self._shrunk_s = now_s
        self._target = target
        if self._late_s is None:
            self._late_s = now_s
        if not loads:
            return target
        self._average(now_s, sum(load.ran_per_s for load in loads))
        late = mean(load.late for load in loads)
        is_lowered = any(load.is_lowered for load in loads)
        if late > HIGH or is_lowered:
            if now_s - self._shrunk_s < TRY_AFTER_S:
                self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
                self._shrunk_s, self._failed_s = -math.inf, now_s
            self._late_s = now_s
            return max(target, self._more(loads))
        calm_s = now_s - self._late_s
        if now_s - self._failed_s > 2 * LONGEST_PAUSE_S:
            self._pause_s = 0.0
        has_room = late <= LOW and (calm_s >= TRY_AFTER_S or self._fits(target - 1))
        return target - 1 if has_room and calm_s >= self._pause_s and target > 1 else target

    def _more(self, loads: Sequence[ReplicaLoad]) -> int:
        """How many replicas catch up."""
        num = len(loads)
        # When the load has gone, requests are still known as late, and budgets lowered, while nothing runs.
        if full := [load.ran_per_s for load in loads if load.waiting and (load.late > HIGH or load.is_lowered)]:
            self._full_per_s = mean(full)
        backlog_per_s = sum(load.waiting for load in loads) / CATCH_UP_S
        num_more = math.ceil(backlog_per_s / self._full_per_s) if self._full_per_s else 1
        return min(num + max(1, num_more), MOST_GROWTH * num)

    def _average(self, now_s: float, per_s: float) -> None:
        since_s = math.inf if self._observed_s is None else now_s - self._observed_s
        self._mean_per_s += (per_s - self._mean_per_s) * (1 - math.exp(-since_s / MEAN_OVER_S))
        self._observed_s = now_s

    def _fits(self, num: int) -> bool:
        """Whether so many replicas have room for the load."""
        return self._mean_per_s <= ROOM * num * (self._full_per_s or 0.0)


class Scaling:
    """Ray Serve's policy for the deployment EngineReplica: its own delays and bounds are in its AutoscalingConfig."""

    def __init__(self) -> None:
        self._count = ReplicaCount()

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """The number of replicas; there is no state to keep for Ray Serve."""
        newest = {
            name: {replica: series[-1].value for replica, series in of_replicas.items() if series}
            for name, of_replicas in context.raw_metrics.items()
        }
        loads = [_load(newest, replica) for replica in context.running_replicas if replica in newest.get(WAITING, {})]
        return self._count.decide(context.current_time, loads, context.target_num_replicas), {}


def _load(metrics: Mapping[str, Mapping[Any, float]], replica: object) -> ReplicaLoad:
    waiting, late, ran_per_s, lowered = (metrics[name][replica] for name in (WAITING, LATE, RAN, LOWERED))
    return ReplicaLoad(waiting, late, ran_per_s, bool(lowered))
