"""What both limiters do, on a clock of the tests' own."""

import asyncio
import itertools
import math

import pytest

from buddy_server.tenancy.limits.limiter import (
    LEASE_S,
    WINDOW_S,
    Claim,
    Limiter,
    LimitName,
    Limits,
    Refusal,
    Standing,
)
from buddy_server.tenancy.limits.month import seconds_left
from fakes.clock import Clock

pytestmark = pytest.mark.anyio

MONTH = "2098-12"
MICROSECOND_S = 1e-6
_numbers = itertools.count()


def make_claim(cost: int = 1, tenant: str = "acme", month: str = MONTH, **limits: int) -> Claim:
    return Claim(f"r{next(_numbers)}", tenant, cost, month, Limits(**limits))


async def granted(limiter: Limiter, claim: Claim) -> Standing:
    answer = await limiter.reserve(claim)
    assert isinstance(answer, Standing), answer
    return answer


async def refused(limiter: Limiter, claim: Claim) -> Refusal:
    answer = await limiter.reserve(claim)
    assert isinstance(answer, Refusal), answer
    return answer


async def serve(limiter: Limiter, claim: Claim) -> None:
    """A request that uses all it claimed."""
    await granted(limiter, claim)
    await limiter.settle(claim, claim.cost)


async def month_cost(limiter: Limiter, tenant: str = "acme", month: str = MONTH) -> int:
    """By a claim that leaves no trace."""
    probe = make_claim(0, tenant, month)
    standing = await granted(limiter, probe)
    await limiter.withdraw(probe)
    return standing.month_cost


async def minute_cost(limiter: Limiter) -> int:
    probe = make_claim(0, cost_per_minute=10**15)
    standing = await granted(limiter, probe)
    await limiter.withdraw(probe)
    assert standing.remaining_cost is not None
    return 10**15 - standing.remaining_cost


async def test_twenty_requests_at_once_get_ten_of_ten_per_minute(limiter: Limiter) -> None:
    answers = await asyncio.gather(*(limiter.reserve(make_claim(requests_per_minute=10)) for _ in range(20)))
    assert sum(isinstance(answer, Standing) for answer in answers) == 10


async def test_any_sixty_seconds_hold_no_more_than_the_limit(limiter: Limiter, clock: Clock) -> None:
    await serve(limiter, make_claim(requests_per_minute=2))
    clock.advance(WINDOW_S - 10)
    await serve(limiter, make_claim(requests_per_minute=2))
    refusal = await refused(limiter, make_claim(requests_per_minute=2))
    assert (refusal.limit, refusal.retry_after_s) == ("requests_per_minute", 10)
    clock.advance(10 - MICROSECOND_S)
    await refused(limiter, make_claim(requests_per_minute=2))
    clock.advance(MICROSECOND_S)
    await serve(limiter, make_claim(requests_per_minute=2))
    assert (await refused(limiter, make_claim(requests_per_minute=2))).retry_after_s == pytest.approx(WINDOW_S - 10)


async def test_standing_says_what_is_left(limiter: Limiter, clock: Clock) -> None:
    limits = {"requests_per_minute": 3, "cost_per_minute": 100}
    assert await granted(limiter, make_claim(30, **limits)) == Standing(2, WINDOW_S, 70, WINDOW_S, 30)
    clock.advance(10)
    refusal = await refused(limiter, make_claim(71, **limits))
    assert refusal.standing == Standing(2, WINDOW_S - 10, 70, WINDOW_S - 10, 30)
    assert await granted(limiter, make_claim(50)) == Standing(None, WINDOW_S, None, WINDOW_S, 80)


async def test_limit_that_was_lowered_leaves_nothing_not_less(limiter: Limiter) -> None:
    for _ in range(3):
        await serve(limiter, make_claim(10))
    refusal = await refused(limiter, make_claim(10, requests_per_minute=2, cost_per_minute=20))
    assert (refusal.standing.remaining_requests, refusal.standing.remaining_cost) == (0, 0)


