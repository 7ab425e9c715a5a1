"""Random operations: both limiters answer as a model does that keeps every request and counts anew each time."""

import math
import random
from dataclasses import dataclass, replace

import pytest

from buddy_server.tenancy.limits.limiter import LEASE_S, WINDOW_S, Claim, Limiter, LimitName, Limits, Refusal, Standing
from fakes.clock import Clock

pytestmark = pytest.mark.anyio

MONTHS = ("2098-11", "2098-12")
TICK_S = 0.25
"""The test's time passes in steps that floats hold exactly."""
NUM_OPERATIONS = 1500


@dataclass
class Record:
    claim: Claim
    reserved_at: float
    lapses_at: float
    used: int | None = None
    """Once settled."""
    settled_at: float = math.inf


class Model:
    """One tenant."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.records: dict[str, Record] = {}
        self.floors = dict.fromkeys(MONTHS, 0)
        """What set_month added to what was settled."""

    def is_running(self, record: Record) -> bool:
        return record.used is None and record.lapses_at > self.clock()

    def cost(self, record: Record) -> int:
        if record.used is not None:
            return record.used
        return record.claim.cost if self.is_running(record) else 0

    def window(self) -> list[Record]:
        return [record for record in self.records.values() if record.reserved_at > self.clock() - WINDOW_S]

    def settled(self, month: str) -> int:
        mine = [record for record in self.records.values() if record.claim.month == month]
        return self.floors[month] + sum(record.used or 0 for record in mine)

    def month_cost(self, month: str) -> int:
        mine = [record for record in self.records.values() if record.claim.month == month]
        return self.settled(month) + sum(record.claim.cost for record in mine if self.is_running(record))

    def known(self) -> list[Claim]:
        """Some that run or have run. A limiter may forget what was settled more than a minute ago."""
        last = list(self.records.values())[-12:]
        return [record.claim for record in last if record.settled_at > self.clock() - WINDOW_S]

    def refusals(self, claim: Claim) -> dict[LimitName, float]:
        """The month's waits are infinite here."""
        limits, window, refused = claim.limits, self.window(), dict[LimitName, float]()
        if limits.requests_per_minute is not None:
            wait_s = self.wait_s(len(window) + 1 - limits.requests_per_minute, [1] * len(window))
            refused |= {"requests_per_minute": wait_s} if wait_s else {}
        if limits.cost_per_minute is not None:
            costs = [self.cost(record) for record in window]
            wait_s = self.wait_s(sum(costs) + claim.cost - limits.cost_per_minute, costs)
            refused |= {"layer_tokens_per_minute": wait_s} if wait_s else {}
        if limits.concurrent_requests is not None:
            running = sum(map(self.is_running, self.records.values()))
            refused |= {"max_concurrent_requests": 1.0} if running >= limits.concurrent_requests else {}
        if limits.cost_per_month is not None and self.month_cost(claim.month) + claim.cost > limits.cost_per_month:
            refused["layer_tokens_per_month"] = math.inf
        return refused

    def wait_s(self, excess: int, weights: list[int]) -> float:
        if excess <= 0:
            return 0
        for record, weight in zip(self.window(), weights, strict=True):
            excess -= weight
            if excess <= 0:
                return record.reserved_at + WINDOW_S - self.clock()
        return math.inf

    def reserve(self, claim: Claim) -> Standing | Refusal:
        refused = self.refusals(claim)
        if not refused:
            self.records[claim.id] = Record(claim, self.clock(), self.clock() + LEASE_S)
        window, limits = self.window(), claim.limits
        reset_s = window[-1].reserved_at + WINDOW_S - self.clock() if window else 0.0
        requests, cost = limits.requests_per_minute, limits.cost_per_minute
        standing = Standing(
            None if requests is None else max(0, requests - len(window)),
            reset_s,
            None if cost is None else max(0, cost - sum(map(self.cost, window))),
            reset_s,
            self.month_cost(claim.month),
        )
        if not refused:
            return standing
        longest = max(refused, key=lambda limit: refused[limit])
        return Refusal(longest, refused[longest], standing)

    def renew(self, claims: list[Claim]) -> None:
        for claim in claims:
            if self.records[claim.id].used is None:
                self.records[claim.id].lapses_at = self.clock() + LEASE_S

    def settle(self, claim: Claim, cost: int) -> None:
        if self.records[claim.id].used is None:
            self.records[claim.id].used = cost
            self.records[claim.id].settled_at = self.clock()

    def set_month(self, month: str, cost: int) -> None:
        self.floors[month] += max(0, cost - self.settled(month))


def random_limits(rng: random.Random) -> Limits:
    return Limits(
        requests_per_minute=rng.choice([None, None, 5, 20, 40]),
        cost_per_minute=rng.choice([None, None, 60, 400, 1000]),
        concurrent_requests=rng.choice([None, None, 1, 5, 10]),
        cost_per_month=rng.choice([None, None, None, 10_000, 10**15]),
    )


@pytest.mark.parametrize("seed", range(4))
async def test_random_operations_are_answered_as_the_model_does(limiter: Limiter, clock: Clock, seed: int) -> None:
    rng = random.Random(seed)
    model = Model(clock)
    for number in range(NUM_OPERATIONS):
        clock.advance(TICK_S * rng.choice([0, 0, 0, 1, 1, 2, 4, 30]))
        known = model.known()
        operation = rng.choice(["reserve", "reserve", "reserve", "settle", "settle", "withdraw", "renew", "set_month"])
        if operation == "reserve":
            claim = Claim(f"r{number}", "acme", rng.choice([0, 1, 20, 70]), rng.choice(MONTHS), random_limits(rng))
            given, expected = await limiter.reserve(claim), model.reserve(claim)
            if isinstance(given, Refusal) and model.refusals(claim).get("layer_tokens_per_month"):
                given = replace(given, retry_after_s=math.inf)
            assert given == expected, f"operation {number}"
        elif operation == "settle" and known:
            claim, cost = rng.choice(known), rng.randrange(80)
            await limiter.settle(claim, cost)
            model.settle(claim, cost)
        elif operation == "withdraw" and known:
            claim = rng.choice(known)
            await limiter.withdraw(claim)
            if model.records[claim.id].used is None:
                del model.records[claim.id]
        elif operation == "renew":
            await limiter.renew(known[::2])
            model.renew(known[::2])
        elif operation == "set_month" and number % 5 == 0:
            month, cost = rng.choice(MONTHS), rng.randrange(2 * number)
            await limiter.set_month("acme", month, cost)
            model.set_month(month, cost)
