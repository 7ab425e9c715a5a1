"""The board that the configuration asks for."""

from buddy_server.config import LimitSettings
from buddy_server.engine.messages import EngineInfo
from buddy_server.fleet.board import Board, MemoryBoard


def make_board(settings: LimitSettings, info: EngineInfo) -> Board:
    """Servers of one model that count limits in one Redis are one fleet; one that counts alone is a fleet of its own.

    Raises ConfigError for a URL that names no Redis.
    """
    if not settings.is_shared:
        return MemoryBoard()
    # Only a server that uses Redis pays for its client.
    from buddy_server.fleet.redis_board import RedisBoard

    return RedisBoard(settings.url, fleet_name(info))


def fleet_name(info: EngineInfo) -> str:
    """The same for servers of the same model; milli-layers of another depth are not comparable."""
    return f"{info.model_id}:{info.actions.full_cost}"