async def test_refusal_of_an_empty_window_has_nothing_to_reset(limiter: Limiter) -> None:
    assert await refused(limiter, make_claim(2, cost_per_minute=1)) == Refusal(
        "layer_tokens_per_minute", math.inf, Standing(None, 0, 1, 0, 0)
    )


@pytest.mark.parametrize("limit", [7, 10**15])
async def test_cost_limit_is_exact_to_one_milli_layer(limiter: Limiter, limit: int) -> None:
    await granted(limiter, make_claim(limit - 3, cost_per_minute=limit, cost_per_month=limit))
    assert (await refused(limiter, make_claim(4, cost_per_minute=limit))).limit == "layer_tokens_per_minute"
    assert (await refused(limiter, make_claim(4, cost_per_month=limit))).limit == "layer_tokens_per_month"
    standing = await granted(limiter, make_claim(3, cost_per_minute=limit, cost_per_month=limit))
    assert (standing.remaining_cost, standing.month_cost) == (0, limit)


async def test_settling_frees_what_was_not_used(limiter: Limiter, clock: Clock) -> None:
    claim = make_claim(100, cost_per_minute=100, cost_per_month=100)
    await granted(limiter, claim)
    await refused(limiter, make_claim(1, cost_per_minute=100))
    clock.advance(10)
    await limiter.settle(claim, 40)
    standing = await granted(limiter, make_claim(60, cost_per_minute=100, cost_per_month=100))
    assert (standing.remaining_cost, standing.month_cost) == (0, 100)
    # What was used counts from the reservation on.
    refusal = await refused(limiter, make_claim(40, cost_per_minute=100))
    assert refusal.retry_after_s == WINDOW_S - 10


async def test_request_that_runs_longer_than_a_minute_counts_as_running_alone(limiter: Limiter, clock: Clock) -> None:
    claim = make_claim(100)
    await granted(limiter, claim)
    for _ in range(8):
        clock.advance(LEASE_S / 2)
        await limiter.renew([claim])
    assert (await refused(limiter, make_claim(concurrent_requests=1))).limit == "max_concurrent_requests"
    assert await minute_cost(limiter) == 0
    assert await month_cost(limiter) == 100
    await limiter.settle(claim, 70)
    assert await minute_cost(limiter) == 0
    assert await month_cost(limiter) == 70


async def test_running_requests_are_limited_until_they_end(limiter: Limiter) -> None:
    claims = [make_claim(concurrent_requests=2) for _ in range(3)]
    await granted(limiter, claims[0])
    await granted(limiter, claims[1])
    refusal = await refused(limiter, claims[2])
    assert (refusal.limit, refusal.retry_after_s) == ("max_concurrent_requests", 1.0)
    await limiter.settle(claims[0], 1)
    await granted(limiter, claims[2])


async def test_claim_over_one_of_several_limits_reserves_nothing(limiter: Limiter) -> None:
    claim = make_claim(60, requests_per_minute=10, cost_per_minute=100, concurrent_requests=10, cost_per_month=1000)
    await granted(limiter, claim)
    for limits in ({"cost_per_minute": 100}, {"concurrent_requests": 1}, {"cost_per_month": 100}):
        await refused(limiter, make_claim(60, **{"requests_per_minute": 10, **limits}))
    assert await month_cost(limiter) == 60
    standing = await granted(limiter, make_claim(40, requests_per_minute=2, cost_per_minute=100, concurrent_requests=2))
    assert (standing.remaining_requests, standing.remaining_cost) == (0, 0)


async def test_refusal_is_that_of_the_limit_that_waits_longest(limiter: Limiter, clock: Clock) -> None:
    await granted(limiter, make_claim(10))
    clock.advance(1)
    await granted(limiter, make_claim(10))
    waits_s = {
        "cost_per_month": pytest.approx(seconds_left(MONTH), abs=5),
        "cost_per_minute": WINDOW_S,
        "requests_per_minute": WINDOW_S - 1,
        "concurrent_requests": 1,
    }
    limits = {"cost_per_month": 25, "cost_per_minute": 15, "requests_per_minute": 2, "concurrent_requests": 2}
    named: list[LimitName] = []
    for field, wait_s in waits_s.items():
        refusal = await refused(limiter, make_claim(10, **limits))
        assert refusal.retry_after_s == wait_s
        named.append(refusal.limit)
        del limits[field]
    assert named == [
        "layer_tokens_per_month", "layer_tokens_per_minute", "requests_per_minute", "max_concurrent_requests"
    ]  # fmt: skip


