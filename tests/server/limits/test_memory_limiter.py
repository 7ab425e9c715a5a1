import pytest

from buddy_server.tenancy.limits.limiter import LEASE_S, WINDOW_S, Claim, Limits
from buddy_server.tenancy.limits.memory_limiter import MemoryLimiter
from fakes.clock import Clock

pytestmark = pytest.mark.anyio


async def test_tenants_of_whom_nothing_counts_are_forgotten(clock: Clock) -> None:
    limiter = MemoryLimiter(clock)
    withdrawn, past = Claim("a", "withdrawn", 1, "2098-12", Limits()), Claim("b", "past", 1, "2001-01", Limits())
    unused, used = Claim("c", "unused", 1, "2098-12", Limits()), Claim("d", "used", 1, "2098-12", Limits())
    for claim in (withdrawn, past, unused, used):
        await limiter.reserve(claim)
    await limiter.withdraw(withdrawn)
    await limiter.settle(past, 1)
    await limiter.settle(unused, 0)
    await limiter.settle(used, 1)
    clock.advance(WINDOW_S + LEASE_S)
    await limiter.renew([Claim("e", "other", 1, "2098-12", Limits())])
    assert set(limiter._tenants) == {"used", "other"}
