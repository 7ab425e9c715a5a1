"""What a tenant may do, as plain data that travels with its requests."""

from dataclasses import dataclass
from typing import Literal

Auto = Literal["auto"]


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of tenants. Budgets lie in [0, 1], min <= default <= max; a default of "auto" leaves the choice to the
    server. A limit of None is no limit; layer-tokens are tokens times the share of the model's layers that they run.

    While several tenants have work, each gets layer-tokens in proportion to `weight`; a higher `priority` goes first.
    Under load, budgets may be lowered as far as `elastic_floor`, in [min_budget, max_budget]; with None, never. With
    `align_paths`, tokens of one tenant and depth that are generated in the same step may share a path: fewer
    layers are read, but a text then depends on the others in its batch."""

    name: str
    min_budget: float = 0.0
    max_budget: float = 1.0
    default_budget: float | Auto = "auto"
    requests_per_minute: int | None = None
    layer_tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    layer_tokens_per_month: int | None = None
    max_completion_tokens: int | None = None
    weight: float = 1.0
    priority: int = 0
    elastic_floor: float | None = None
    align_paths: bool = False


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer. `key_digests` are the SHA-256 digests of its API keys in the configuration file; keys made by
    `buddy keys` are in the store."""

    name: str
    tier: Tier
    key_digests: tuple[bytes, ...] = ()
