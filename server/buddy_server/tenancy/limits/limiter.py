"""What every limiter does: in memory for one server process, in Redis for several.

A request reserves the most that it may use, before it runs; its end settles what it did use. The reservation of a
process that has died lapses with its lease.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

LimitName = Literal[
    "requests_per_minute", "layer_tokens_per_minute", "max_concurrent_requests", "layer_tokens_per_month"
]

WINDOW_S = 60.0
"""A minute of a limit is any 60 seconds that end now, not one of the clock."""
LEASE_S = 15.0
"""How long a reservation that nobody renews still counts as running."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A tenant's limits; costs are milli-layers, an integer however many layers the model has. None is no limit."""

    requests_per_minute: int | None = None
    cost_per_minute: int | None = None
    concurrent_requests: int | None = None
    cost_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The most that one request may use. `id` is unique; `cost` is in milli-layers; `month` is like "2026-11", in
    UTC."""

    id: str
    tenant: str
    cost: int
    month: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class Standing:
    """What is left of a tenant's limits after a claim was granted or refused; None where there is no limit. The resets
    are seconds until a minute's limit is whole again if nothing more is asked; `month_cost` is what the month has used
    and reserved."""

    remaining_requests: int | None
    reset_requests_s: float
    remaining_cost: int | None
    reset_cost_s: float
    month_cost: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A limit that a claim would pass; nothing was reserved. `retry_after_s` is when the claim would be granted if
    nothing else were asked and every answer used all it reserved: infinite if never. If several limits refuse the
    claim, `limit` is the one that does so for longest, of equal ones the first in the order of LimitName."""

    limit: LimitName
    retry_after_s: float
    standing: Standing


class Limiter(Protocol):
    """A request reserves, and then settles or withdraws. All methods may raise RedisUnreachable."""

    async def reserve(self, claim: Claim) -> Standing | Refusal:
        """Reserve all of `claim` or nothing."""
        ...

    async def settle(self, claim: Claim, cost: int) -> None:
        """End a reservation: the request used `cost` milli-layers, which count from then on. Settling one that has
        lapsed still counts the cost for the month, and settling twice counts once."""
        ...

    async def withdraw(self, claim: Claim) -> None:
        """Undo a reservation, as if the request had never been made."""
        ...

    async def renew(self, claims: list[Claim]) -> None:
        """Extend the leases of requests that still run. Called at least every LEASE_S / 3."""
        ...

    async def set_month(self, tenant: str, month: str, cost: int) -> None:
        """Raise what the month has used to `cost`, as the ledger knows it, if it is less."""
        ...

    async def ping(self) -> None:
        """Return if the limits can be reached."""
        ...

    async def close(self) -> None: ...
