"""Where ingresses and replicas hear of each other, if the configuration names no Redis."""

import asyncio
from collections.abc import Awaitable, Collection
from typing import TypeVar

import ray
from ray.exceptions import RayError

from buddy_server.config import LimitSettings
from buddy_server.engine.messages import EngineInfo
from buddy_server.errors import BoardUnreachable
from buddy_server.fleet.board import Board, MemoryBoard
from buddy_server.fleet.build import fleet_name, make_board

T = TypeVar("T")

TIMEOUT_S = 1.0


class RayBoard:
    """A MemoryBoard in an actor that they share."""

    def __init__(self, name: str) -> None:
        # It outlives whoever comes first, and has nothing that a new one would miss.
        actor = ray.remote(MemoryBoard).options(
            name=f"buddy/fleet/{name}", get_if_exists=True, lifetime="detached", max_restarts=-1, num_cpus=0
        )
        self._board = actor.remote()

    async def exchange(self, name: str, entry: bytes) -> dict[str, bytes]:
        return await _answer(self._board.exchange.remote(name, entry))

    async def remove(self, names: Collection[str]) -> None:
        await _answer(self._board.remove.remote(names))

    async def close(self) -> None: ...


async def _answer(asked: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await asked
    except (RayError, TimeoutError) as error:
        raise BoardUnreachable(f"the actor of the fleet does not answer: {error!r}") from error


def shared_board(settings: LimitSettings, info: EngineInfo) -> Board:
    """The board of all ingresses and replicas of the model."""
    return make_board(settings, info) if settings.is_shared else RayBoard(fleet_name(info))
