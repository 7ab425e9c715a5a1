from collections.abc import AsyncIterator, Iterator

import pytest

from buddy_server.tenancy.limits.limiter import Limiter
from buddy_server.tenancy.limits.memory_limiter import MemoryLimiter
from buddy_server.tenancy.limits.redis_limiter import RedisLimiter
from fakes.clock import Clock
from redis_process import RedisProcess, needs_redis, redis_process


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisProcess]:
    with redis_process() as process:
        yield process


@pytest.fixture
def redis(shared_redis: RedisProcess) -> RedisProcess:
    """Empty."""
    with shared_redis.client() as client:
        client.flushall()
    return shared_redis


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
async def limiter(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Limiter]:
    """Each kind, on the test's clock."""
    if request.param == "memory":
        limiter: Limiter = MemoryLimiter(clock)
    else:
        limiter = RedisLimiter(request.getfixturevalue("redis").url, 8000, clock)
    yield limiter
    await limiter.close()
