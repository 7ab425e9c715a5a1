"""How many answers the server accepts at once."""

from collections import Counter

from buddy_server.engine.messages import EngineClient
from buddy_server.errors import InvalidRequest, NotReady, Overloaded
from buddy_server.tenancy.book import TenantBook

MOST_OVER_FREE = 4
"""One tenant among others may hold 4 of 5 places. As others take theirs, it may hold 4 times as many as are still free,
so that there is always one for a tenant that holds few."""


class Capacity:
    """Room for as many answers as the engine runs side by side, and for `max_waiting` of the configuration that wait.
    Only the event loop reserves and releases, so nothing comes between a check and its reservation."""

    def __init__(self, engine: EngineClient, book: TenantBook) -> None:
        self._engine = engine
        self._book = book
        self._held: Counter[str] = Counter()

    def reserve(self, tenant: str, num_answers: int) -> None:
        """Raises NotReady without an engine, Overloaded when there is no room for this tenant, and InvalidRequest for
        more answers than there is ever room for."""
        limit = self._engine.info.max_sequences + self._book.config.max_waiting
        if num_answers > limit:
            raise InvalidRequest(
                f"n: {num_answers} answers are requested, n for each prompt; this server allows {limit}",
                param="n",
            )
        if not self._engine.is_ready:
            raise NotReady("The engine cannot take work yet.", retry_after_s=self._engine.ready_in_s)
        num_reserved = self._held.total()
        num_free = limit - num_reserved - num_answers
        if num_free < 0:
            raise Overloaded(f"{num_reserved} answers are under way or waiting; try again in a moment.")
        held = self._held[tenant]
        # What a tenant alone on the server holds is nobody's loss.
        if len(self._book.tenants) > 1 and held and held + num_answers > MOST_OVER_FREE * num_free:
            raise Overloaded(
                f"{held} answers of this tenant are under way or waiting, and the places left are kept for others; "
                "try again in a moment."
            )
        self._held[tenant] += num_answers

    def release(self, tenant: str, num_answers: int) -> None:
        self._held[tenant] -= num_answers
        if not self._held[tenant]:
            del self._held[tenant]
