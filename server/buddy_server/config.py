"""The configuration file: validated here, then turned into frozen dataclasses."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, ValidationError

from buddy_server.config_text import explain, line_of, name_or_mask, read_yaml
from buddy_server.engine.settings import EngineSettings
from buddy_server.errors import ConfigError, FieldError
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tenancy.tier_entry import Name, TierEntry

OPEN_TENANT = Tenant(name="default", tier=Tier(name="default"))
"""The tenant of every request if none are configured: no key, the whole model."""


WhenUnreachable = Literal["refuse", "allow"]


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Where tenants, keys and the ledger are kept: an SQLAlchemy URL of SQLite or PostgreSQL, whose password may be in
    the environment variable PGPASSWORD instead. The ledger writes open requests to files in the directory `journal`;
    None puts it beside the SQLite file, or in the user's state directory. Its rows are kept for `ledger_days` days,
    with None for ever."""

    url: str = field(repr=False)  # may hold a password
    journal: Path | None = None
    when_unreachable: WhenUnreachable = "refuse"
    ledger_days: int | None = None


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """Where limits are counted: "memory://" for one server process, "redis://..." for several."""

    url: str = field(default="memory://", repr=False)  # may hold a password
    when_unreachable: WhenUnreachable = "refuse"

    @property
    def is_shared(self) -> bool:
        return not self.url.startswith("memory://")


@dataclass(frozen=True, slots=True)
class ElasticSettings:
    """Budgets of elastic tiers are lowered so that requests wait no longer than `target_queue_s` for their first step,
    and tokens take no longer than `target_inter_token_s`."""

    target_queue_s: float = 0.5
    target_inter_token_s: float = 0.1


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The server's configuration. Without tenants in the file and without a store, every client is `OPEN_TENANT`;
    `allow_open` lets such a server listen on more than the loopback interface."""

    tenants: tuple[Tenant, ...] = (OPEN_TENANT,)
    tiers: tuple[Tier, ...] = ()
    store: StoreSettings | None = None
    limits: LimitSettings = LimitSettings()
    elastic: ElasticSettings = ElasticSettings()
    max_waiting: int = 256
    engine: EngineSettings = field(default_factory=EngineSettings)
    allow_open: bool = False
    max_body_bytes: int = 4 * 1024 * 1024
    max_body_pause_s: float = 4.0
    ping_interval_s: float = 15.0
    stamp: tuple[int, ...] | None = field(default=None, compare=False)
    """file_stamp() of the file just before it was read."""

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return self.store is None and not any(tenant.key_digests for tenant in self.tenants)


def load_config(path: Path | None, check: Callable[[ServerConfig], None] = lambda _: None) -> ServerConfig:
    """The configuration in the YAML file at `path`; None gives a server without tenants. Paths in the file are relative
    to its folder. `check` may raise a FieldError for what only its caller knows.

    Raises ConfigError naming the file, the line, the field, its value if it cannot be a secret, and what is allowed.
    """
    if path is None:
        return ServerConfig()
    stamp = file_stamp(path)
    text, raw = read_yaml(path)
    try:
        config = _freeze(_File.model_validate({} if raw is None else raw), path.absolute().parent)
        check(config)
        return replace(config, stamp=stamp)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{path}:{explain(details, text)}" for details in error.errors())) from None
    except FieldError as error:
        raise ConfigError(f"{path}:{line_of(text, error.location)}: {error}") from None


def file_stamp(path: Path) -> tuple[int, ...] | None:
    """Changes with the file, also when a link is turned to another one; None without a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


_KeyDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TenantEntry(_Strict):
    tier: str
    key_sha256: list[_KeyDigest] = Field(default_factory=list)


class _StoreEntry(_Strict):
    url: Annotated[str, StringConstraints(pattern=r"^(sqlite(\+aiosqlite)?:///|postgresql(\+asyncpg)?://)")]
    journal: str | None = None
    when_unreachable: WhenUnreachable = "refuse"
    # A month's quota counts the month's rows.
    ledger_days: Annotated[int, Field(ge=31)] | None = None


