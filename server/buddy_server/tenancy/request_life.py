"""The life of one HTTP request, from arrival to end, however it ends."""

from types import TracebackType
from typing import Self

from buddy_server.errors import ApiError
from buddy_server.metrics import RequestMetrics
from buddy_server.tenancy.capacity import Capacity
from buddy_server.tenancy.depth import DepthDecision


class RequestLife:
    """An async context that releases what a request reserved when it exits, and records the outcome in the metrics."""

    def __init__(self, capacity: Capacity, metrics: RequestMetrics) -> None:
        self.metrics = metrics
        self._capacity = capacity
        self._num_reserved = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capacity.release(self._num_reserved)
        # Only counts if no outcome is recorded yet: an exception was raised, or the client left.
        if isinstance(error, ApiError):
            self.metrics.finish(error.outcome)
        else:
            self.metrics.finish("error" if isinstance(error, Exception) else "cancelled")

    def admit(self, num_answers: int, num_prompt_tokens: int, depth: DepthDecision) -> None:
        """Accept the request. Raises NotReady, Overloaded, InvalidRequest."""
        self._capacity.reserve(num_answers)
        self._num_reserved = num_answers
        self.metrics.admitted(num_prompt_tokens, depth)

    def answered(self) -> None:
        """The last event of one answer has been read; its place is free before the client has everything."""
        self._capacity.release(1)
        self._num_reserved -= 1
