"""The tables of the store. `migrations/` creates and changes them; a test compares the two.

Times are milliseconds since 1970. A tenant's tier and a key's tenant may be those of the configuration file, so they
refer to no row here.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

metadata = MetaData()

revision = Table(
    "revision",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
    Column("secret_fingerprint", LargeBinary),
)
"""One row, whose value every change to the tables but the ledger increments. The fingerprint is that of the secret
that keys are made with."""

tiers = Table(
    "tiers",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("definition", JSON, nullable=False),
)
"""`definition` has the fields of `Tier`; those it lacks have their defaults."""

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("tier", String(64), nullable=False),
    Column("disabled", Boolean, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("mac", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("revoked_ms", BigInteger),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", String(64), nullable=False),
    Column("details", JSON, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("key_id", String(64)),
    Column("model", String, nullable=False),
    Column("layers", Integer, nullable=False),
    Column("day", String(10), nullable=False),
    Column("started_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger, nullable=False),
    Column("budget_requested", Float),
    Column("budget_granted", Float, nullable=False),
    Column("decided_by", String(16), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("milli_layers", BigInteger, nullable=False),
    Column("outcome", String(16)),
    # Sums by tenant and day read the index alone; new rows are near its end.
    Index("ledger_sums", "day", "tenant", "layers", "milli_layers", "prompt_tokens", "completion_tokens"),
)
"""One row per request, with the fields of `LedgerEntry`."""
