"""The limiter that the configuration asks for."""

from buddy_server.config import LimitSettings
from buddy_server.tenancy.limits.limiter import Limiter
from buddy_server.tenancy.limits.memory_limiter import MemoryLimiter


def make_limiter(settings: LimitSettings, whole: int) -> Limiter:
    """A limiter for a model in which one layer-token is `whole` milli-layers. It does not connect: Redis may start
    later. Raises ConfigError for a URL that names no Redis."""
    if not settings.is_shared:
        return MemoryLimiter()
    # Only a server that uses Redis pays for its client.
    from buddy_server.tenancy.limits.redis_limiter import RedisLimiter

    return RedisLimiter(settings.url, whole)
