"""What a tenant may do, as plain data that travels with its requests."""

from dataclasses import dataclass
from typing import Literal

Auto = Literal["auto"]


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of tenants. Budgets lie in [0, 1], min <= default <= max; a default of "auto" leaves the choice to the
    server. With `align_paths`, tokens of one tenant and depth that are generated in the same step may share a path:
    fewer layers are read, but a text then depends on the others in its batch."""

    name: str
    min_budget: float = 0.0
    max_budget: float = 1.0
    default_budget: float | Auto = "auto"
    align_paths: bool = False


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer. `key_digests` are the SHA-256 digests of its API keys; a tenant without any needs no key."""

    name: str
    tier: Tier
    key_digests: tuple[bytes, ...] = ()
