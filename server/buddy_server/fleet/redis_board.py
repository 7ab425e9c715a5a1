"""A board in Redis, for server processes on any number of machines."""

from collections.abc import Collection
from functools import partial

from buddy_server.redis_connection import RedisConnection

KEPT_S = 60
"""How long Redis keeps the entries after the last one."""


class RedisBoard:
    """One hash for each fleet, by its name."""

    def __init__(self, url: str, name: str) -> None:
        """Raises ConfigError for a URL of another form. It does not connect: Redis may start later."""
        self._connection = RedisConnection(url)
        self._key = f"buddy:fleet:{name}"

    async def exchange(self, name: str, entry: bytes) -> dict[str, bytes]:
        pipeline = self._connection.redis.pipeline(transaction=False)
        pipeline.hset(self._key, name, entry)
        pipeline.expire(self._key, KEPT_S)
        pipeline.hgetall(self._key)
        *_, entries = await self._connection.ask(pipeline.execute)
        return {name.decode(): entry for name, entry in entries.items()}

    async def remove(self, names: Collection[str]) -> None:
        await self._connection.ask(partial(self._connection.redis.hdel, self._key, *names))

    async def close(self) -> None:
        await self._connection.close()
