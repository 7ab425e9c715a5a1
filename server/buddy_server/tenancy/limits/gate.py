"""Holds requests to the limits of their tenants' tiers, and says in errors and headers where a tenant stands."""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Iterable, Mapping
from contextlib import suppress
from typing import TypeVar

from buddy_routing.action_space import ActionSpace
from buddy_server.config import LimitSettings
from buddy_server.errors import InsufficientQuota, RateLimited, RedisUnreachable, StoreAway
from buddy_server.metrics import Metrics
from buddy_server.tenancy.limits.limiter import (
    LEASE_S,
    Claim,
    Limiter,
    LimitName,
    Limits,
    Refusal,
    Standing,
)
from buddy_server.tenancy.policy import Tenant, Tier

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_UNSETTLED = 10_000
"""Ended requests of which the limits do not know yet; of older ones the month hears through the ledger alone."""
AGAIN_S = 1.0
"""How often limits that do not answer are asked again."""
_UNITS: Mapping[LimitName, str] = {
    "requests_per_minute": "requests per minute",
    "layer_tokens_per_minute": "layer-tokens per minute",
    "max_concurrent_requests": "requests at the same time",
    "layer_tokens_per_month": "layer-tokens per month",
}


class LimitGate:
    """Reserves at admission and settles at the end. `limiter` counts milli-layers; tiers and clients see layer-tokens,
    which are `actions.full_cost` milli-layers each."""

    def __init__(self, limiter: Limiter, actions: ActionSpace, settings: LimitSettings, metrics: Metrics) -> None:
        self._limiter = limiter
        self._whole = actions.full_cost
        self._refuses = settings.when_unreachable == "refuse"
        self._is_shared = settings.is_shared
        self._metrics = metrics
        self._open: dict[str, Claim] = {}
        self._unsettled: deque[tuple[Claim, int]] = deque(maxlen=MOST_UNSETTLED)
        self.is_reachable = True
        self.returned = asyncio.Event()
        """Set when limits that were away answer again: they may have forgotten what the ledger knows."""

    @property
    def is_ready(self) -> bool:
        """Whether requests may run, as far as limits are concerned."""
        return self.is_reachable or not self._refuses

    def limits(self, tier: Tier) -> Limits:
        return Limits(
            tier.requests_per_minute,
            self._cost(tier.layer_tokens_per_minute),
            tier.max_concurrent_requests,
            self._cost(tier.layer_tokens_per_month),
        )

    async def reserve(self, claim: Claim, tenant: Tenant) -> Mapping[str, str]:
        """Reserve all of `claim`, or nothing. Returns the headers that tell the client what is left.

        Raises RateLimited, InsufficientQuota, or StoreAway if the limits cannot be checked and are required.
        """
        try:
            answer = await self._ask(self._limiter.reserve(claim))
        except RedisUnreachable:
            if self._refuses:
                raise StoreAway("The store of limits") from None
            return {}
        standing = answer.standing if isinstance(answer, Refusal) else answer
        if claim.limits.cost_per_month is not None:
            self._metrics.quota(tenant, standing.month_cost / claim.limits.cost_per_month)
        headers = self._headers(claim.limits, standing)
        if isinstance(answer, Refusal):
            self._metrics.limited(tenant, answer.limit)
            raise self._error(claim, tenant.tier, answer, headers)
        self._open[claim.id] = claim
        return headers

    async def settle(self, claim: Claim, cost: int) -> None:
        """End a reservation, of which `cost` milli-layers were used. If the limits cannot be reached, they are told
        later."""
        if self._open.pop(claim.id, None) is None:
            return
        try:
            await self._ask(self._limiter.settle(claim, cost))
        except RedisUnreachable:
            self._unsettled.append((claim, cost))

    async def withdraw(self, claim: Claim) -> None:
        """Undo the reservation of a request that was refused after all. One that cannot be undone now lapses with its
        lease."""
        if self._open.pop(claim.id, None) is not None:
            with suppress(RedisUnreachable):
                await self._ask(self._limiter.withdraw(claim))

    async def follow_ledger(self, month: str, costs: Mapping[str, int], tenants: Iterable[Tenant]) -> None:
        """Count what the ledger knows of the month, after a restart or when settling has failed, and show it for
        tenants that ask nothing now."""
        with suppress(RedisUnreachable):
            for name, cost in costs.items():
                await self._ask(self._limiter.set_month(name, month, cost))
        for tenant in tenants:
            quota = self.limits(tenant.tier).cost_per_month
            if quota is not None:
                self._metrics.quota(tenant, costs.get(tenant.name, 0) / quota)

    async def run(self) -> None:
        """Renew the leases of open reservations, and settle what could not be settled, until cancelled."""
        while True:
            await asyncio.sleep(LEASE_S / 3 if self.is_reachable else AGAIN_S)
            with suppress(RedisUnreachable):
                await self._ask(self._limiter.ping())
                await self._ask(self._limiter.renew(list(self._open.values())))
                while self._unsettled:
                    await self._ask(self._limiter.settle(*self._unsettled[0]))
                    self._unsettled.popleft()

    async def close(self) -> None:
        await self._limiter.close()

    async def _ask(self, asked: Awaitable[T]) -> T:
        try:
            answer = await asked
        except RedisUnreachable as error:
            if self.is_reachable:
                log.error("limits unreachable", extra={"error": error})
            self.is_reachable = False
            self._metrics.limits_up(is_up=False)
            raise
        if not self.is_reachable:
            log.info("limits reachable again")
            self.is_reachable = True
            self.returned.set()
        if self._is_shared:
            self._metrics.limits_up(is_up=True)
        return answer

    def _cost(self, layer_tokens: int | None) -> int | None:
        return None if layer_tokens is None else layer_tokens * self._whole

    def _headers(self, limits: Limits, standing: Standing) -> dict[str, str]:
        """As OpenAI names them; "tokens" are layer-tokens here."""
        headers = {}
        if limits.requests_per_minute is not None and standing.remaining_requests is not None:
            headers["x-ratelimit-limit-requests"] = str(limits.requests_per_minute)
            headers["x-ratelimit-remaining-requests"] = str(standing.remaining_requests)
            headers["x-ratelimit-reset-requests"] = f"{standing.reset_requests_s:.3f}s"
        if limits.cost_per_minute is not None and standing.remaining_cost is not None:
            headers["x-ratelimit-limit-tokens"] = str(limits.cost_per_minute // self._whole)
            headers["x-ratelimit-remaining-tokens"] = str(standing.remaining_cost // self._whole)
            headers["x-ratelimit-reset-tokens"] = f"{standing.reset_cost_s:.3f}s"
        return headers

    def _left(self, limits: Limits, refusal: Refusal) -> float | None:
        """Layer-tokens that are left of the limit that refused; None if it counts requests."""
        standing = refusal.standing
        if refusal.limit == "layer_tokens_per_month" and limits.cost_per_month is not None:
            return max(0, limits.cost_per_month - standing.month_cost) / self._whole
        if refusal.limit == "layer_tokens_per_minute" and standing.remaining_cost is not None:
            return standing.remaining_cost / self._whole
        return None

    def _error(self, claim: Claim, tier: Tier, refusal: Refusal, headers: dict[str, str]) -> RateLimited:
        message = f"Tier {tier.name!r} has a limit of {getattr(tier, refusal.limit)} for {_UNITS[refusal.limit]}"
        left = self._left(claim.limits, refusal)
        if left is not None:
            message += f"; {left:g} are left, and this request needs up to {claim.cost / self._whole:g}"
        message += "."
        if refusal.limit == "layer_tokens_per_month":
            return InsufficientQuota(f"{message} Requests under way have reserved what they may use.", headers)
        if math.isinf(refusal.retry_after_s):
            return RateLimited(f"{message} Ask for fewer tokens or a smaller budget.", headers, None)
        return RateLimited(f"{message} Try again in {refusal.retry_after_s:.3g} s.", headers, refusal.retry_after_s)
