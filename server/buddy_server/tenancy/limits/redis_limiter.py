"""Limits counted in Redis, for several server processes. Each operation is one Lua script, which Redis runs alone."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

from redis.commands.core import AsyncScript

from buddy_server.redis_connection import RedisConnection
from buddy_server.tenancy.limits.answer import MICROSECONDS, Count, answer
from buddy_server.tenancy.limits.limiter import LEASE_S, WINDOW_S, Claim, Refusal, Standing

_KEPT_MS = 300_000
"""How long Redis keeps a tenant who asks nothing: longer than the minute and the leases count."""
_MONTH_KEPT_MS = 40 * 24 * 3600 * 1000
_NEVER = -1
"""A script's word for an infinite wait."""


class RedisLimiter:
    """A Limiter whose times are those of Redis, so that servers with different clocks agree. `whole` is one layer-token
    in milli-layers: servers whose models differ in it share a Redis, but no counts. `clock`, in seconds, takes the
    place of Redis's clock in tests."""

    def __init__(self, url: str, whole: int, clock: Callable[[], float] | None = None) -> None:
        """Raises ConfigError for a URL of another form."""
        self._whole = whole
        self._clock = clock
        self._connection = RedisConnection(url)
        self._reserve = self._script("reserve")
        self._settle = self._script("settle")
        self._withdraw = self._script("withdraw")
        self._renew = self._script("renew")
        self._set_month = self._connection.redis.register_script(_text("set_month"))

    async def reserve(self, claim: Claim) -> Standing | Refusal:
        limits = claim.limits
        bounds = (
            limits.requests_per_minute,
            limits.cost_per_minute,
            limits.concurrent_requests,
            limits.cost_per_month,
        )
        args = [*_words(claim), *("" if bound is None else bound for bound in bounds)]
        keys = [*self._keys(claim.tenant), self._month_key(claim.tenant, claim.month)]
        requests_us, cost_us, over_running, over_month, num_requests, cost, reset_us, month_cost = await self._run(
            self._reserve, keys, self._times() + args
        )
        count = Count(
            requests_wait_s=_seconds(requests_us),
            cost_wait_s=_seconds(cost_us),
            is_over_running=bool(over_running),
            is_over_month=bool(over_month),
            num_requests=num_requests,
            cost=cost,
            reset_s=_seconds(reset_us),
            month_cost=month_cost,
        )
        return answer(claim, count)

    async def settle(self, claim: Claim, cost: int) -> None:
        keys = [*self._keys(claim.tenant), self._month_key(claim.tenant, claim.month)]
        await self._run(self._settle, keys, [*self._times(), *_words(claim), cost, _MONTH_KEPT_MS])

    async def withdraw(self, claim: Claim) -> None:
        await self._run(self._withdraw, self._keys(claim.tenant), self._times() + _words(claim))

    async def renew(self, claims: list[Claim]) -> None:
        words: dict[str, list[str | int]] = defaultdict(list)
        for claim in claims:
            words[claim.tenant] += _words(claim)
        for tenant, args in words.items():
            await self._run(self._renew, self._keys(tenant), self._times() + args)

    async def set_month(self, tenant: str, month: str, cost: int) -> None:
        await self._run(self._set_month, [self._month_key(tenant, month)], [cost, _MONTH_KEPT_MS])

    async def ping(self) -> None:
        await self._connection.ask(self._connection.redis.ping)

    async def close(self) -> None:
        await self._connection.close()

    def _script(self, name: str) -> AsyncScript:
        return self._connection.redis.register_script(_text("tenant") + _text(name))

    def _keys(self, tenant: str) -> list[str]:
        """In the order of tenant.lua."""
        return [self._key(tenant, name) for name in ("window", "costs", "leases", "ended", "sums")]

    def _month_key(self, tenant: str, month: str) -> str:
        return self._key(tenant, f"month:{month}")

    def _key(self, tenant: str, name: str) -> str:
        # The braces have a cluster keep a tenant's keys together.
        return f"buddy:{self._whole}:{{{tenant}}}:{name}"

    def _times(self) -> list[str | int]:
        """The first arguments of every script that counts a tenant's use: see tenant.lua."""
        now = "" if self._clock is None else round(self._clock() * MICROSECONDS)
        return [now, round(WINDOW_S * MICROSECONDS), round(LEASE_S * MICROSECONDS), _KEPT_MS]

    async def _run(self, script: AsyncScript, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        return await self._connection.ask(partial(script, keys, args))


def _text(script: str) -> str:
    return files(__package__).joinpath(f"{script}.lua").read_text(encoding="utf-8")


def _words(claim: Claim) -> list[str | int]:
    return [claim.month, claim.cost, claim.id]


def _seconds(microseconds: int) -> float:
    return math.inf if microseconds == _NEVER else microseconds / MICROSECONDS