async def test_refusal_names_the_first_of_limits_that_wait_equally_long(limiter: Limiter) -> None:
    await granted(limiter, make_claim(10))
    refusal = await refused(limiter, make_claim(10, requests_per_minute=1, cost_per_minute=10))
    assert (refusal.limit, refusal.retry_after_s) == ("requests_per_minute", WINDOW_S)


@pytest.mark.parametrize("limits", [{"requests_per_minute": 3}, {"cost_per_minute": 60}])
async def test_claim_passes_after_retry_after_and_not_before(
    limiter: Limiter, clock: Clock, limits: dict[str, int]
) -> None:
    for cost, pause_s in ((5, 0.3), (20, 1.7), (0, 11.11), (30, 2.000001), (5, 3.3)):
        await serve(limiter, make_claim(cost))
        clock.advance(pause_s)
    claim = make_claim(30, **limits)
    retry_after_s = (await refused(limiter, claim)).retry_after_s
    assert 0 < retry_after_s < WINDOW_S
    clock.advance(retry_after_s - 2 * MICROSECOND_S)
    await refused(limiter, claim)
    clock.advance(2 * MICROSECOND_S)
    await granted(limiter, claim)


@pytest.mark.parametrize("limits", [{"cost_per_minute": 60}, {"cost_per_month": 60}, {"requests_per_minute": 0}])
async def test_claim_that_no_wait_helps_waits_for_ever(limiter: Limiter, limits: dict[str, int]) -> None:
    assert (await refused(limiter, make_claim(61, **limits))).retry_after_s == math.inf


async def test_lease_that_nobody_renews_frees_all_but_the_request_itself(limiter: Limiter, clock: Clock) -> None:
    limits = {"requests_per_minute": 2, "cost_per_minute": 100, "concurrent_requests": 1, "cost_per_month": 100}
    await granted(limiter, make_claim(100, **limits))
    clock.advance(LEASE_S - MICROSECOND_S)
    assert (await refused(limiter, make_claim(100, **limits))).limit == "layer_tokens_per_month"
    clock.advance(MICROSECOND_S)
    standing = await granted(limiter, make_claim(100, **limits))
    assert (standing.remaining_requests, standing.remaining_cost, standing.month_cost) == (0, 0, 100)


async def test_renewed_lease_holds(limiter: Limiter, clock: Clock) -> None:
    claims = [make_claim(10), make_claim(10), make_claim(10, tenant="hobby")]
    for claim in claims:
        await granted(limiter, claim)
    clock.advance(LEASE_S / 2)
    await limiter.renew([claims[0], claims[2]])
    clock.advance(LEASE_S / 2)
    assert await month_cost(limiter) == await month_cost(limiter, "hobby") == 10
    clock.advance(LEASE_S / 2)
    assert await month_cost(limiter) == await month_cost(limiter, "hobby") == 0


async def test_request_that_still_runs_after_its_lease_counts_again(limiter: Limiter, clock: Clock) -> None:
    """As after a minute without Redis."""
    claim = make_claim(10)
    await granted(limiter, claim)
    clock.advance(LEASE_S)
    assert await month_cost(limiter) == await minute_cost(limiter) == 0
    await limiter.renew([claim])
    assert await month_cost(limiter) == await minute_cost(limiter) == 10
    await refused(limiter, make_claim(concurrent_requests=1))


async def test_settling_after_the_lease_still_counts(limiter: Limiter, clock: Clock) -> None:
    soon, late = make_claim(100), make_claim(100)
    await granted(limiter, soon)
    await granted(limiter, late)
    clock.advance(LEASE_S)
    await limiter.settle(soon, 30)
    assert await minute_cost(limiter) == await month_cost(limiter) == 30
    clock.advance(WINDOW_S)
    await limiter.settle(late, 40)
    assert await minute_cost(limiter) == 0
    assert await month_cost(limiter) == 70


