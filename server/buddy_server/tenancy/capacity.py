"""How many answers the server accepts at once."""

from buddy_server.engine.messages import EngineClient
from buddy_server.errors import NotReady, Overloaded


class Capacity:
    """Admits the running answers and up to `max_waiting` waiting ones. Reserve and release only on the event loop,
    where nothing can run between a check and its reservation."""

    def __init__(self, engine: EngineClient, max_waiting: int) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._num_reserved = 0

    def reserve(self, num_answers: int) -> None:
        """Raises NotReady without an engine, Overloaded if too many would wait."""
        if not self._engine.is_ready:
            raise NotReady("The engine cannot take work yet.", retry_after_s=self._engine.ready_in_s)
        num_waiting = max(0, self._num_reserved - self._engine.num_running)
        if num_waiting + num_answers > self._max_waiting:
            raise Overloaded(f"{num_waiting} requests are waiting already; try again in a moment.")
        self._num_reserved += num_answers

    def release(self, num_answers: int) -> None:
        self._num_reserved -= num_answers
