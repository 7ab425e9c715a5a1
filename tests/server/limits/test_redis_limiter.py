"""Redis alone: several servers, its own clock, and what is left when it is away."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from buddy_server.config import LimitSettings
from buddy_server.errors import ConfigError, RedisUnreachable
from buddy_server.tenancy.limits.build import make_limiter
from buddy_server.tenancy.limits.limiter import (
    LEASE_S,
    WINDOW_S,
    Claim,
    Limits,
    Refusal,
    Standing,
)
from buddy_server.tenancy.limits.memory_limiter import MemoryLimiter
from buddy_server.tenancy.limits.redis_limiter import RedisLimiter
from fakes.clock import Clock
from redis_process import RedisProcess, needs_redis, redis_process

pytestmark = pytest.mark.anyio

MONTH = "2098-12"
WHOLE = 8000
"""One layer-token in milli-layers, for a model with 8 layers."""
UNREACHABLE_S = 2.0
"""Within which everyone hears that Redis is away."""


def make_claim(name: str, cost: int = 1, tenant: str = "acme", **limits: int) -> Claim:
    return Claim(name, tenant, cost, MONTH, Limits(**limits))


@pytest.fixture
async def servers(redis: RedisProcess) -> AsyncIterator[tuple[RedisLimiter, RedisLimiter]]:
    """The limiters of two server processes."""
    limiters = RedisLimiter(redis.url, WHOLE), RedisLimiter(redis.url, WHOLE)
    yield limiters
    for limiter in limiters:
        await limiter.close()


@pytest.fixture
def own_redis() -> Iterator[RedisProcess]:
    """One that a test may kill."""
    with redis_process() as process:
        yield process


async def unreachable(limiter: RedisLimiter) -> list[str]:
    """The errors of every operation, more of them at once than there are connections."""
    claim, start = make_claim("unreachable"), time.monotonic()
    errors = await asyncio.gather(
        limiter.settle(claim, 1),
        limiter.withdraw(claim),
        limiter.renew([claim]),
        limiter.set_month("acme", MONTH, 1),
        *(limiter.reserve(make_claim(f"unreachable{number}")) for number in range(50)),
        return_exceptions=True,
    )
    assert time.monotonic() - start < UNREACHABLE_S
    for error in errors:
        assert isinstance(error, RedisUnreachable)
        assert re.match(r"Redis at 127\.0\.0\.1:\d+ does not answer: \w+", str(error))
    return list(map(str, errors))


@needs_redis
async def test_two_servers_share_a_limit(servers: tuple[RedisLimiter, RedisLimiter]) -> None:
    claims = [make_claim(f"r{number}", requests_per_minute=10, concurrent_requests=15) for number in range(20)]
    answers = await asyncio.gather(*(servers[number % 2].reserve(claim) for number, claim in enumerate(claims)))
    assert sum(isinstance(answer, Standing) for answer in answers) == 10
    await servers[0].withdraw(
        next(c for c, answer in zip(claims, answers, strict=True) if isinstance(answer, Standing))
    )
    assert isinstance(await servers[1].reserve(make_claim("last", requests_per_minute=10)), Standing)


@needs_redis
async def test_servers_whose_models_differ_in_layers_count_apart(redis: RedisProcess) -> None:
    shallow, deep = RedisLimiter(redis.url, 8000), RedisLimiter(redis.url, 16000)
    for limiter in (shallow, deep):
        # The same layer-token is twice the cost in a model of twice the depth.
        standing = await limiter.reserve(make_claim(f"{limiter}", cost=8000, cost_per_month=8000))
        assert isinstance(standing, Standing)
        assert standing.month_cost == 8000
        await limiter.close()


@needs_redis
async def test_hundreds_of_requests_at_once_are_all_answered(servers: tuple[RedisLimiter, RedisLimiter]) -> None:
    claims = [make_claim(f"r{number}", requests_per_minute=200) for number in range(400)]
    answers = await asyncio.gather(*(servers[number % 2].reserve(claim) for number, claim in enumerate(claims)))
    assert sum(isinstance(answer, Standing) for answer in answers) == 200


@needs_redis
async def test_no_request_waits_while_many_later_ones_go_first(servers: tuple[RedisLimiter, RedisLimiter]) -> None:
    num_turns = 20
    turns, behind = [0] * 40, []

    async def ask_again_and_again(client: int) -> None:
        for turn in range(num_turns):
            await servers[0].reserve(make_claim(f"{client}-{turn}"))
            turns[client] += 1
        behind.append(num_turns - min(turns))

    await asyncio.gather(*map(ask_again_and_again, range(len(turns))))
    assert max(behind) <= 5


@needs_redis
async def test_time_is_that_of_redis(redis: RedisProcess, servers: tuple[RedisLimiter, RedisLimiter]) -> None:
    with redis.client() as client:
        before = client.time()
        await servers[0].reserve(make_claim("first", requests_per_minute=1))
        [(_, reserved_at)] = client.zrange("buddy:8000:{acme}:window", 0, -1, withscores=True)
        after = client.time()
    assert before[0] * 10**6 + before[1] <= reserved_at <= after[0] * 10**6 + after[1]
    waits_s = []
    for name in ("second", "third"):
        refusal = await servers[1].reserve(make_claim(name, requests_per_minute=1))
        assert isinstance(refusal, Refusal)
        waits_s.append(refusal.retry_after_s)
    assert WINDOW_S > waits_s[0] > waits_s[1] > WINDOW_S - 10


@needs_redis
async def test_every_key_expires_and_names_its_tenant(redis: RedisProcess) -> None:
    limiter = RedisLimiter(redis.url, WHOLE)
    for number in range(3):
        await limiter.reserve(make_claim(f"r{number}"))
    await limiter.settle(make_claim("r0"), 1)
    await limiter.set_month("acme", "2099-01", 1)
    await limiter.close()
    with redis.client() as client:
        lifetimes_s = {key: client.ttl(key) for key in client.scan_iter()}
    months = {key for key in lifetimes_s if ":month:" in key}
    assert months == {"buddy:8000:{acme}:month:2098-12", "buddy:8000:{acme}:month:2099-01"}
    assert {key for key in lifetimes_s if key not in months} == {
        f"buddy:8000:{{acme}}:{name}" for name in ("window", "costs", "leases", "ended", "sums")
    }
    for key, lifetime_s in lifetimes_s.items():
        assert WINDOW_S + LEASE_S < lifetime_s <= (40 * 86400 if key in months else 600)


@needs_redis
async def test_nothing_is_left_of_requests_that_no_longer_count(redis: RedisProcess, clock: Clock) -> None:
    limiter = RedisLimiter(redis.url, WHOLE, clock)
    for number in range(50):
        claim = make_claim(f"r{number}", cost=number)
        await limiter.reserve(claim)
        clock.advance(0.7)
        if number % 3 == 0:
            await limiter.settle(claim, number // 2)
    clock.advance(WINDOW_S + LEASE_S)
    await limiter.reserve(make_claim("refused", cost=2, cost_per_minute=1))
    await limiter.close()
    with redis.client() as client:
        assert list(client.scan_iter()) == [f"buddy:8000:{{acme}}:month:{MONTH}"]


@needs_redis
async def test_redis_that_was_away_works_again(own_redis: RedisProcess) -> None:
    limiter = RedisLimiter(own_redis.url, WHOLE)
    running = make_claim("running", cost=7)
    await asyncio.gather(limiter.reserve(running), *(limiter.reserve(make_claim(f"r{n}")) for n in range(30)))
    own_redis.kill()
    assert own_redis.password not in "".join(await unreachable(limiter))
    own_redis.start()
    answers = [await limiter.reserve(make_claim(f"new{n}", requests_per_minute=10)) for n in range(11)]
    assert [isinstance(answer, Standing) for answer in answers] == [True] * 10 + [False]
    # It kept nothing: a running request counts from its next renewal on, and in its month.
    await limiter.renew([running])
    standing = await limiter.reserve(make_claim("next", cost=0))
    assert isinstance(standing, Standing)
    assert standing.month_cost == 10 + 7
    await limiter.settle(running, 5)
    standing = await limiter.reserve(make_claim("last", cost=0))
    assert isinstance(standing, Standing)
    assert standing.month_cost == 10 + 5
    await limiter.close()


@needs_redis
async def test_redis_that_was_away_while_nobody_asked_is_never_missed(own_redis: RedisProcess) -> None:
    limiter = RedisLimiter(own_redis.url, WHOLE)
    for turn in range(2):
        # Many at once, for many connections.
        claims = [make_claim(f"turn{turn}-{n}") for n in range(30)]
        assert all(isinstance(answer, Standing) for answer in await asyncio.gather(*map(limiter.reserve, claims)))
        own_redis.kill()
        # Meanwhile the event loop hears that connections are closed.
        await asyncio.to_thread(own_redis.start)
    await limiter.close()


@needs_redis
async def test_redis_that_hangs_is_unreachable_in_time(own_redis: RedisProcess) -> None:
    limiter = RedisLimiter(own_redis.url, WHOLE)
    await limiter.reserve(make_claim("before"))
    os.kill(own_redis.pid, signal.SIGSTOP)
    try:
        await unreachable(limiter)
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)
    assert isinstance(await limiter.reserve(make_claim("after")), Standing)
    await limiter.close()


@needs_redis
async def test_cancelled_operations_leave_no_answer_for_the_next(
    servers: tuple[RedisLimiter, RedisLimiter],
) -> None:
    """A client may leave at any moment."""
    for turn in range(60):
        claims = [make_claim(f"{turn}-{n}", tenant=f"t{n}", cost_per_minute=n) for n in range(1, 20)]
        tasks = [asyncio.create_task(servers[0].reserve(claim)) for claim in claims]
        for _ in range(turn):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for claim, answer in zip(claims[1::2], answers[1::2], strict=True):
            # remaining_cost tells whose answer it is: costs are 1, and one is reserved in each turn, up to the limit.
            standing = answer.standing if isinstance(answer, Refusal) else answer
            assert isinstance(standing, Standing)
            assert claim.limits.cost_per_minute is not None
            assert standing.remaining_cost == max(0, claim.limits.cost_per_minute - turn - 1)


@needs_redis
async def test_scripts_are_loaded_again_when_redis_forgot_them(
    redis: RedisProcess, servers: tuple[RedisLimiter, RedisLimiter]
) -> None:
    await servers[0].reserve(make_claim("first", requests_per_minute=1))
    with redis.client() as client:
        client.script_flush()
    assert isinstance(await servers[0].reserve(make_claim("second", requests_per_minute=1)), Refusal)


@needs_redis
async def test_password_is_in_no_error_and_no_repr(redis: RedisProcess) -> None:
    settings = LimitSettings(redis.url.replace(redis.password, "guessed-secret"))
    limiter = RedisLimiter(settings.url, WHOLE)
    for text in (*await unreachable(limiter), repr(limiter), repr(settings)):
        assert "guessed-secret" not in text
    await limiter.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sec/ret@host:6379/0",
        "redis://:sec#ret@host:6379/0",
        "redis://:123/secret@host",
        "redis://:123?secret@host",
        "redis://:secret@host:port/0",
        "redis://:secret@host:6379/zero",
        "redis://:secret@host:6379/0?socket_timeout=secret",
        "redis://:secret@host:6379/0?unknown=1",
    ],
)
def test_url_of_another_form_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"limits\.url: is not the URL of a Redis; allowed is redis://") as refused:
        make_limiter(LimitSettings(url), WHOLE)
    assert not re.search("sec|ret|123", str(refused.value))


async def test_settings_choose_the_limiter() -> None:
    assert isinstance(make_limiter(LimitSettings(), WHOLE), MemoryLimiter)
    for url in ("redis://h", "rediss://user:p%2Fw@h:1/2?ssl_cert_reqs=none", "unix:///run/redis.sock?db=1"):
        limiter = make_limiter(LimitSettings(url), WHOLE)
        assert isinstance(limiter, RedisLimiter)
        await limiter.close()


def test_limits_in_memory_load_no_redis_client() -> None:
    code = (
        "import sys; from buddy_server.config import LimitSettings; from buddy_server.tenancy.limits.build import "
        "make_limiter; make_limiter(LimitSettings(), 8000); assert 'redis' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
