"""One row of the ledger."""

from msgspec import Struct

from buddy_server.errors import Outcome
from buddy_server.tenancy.depth import DecidedBy


class LedgerEntry(Struct, frozen=True):
    """What one request used. `id` is the response's; times are milliseconds since 1970, and `day` is that of the
    start in UTC, like "2026-11-26".

    Tokens are those of the response's usage; `cached_tokens` are summed over all answers. `milli_layers` is the charge;
    divided by 1000 x `layers`, the layers of the model, it is in layer-tokens. `key_id` is None on an open server.
    `budget_requested` is None for "auto" and for no budget. `outcome` is None while the request runs."""

    id: str
    tenant: str
    key_id: str | None
    model: str
    layers: int
    day: str
    started_ms: int
    ended_ms: int
    budget_requested: float | None
    budget_granted: float
    decided_by: DecidedBy
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    milli_layers: int = 0
    outcome: Outcome | None = None
