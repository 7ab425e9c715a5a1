"""What the store knows of tenants, as plain data: fields in the order of the tables' columns. Times are milliseconds
since 1970."""

from dataclasses import dataclass, field

from buddy_server.tenancy.policy import Tier


@dataclass(frozen=True, slots=True)
class StoredTenant:
    """A tenant of the store. `tier` may name one of the configuration file. No key of a disabled tenant is valid."""

    name: str
    tier: str
    disabled: bool


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as the store has it; `tenant` may be one of the configuration file."""

    id: str
    tenant: str
    mac: bytes = field(repr=False)
    created_ms: int
    expires_ms: int | None
    revoked_ms: int | None

    def is_valid(self, now_ms: int) -> bool:
        """Whether the key is neither revoked nor expired at `now_ms`."""
        return self.revoked_ms is None and (self.expires_ms is None or now_ms < self.expires_ms)


@dataclass(frozen=True, slots=True)
class StoreSnapshot:
    """Everything in the store at one `revision`, each in the order of names or of creation."""

    revision: int
    tiers: tuple[Tier, ...]
    tenants: tuple[StoredTenant, ...]
    keys: tuple[StoredKey, ...]


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One change: who made it, and what it was. `details` never holds a secret."""

    id: int
    at_ms: int
    actor: str
    action: str
    subject: str
    details: dict[str, object]
