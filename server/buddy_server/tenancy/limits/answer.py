"""What a claim is told, from what a limiter has counted."""

import math
from dataclasses import dataclass

from buddy_server.tenancy.limits.limiter import Claim, LimitName, Refusal, Standing
from buddy_server.tenancy.limits.month import seconds_left

MICROSECONDS = 1_000_000
"""In a second. Limiters count time in whole microseconds, so that a wait of `retry_after_s` is never a rounding error
too short."""

_RUNNING_RETRY_S = 1.0
"""Nobody knows when an answer ends."""


@dataclass(frozen=True, slots=True)
class Count:
    """A tenant's use when a claim has been granted or refused. A wait is how long the minute refuses the claim: 0 is
    not at all. `cost` is of the minute, `month_cost` of the claim's month."""

    requests_wait_s: float
    cost_wait_s: float
    is_over_running: bool
    is_over_month: bool
    num_requests: int
    cost: int
    reset_s: float
    month_cost: int


def answer(claim: Claim, count: Count) -> Standing | Refusal:
    """Refusal if any limit refuses `claim`."""
    refused: dict[LimitName, float] = {}
    if count.requests_wait_s:
        refused["requests_per_minute"] = count.requests_wait_s
    if count.cost_wait_s:
        refused["layer_tokens_per_minute"] = count.cost_wait_s
    if count.is_over_running:
        refused["max_concurrent_requests"] = _RUNNING_RETRY_S
    if count.is_over_month:
        refused["layer_tokens_per_month"] = _month_wait_s(claim)
    standing = Standing(
        remaining_requests=_remaining(claim.limits.requests_per_minute, count.num_requests),
        reset_requests_s=count.reset_s,
        remaining_cost=_remaining(claim.limits.cost_per_minute, count.cost),
        reset_cost_s=count.reset_s,
        month_cost=count.month_cost,
    )
    if not refused:
        return standing
    longest = max(refused, key=lambda limit: refused[limit])
    return Refusal(longest, refused[longest], standing)


def _remaining(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(0, limit - used)


def _month_wait_s(claim: Claim) -> float:
    limit = claim.limits.cost_per_month
    return math.inf if limit is not None and claim.cost > limit else max(0.0, seconds_left(claim.month))
