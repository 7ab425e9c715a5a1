"""How many answers the server accepts at once."""

from collections.abc import Callable

from buddy_server.engine.messages import EngineClient
from buddy_server.errors import InvalidRequest, NotReady, Overloaded


class Capacity:
    """Room for as many answers as the engine runs side by side, and for `max_waiting()` that wait. Only the event loop
    reserves and releases, so nothing comes between a check and its reservation."""

    def __init__(self, engine: EngineClient, max_waiting: Callable[[], int]) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._num_reserved = 0

    def reserve(self, num_answers: int) -> None:
        """Raises NotReady without an engine, Overloaded when there is no room, and InvalidRequest for more answers than
        there is ever room for."""
        limit = self._engine.info.max_sequences + self._max_waiting()
        if num_answers > limit:
            raise InvalidRequest(
                f"n: {num_answers} answers are requested, n for each prompt; this server allows {limit}",
                param="n",
            )
        if not self._engine.is_ready:
            raise NotReady("The engine cannot take work yet.", retry_after_s=self._engine.ready_in_s)
        if self._num_reserved + num_answers > limit:
            raise Overloaded(f"{self._num_reserved} answers are under way or waiting; try again in a moment.")
        self._num_reserved += num_answers

    def release(self, num_answers: int) -> None:
        self._num_reserved -= num_answers