class _LimitsEntry(_Strict):
    url: Annotated[str, StringConstraints(pattern=r"^(memory|redis|rediss|unix)://")] = "memory://"
    when_unreachable: WhenUnreachable = "refuse"


_RELATIVE_SQLITE = re.compile(r"^sqlite(\+aiosqlite)?:///(?=[^/?])(?!:memory:)")
"""The beginning of the URL, up to the path."""
_TARGETS = ElasticSettings()


class _ElasticEntry(_Strict):
    target_queue_s: Annotated[float, Field(gt=0)] = _TARGETS.target_queue_s
    target_inter_token_s: Annotated[float, Field(gt=0)] = _TARGETS.target_inter_token_s


_SIZES = EngineSettings()


def _cache_size(value: object) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError("expected a number above 0, or auto")


class _EngineEntry(_Strict):
    kv_cache_gib: Annotated[float | Literal["auto"], PlainValidator(_cache_size)] = _SIZES.kv_cache_gib
    max_sequences: Annotated[int, Field(ge=1)] = _SIZES.max_sequences
    max_step_tokens: Annotated[int, Field(ge=1)] = _SIZES.max_step_tokens
    cost_weight: Annotated[float, Field(ge=0)] = _SIZES.cost_weight
    prefix_cache: bool = _SIZES.prefix_cache
    arithmetic: str = _SIZES.arithmetic


class _File(_Strict):
    tiers: dict[Name, TierEntry] = Field(default_factory=dict)
    tenants: dict[Name, _TenantEntry] = Field(default_factory=dict)
    store: _StoreEntry | None = None
    limits: _LimitsEntry = Field(default_factory=_LimitsEntry)
    elastic: _ElasticEntry = Field(default_factory=_ElasticEntry)
    max_waiting: Annotated[int, Field(ge=1)] = 256
    allow_open: bool = False
    engine: _EngineEntry = Field(default_factory=_EngineEntry)


def _freeze(file: _File, folder: Path) -> ServerConfig:
    tiers = {name: entry.tier(name) for name, entry in file.tiers.items()}
    tenants = tuple(_tenants(file, tiers))
    if not tenants and file.store is None:
        tenants = (Tenant(OPEN_TENANT.name, tiers.get(OPEN_TENANT.tier.name, OPEN_TENANT.tier)),)
    return ServerConfig(
        tiers=tuple(tiers.values()),
        tenants=tenants,
        store=None if file.store is None else _store(file.store, folder),
        limits=LimitSettings(**file.limits.model_dump()),
        elastic=ElasticSettings(**file.elastic.model_dump()),
        max_waiting=file.max_waiting,
        engine=EngineSettings(**file.engine.model_dump()),
        allow_open=file.allow_open,
    )


def _store(entry: _StoreEntry, folder: Path) -> StoreSettings:
    # Server and commands may be started in different folders, and mean the same database.
    url = _RELATIVE_SQLITE.sub(lambda scheme: f"{scheme[0]}{quote(str(folder))}/", entry.url)
    journal = None if entry.journal is None else folder / entry.journal
    return StoreSettings(url, journal, entry.when_unreachable, entry.ledger_days)


def _tenants(file: _File, tiers: dict[str, Tier]) -> Iterator[Tenant]:
    owners: dict[bytes, str] = {}
    for name, entry in file.tenants.items():
        if entry.tier not in tiers:
            allowed = ", ".join(sorted(tiers)) or "none"
            raise FieldError(
                ("tenants", name, "tier"), f"{name_or_mask(entry.tier)!r} is not a tier, allowed: {allowed}"
            )
        if not entry.key_sha256 and file.store is None:
            reason = (
                "allowed are SHA-256 digests, at least one; without any, give a store for the keys that are made later"
            )
            raise FieldError(("tenants", name, "key_sha256"), reason)
        digests = tuple(bytes.fromhex(text) for text in entry.key_sha256)
        for digest in digests:
            if digest in owners:
                raise FieldError(("tenants", name, "key_sha256"), f"a key of {owners[digest]!r} is given again")
            owners[digest] = name
        yield Tenant(name, tiers[entry.tier], digests)
