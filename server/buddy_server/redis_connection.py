"""A Redis that server processes share."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from buddy_server.errors import ConfigError, RedisUnreachable

TIMEOUT_S = 1.0
"""For one operation, connecting included."""
_NUM_CONNECTIONS = 16
_URL = re.compile(r"unix://[^#]+|rediss?://[^/?#]*(/\d*)?(\?[^#@]*)?")

T = TypeVar("T")


class RedisConnection:
    """`redis` and how it is asked. Nothing is retried here, as what was asked may have happened although its answer got
    lost."""

    def __init__(self, url: str) -> None:
        """It does not connect: Redis may start later. Raises ConfigError for a URL of another form."""
        pool = _pool(url)
        # In the order of arrival: redis-py's own blocking pool may let a request wait while later ones go first.
        self._turns = asyncio.Semaphore(_NUM_CONNECTIONS)
        where = pool.connection_kwargs
        self._address = where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"
        self.redis = Redis.from_pool(pool)

    async def ask(self, operation: Callable[[], Awaitable[T]]) -> T:
        """The answer to an operation of `redis`. Raises RedisUnreachable."""
        try:
            async with asyncio.timeout(TIMEOUT_S), self._turns:
                return await operation()
        except (RedisError, OSError) as error:
            # None of these errors repeats the URL, which may hold a password.
            reason = f"{type(error).__name__} {error}".strip()
            raise RedisUnreachable(f"Redis at {self._address} does not answer: {reason}") from error

    async def close(self) -> None:
        await self.redis.aclose()


def _pool(url: str) -> ConnectionPool:
    try:
        if not _URL.fullmatch(url):
            raise ValueError
        pool = ConnectionPool.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            # `ask` has the timeout. This one would use asyncio.wait_for, which in Python 3.11 may lose a cancellation.
            socket_timeout=None,
            socket_connect_timeout=TIMEOUT_S,
            # With RESP3, redis-py takes a connection that Redis has closed for one that has a notification.
            protocol=2,
        )
        # Unknown options in the URL would only come to light with the first request, and answers are bytes.
        pool.connection_class(**pool.connection_kwargs)
        if pool.connection_kwargs.get("decode_responses"):
            raise ValueError
    except (ValueError, TypeError):
        # The cause may repeat a part of the password: one with a "/" ends the URL's host early.
        raise ConfigError(
            "limits.url: is not the URL of a Redis; allowed is redis://USER:PASSWORD@HOST:PORT/NUMBER, with special "
            "characters of a password written as %XX"
        ) from None
    return pool
