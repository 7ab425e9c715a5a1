"""Limits counted in the memory of one server process."""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from buddy_server.tenancy.limits.answer import MICROSECONDS, Count, answer
from buddy_server.tenancy.limits.limiter import LEASE_S, WINDOW_S, Claim, Refusal, Standing
from buddy_server.tenancy.limits.month import seconds_left

_WINDOW_US = round(WINDOW_S * MICROSECONDS)
_LEASE_US = round(LEASE_S * MICROSECONDS)


class MemoryLimiter:
    """A Limiter for one event loop: no method waits for anything, so nothing comes between a check and its
    reservation. `clock` gives seconds and never goes back. Tenants of whom nothing counts any more are forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}
        self._sweep_at = 0

    async def reserve(self, claim: Claim) -> Standing | Refusal:
        return self._tenant(claim.tenant).reserve(claim)

    async def settle(self, claim: Claim, cost: int) -> None:
        self._tenant(claim.tenant).settle(claim, cost)

    async def withdraw(self, claim: Claim) -> None:
        self._tenant(claim.tenant).withdraw(claim)

    async def renew(self, claims: list[Claim]) -> None:
        for claim in claims:
            self._tenant(claim.tenant).renew(claim)

    async def set_month(self, tenant: str, month: str, cost: int) -> None:
        used = self._tenant(tenant).used
        used[month] = max(used[month], cost)

    async def ping(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def _tenant(self, name: str) -> "_Tenant":
        """As it is now."""
        now = round(self._clock() * MICROSECONDS)
        if now >= self._sweep_at:
            self._sweep(now)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant()
        tenant.advance(now)
        return tenant

    def _sweep(self, now: int) -> None:
        self._sweep_at = now + _WINDOW_US
        for name, tenant in list(self._tenants.items()):
            tenant.advance(now)
            tenant.used = Counter({m: cost for m, cost in tenant.used.items() if cost and seconds_left(m) > 0})
            if tenant.is_empty:
                del self._tenants[name]


@dataclass(slots=True)
class _Entry:
    """A request of the last minute, and what it counts there."""

    reserved_at: int
    cost: int


class _Tenant:
    """Times are microseconds. Every dict by request id is in the order in which its entries leave."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()
        """What settled requests cost, by month."""
        self._now = 0
        self._window: OrderedDict[str, _Entry] = OrderedDict()
        self._window_cost = 0
        self._running: OrderedDict[str, tuple[int, Claim]] = OrderedDict()
        """With the time when the lease runs out."""
        self._reserved: Counter[str] = Counter()
        """By running requests, by month."""
        self._ended: OrderedDict[str, int] = OrderedDict()
        """When a request was settled or withdrawn, so that it is not counted twice."""

    @property
    def is_empty(self) -> bool:
        return not (self._window or self._running or self._ended or self.used)

    def advance(self, now: int) -> None:
        """Let go of what no longer counts at `now`."""
        self._now = now
        while self._running:
            lapses_at, claim = next(iter(self._running.values()))
            if lapses_at > now:
                break
            self._stop(claim)
            self._recount(claim.id, 0)
        while self._window and next(iter(self._window.values())).reserved_at <= now - _WINDOW_US:
            self._window_cost -= self._window.popitem(last=False)[1].cost
        while self._ended and next(iter(self._ended.values())) <= now - _WINDOW_US:
            self._ended.popitem(last=False)

    def reserve(self, claim: Claim) -> Standing | Refusal:
        limits = claim.limits
        requests_wait_s, cost_wait_s = self._requests_wait_s(claim), self._cost_wait_s(claim)
        is_over_running = _is_over(limits.concurrent_requests, len(self._running) + 1)
        is_over_month = _is_over(limits.cost_per_month, self._month_cost(claim.month) + claim.cost)
        if not (requests_wait_s or cost_wait_s or is_over_running or is_over_month):
            self._window[claim.id] = _Entry(self._now, claim.cost)
            self._window_cost += claim.cost
            self._run(claim)
        newest = next(reversed(self._window.values()), None)
        count = Count(
            requests_wait_s=requests_wait_s,
            cost_wait_s=cost_wait_s,
            is_over_running=is_over_running,
            is_over_month=is_over_month,
            num_requests=len(self._window),
            cost=self._window_cost,
            reset_s=0.0 if newest is None else self._leaves_in_s(newest),
            month_cost=self._month_cost(claim.month),
        )
        return answer(claim, count)

    def settle(self, claim: Claim, cost: int) -> None:
        if claim.id in self._ended:
            return
        self._stop(claim)
        self._recount(claim.id, cost)
        self.used[claim.month] += cost
        self._ended[claim.id] = self._now

    def withdraw(self, claim: Claim) -> None:
        if claim.id in self._ended:
            return
        self._stop(claim)
        self._recount(claim.id, 0)
        self._window.pop(claim.id, None)
        self._ended[claim.id] = self._now

    def renew(self, claim: Claim) -> None:
        if claim.id in self._ended:
            return
        self._stop(claim)
        self._run(claim)
        self._recount(claim.id, claim.cost)

    def _run(self, claim: Claim) -> None:
        self._running[claim.id] = self._now + _LEASE_US, claim
        self._reserved[claim.month] += claim.cost

    def _stop(self, claim: Claim) -> None:
        if self._running.pop(claim.id, None):
            self._reserved[claim.month] -= claim.cost
            if not self._reserved[claim.month]:
                del self._reserved[claim.month]

    def _recount(self, request_id: str, cost: int) -> None:
        """The request counts `cost` in the minute, if it is still of the minute."""
        entry = self._window.get(request_id)
        if entry is not None:
            self._window_cost += cost - entry.cost
            entry.cost = cost

    def _month_cost(self, month: str) -> int:
        return self.used[month] + self._reserved[month]

    def _requests_wait_s(self, claim: Claim) -> float:
        limit = claim.limits.requests_per_minute
        if limit is None or len(self._window) < limit:
            return 0.0
        return self._wait_s(len(self._window) + 1 - limit, lambda _: 1)

    def _cost_wait_s(self, claim: Claim) -> float:
        limit = claim.limits.cost_per_minute
        if limit is None or self._window_cost + claim.cost <= limit:
            return 0.0
        if claim.cost > limit:
            return math.inf
        return self._wait_s(self._window_cost + claim.cost - limit, lambda entry: entry.cost)

    def _wait_s(self, excess: int, weight: Callable[[_Entry], int]) -> float:
        """Until entries that weigh `excess` together have left the minute; infinite if all of them weigh less."""
        for entry in self._window.values():
            excess -= weight(entry)
            if excess <= 0:
                return self._leaves_in_s(entry)
        return math.inf

    def _leaves_in_s(self, entry: _Entry) -> float:
        return (entry.reserved_at + _WINDOW_US - self._now) / MICROSECONDS


def _is_over(limit: int | None, used: int) -> bool:
    return limit is not None and used > limit
