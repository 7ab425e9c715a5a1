"""The life of one HTTP request, from arrival to end, however it ends."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from buddy_server.errors import ApiError, Outcome
from buddy_server.metrics import RequestMetrics
from buddy_server.tenancy.bills import Bill, Bills, Order
from buddy_server.tenancy.capacity import Capacity


class RequestLife:
    """An async context that releases what a request reserved when it exits, and records the outcome in the metrics."""

    def __init__(self, capacity: Capacity, bills: Bills, metrics: RequestMetrics) -> None:
        self.metrics = metrics
        self._capacity = capacity
        self._bills = bills
        self._bill: Bill | None = None
        self._tenant = ""
        self._num_reserved = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capacity.release(self._tenant, self._num_reserved)
        outcome: Outcome = "error" if isinstance(error, Exception) else "cancelled"
        if isinstance(error, ApiError):
            outcome = error.outcome
        # Only counts if no outcome is recorded yet: an exception was raised, or the client left.
        self.metrics.finish(outcome)
        if self._bill is not None:
            self._bill.close(outcome)
            if isinstance(error, ApiError) and outcome != "cancelled":
                # The error is the response; its row comes before its end, like any other's.
                await self._bill.settled()

    @property
    def bill(self) -> Bill:
        """Of a request that was admitted."""
        assert self._bill is not None, "not admitted"
        return self._bill

    @property
    def headers(self) -> Mapping[str, str]:
        """The response's headers that tell what is left of the tenant's limits."""
        return {} if self._bill is None else self._bill.headers

    async def admit(self, order: Order) -> None:
        """Accept the request. Raises what Capacity.reserve and Bills.open raise."""
        self._tenant = order.caller.tenant.name
        self._capacity.reserve(self._tenant, order.num_answers)
        self._num_reserved = order.num_answers
        self._bill = await self._bills.open(order)
        self.metrics.admitted(order.num_prompt_tokens, order.depth)

    def answered(self) -> None:
        """The last event of one answer has been read; its place is free before the client has everything."""
        self._capacity.release(self._tenant, 1)
        self._num_reserved -= 1
