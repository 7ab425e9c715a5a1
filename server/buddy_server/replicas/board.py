"""Where ingresses and replicas hear of each other, if the configuration names no Redis."""

from collections.abc import Collection

import ray
from ray.exceptions import RayError

from buddy_server.config import LimitSettings
from buddy_server.errors import BoardUnreachable
from buddy_server.fleet.board import Board, MemoryBoard
from buddy_server.fleet.build import make_board


class RayBoard:
    """A MemoryBoard in an actor that they share."""

    def __init__(self, model: str) -> None:
        # It outlives whoever comes first, and has nothing that a new one would miss.
        actor = ray.remote(MemoryBoard).options(
            name=f"buddy/fleet/{model}", get_if_exists=True, lifetime="detached", max_restarts=-1, num_cpus=0
        )
        self._board = actor.remote()

    async def exchange(self, name: str, entry: bytes) -> dict[str, bytes]:
        try:
            return await self._board.exchange.remote(name, entry)
        except RayError as error:
            raise BoardUnreachable(str(error)) from error

    async def remove(self, names: Collection[str]) -> None:
        try:
            await self._board.remove.remote(names)
        except RayError as error:
            raise BoardUnreachable(str(error)) from error

    async def close(self) -> None: ...


def shared_board(settings: LimitSettings, model: str) -> Board:
    """The board of all ingresses and replicas of `model`."""
    return make_board(settings, model) if settings.is_shared else RayBoard(model)
