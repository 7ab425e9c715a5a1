"""The limiter that the configuration asks for."""

from buddy_server.config import LimitSettings
from buddy_server.tenancy.limits.limiter import Limiter
from buddy_server.tenancy.limits.memory_limiter import MemoryLimiter


def make_limiter(settings: LimitSettings) -> Limiter:
    """Raises ConfigError for a URL that names no Redis. It does not connect: Redis may start later."""
    if settings.url.startswith("memory://"):
        return MemoryLimiter()
    # Only a server that uses Redis pays for its client.
    from buddy_server.tenancy.limits.redis_limiter import RedisLimiter

    return RedisLimiter(settings.url)