async def test_settling_twice_counts_once(limiter: Limiter, clock: Clock) -> None:
    claim = make_claim(100)
    await granted(limiter, claim)
    await limiter.settle(claim, 30)
    clock.advance(LEASE_S)
    await limiter.settle(claim, 50)
    await limiter.renew([claim])
    await limiter.withdraw(claim)
    assert await minute_cost(limiter) == await month_cost(limiter) == 30


async def test_settling_twice_counts_once_after_more_than_a_minute(limiter: Limiter, clock: Clock) -> None:
    claim = make_claim(100)
    await granted(limiter, claim)
    clock.advance(WINDOW_S)
    await limiter.settle(claim, 30)
    clock.advance(WINDOW_S / 2)
    await limiter.settle(claim, 30)
    assert await month_cost(limiter) == 30


async def test_request_may_use_more_than_it_reserved(limiter: Limiter) -> None:
    claim = make_claim(10)
    await granted(limiter, claim)
    await limiter.settle(claim, 25)
    assert await minute_cost(limiter) == await month_cost(limiter) == 25


async def test_withdrawing_leaves_no_trace(limiter: Limiter, clock: Clock) -> None:
    limits = {"requests_per_minute": 1, "cost_per_minute": 10, "concurrent_requests": 1, "cost_per_month": 10}
    claim = make_claim(10, **limits)
    await granted(limiter, claim)
    clock.advance(1)
    await limiter.withdraw(claim)
    await limiter.withdraw(claim)
    await limiter.renew([claim])
    refusal = await refused(limiter, make_claim(11, **limits))
    assert refusal.standing == Standing(1, 0, 10, 0, 0)
    await granted(limiter, make_claim(10, **limits))


async def test_withdrawing_after_the_lease_leaves_no_trace(limiter: Limiter, clock: Clock) -> None:
    claim = make_claim(10)
    await granted(limiter, claim)
    clock.advance(LEASE_S)
    await limiter.withdraw(claim)
    assert (await granted(limiter, make_claim(1, requests_per_minute=1, cost_per_minute=1))).month_cost == 1


async def test_each_month_and_tenant_counts_for_itself(limiter: Limiter) -> None:
    await serve(limiter, make_claim(10, cost_per_month=10))
    await granted(limiter, make_claim(10, month="2099-01", cost_per_month=10))
    await granted(limiter, make_claim(10, tenant="hobby", cost_per_month=10))
    refusal = await refused(limiter, make_claim(1, cost_per_month=10))
    assert refusal.limit == "layer_tokens_per_month"
    assert refusal.retry_after_s == pytest.approx(seconds_left(MONTH), abs=5)
    assert refusal.standing.month_cost == 10


async def test_request_settles_in_the_month_it_began_in(limiter: Limiter) -> None:
    claim = make_claim(10)
    await granted(limiter, claim)
    await granted(limiter, make_claim(1, month="2099-01"))
    await limiter.settle(claim, 7)
    assert await month_cost(limiter) == 7


async def test_month_is_only_raised_to_what_the_ledger_knows(limiter: Limiter) -> None:
    running = make_claim(5)
    await granted(limiter, running)
    for cost, total in ((100, 100), (99, 100), (0, 100), (10**15, 10**15)):
        await limiter.set_month("acme", MONTH, cost)
        assert await month_cost(limiter) == total + 5
    await limiter.settle(running, 3)
    assert await month_cost(limiter) == 10**15 + 3


async def test_ids_may_hold_any_character(limiter: Limiter, clock: Clock) -> None:
    claim = Claim("chatcmpl:1:ü {x}", "a.b-c_d", 10, MONTH, Limits())
    await granted(limiter, claim)
    clock.advance(LEASE_S)
    await limiter.settle(claim, 4)
    assert await month_cost(limiter, "a.b-c_d") == 4
