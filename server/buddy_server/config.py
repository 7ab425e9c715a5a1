"""The configuration file: read and validated here, then turned into frozen dataclasses.

Limits, quotas, fair-share weights and elastic floors will be further fields of a tier, next to the budgets; admission
reads them from the `Tier` that travels with a request.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from buddy_server.engine.settings import EngineSettings
from buddy_server.errors import ConfigError, shown
from buddy_server.tenancy.policy import Auto, Tenant, Tier

OPEN_TENANT = Tenant(name="default", tier=Tier(name="default"))
"""The tenant of every request if none are configured: no key, the whole model."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The server's configuration. Without tenants in the file, every client is `OPEN_TENANT`; `allow_open` lets such a
    server listen on more than the loopback interface."""

    tenants: tuple[Tenant, ...] = (OPEN_TENANT,)
    max_waiting: int = 256
    engine: EngineSettings = field(default_factory=EngineSettings)
    allow_open: bool = False
    max_body_bytes: int = 4 * 1024 * 1024
    ping_interval_s: float = 15.0

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return not any(tenant.key_digests for tenant in self.tenants)


def load_config(path: Path | None) -> ServerConfig:
    """The configuration in the YAML file at `path`; None gives a server without tenants.

    Raises ConfigError naming the file, the field, its value and what is allowed.
    """
    if path is None:
        return ServerConfig()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    try:
        return _freeze(_File.model_validate({} if raw is None else raw))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _number_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1):
        return value
    raise ValueError('allowed is a number from 0 to 1, or "auto"')


_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Budget = Annotated[float, Field(ge=0, le=1)]
_KeyDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TierEntry(_Strict):
    min_budget: _Budget = 0.0
    max_budget: _Budget = 1.0
    default_budget: Annotated[float | Auto, BeforeValidator(_number_or_auto)] = "auto"
    align_paths: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> "_TierEntry":
        default = self.min_budget if self.default_budget == "auto" else self.default_budget
        if not self.min_budget <= default <= self.max_budget:
            raise ValueError("allowed is min_budget <= default_budget <= max_budget")
        return self


class _TenantEntry(_Strict):
    tier: str
    key_sha256: Annotated[list[_KeyDigest], Field(min_length=1)]


_SIZES = EngineSettings()


class _EngineEntry(_Strict):
    kv_cache_gib: Annotated[float, Field(gt=0)] = _SIZES.kv_cache_gib
    max_sequences: Annotated[int, Field(ge=1)] = _SIZES.max_sequences
    max_step_tokens: Annotated[int, Field(ge=1)] = _SIZES.max_step_tokens
    cost_weight: Annotated[float, Field(ge=0)] = _SIZES.cost_weight
    prefix_cache: bool = _SIZES.prefix_cache
    arithmetic: str = _SIZES.arithmetic


class _File(_Strict):
    tiers: dict[_Name, _TierEntry] = Field(default_factory=dict)
    tenants: dict[_Name, _TenantEntry] = Field(default_factory=dict)
    max_waiting: Annotated[int, Field(ge=1)] = 256
    allow_open: bool = False
    engine: _EngineEntry = Field(default_factory=_EngineEntry)


def _freeze(file: _File) -> ServerConfig:
    tiers = {name: Tier(name, **entry.model_dump()) for name, entry in file.tiers.items()}
    if not file.tenants:
        open_tier = tiers.get(OPEN_TENANT.tier.name, OPEN_TENANT.tier)
        return _server_config(file, (Tenant(OPEN_TENANT.name, open_tier),))
    owners: dict[bytes, str] = {}
    tenants = []
    for name, entry in file.tenants.items():
        if entry.tier not in tiers:
            allowed = ", ".join(sorted(tiers)) or "none"
            raise ConfigError(f"tenants.{name}.tier: {entry.tier!r} is not a tier, allowed: {allowed}")
        digests = tuple(bytes.fromhex(text) for text in entry.key_sha256)
        for digest in digests:
            if digest in owners:
                raise ConfigError(f"tenants.{name}.key_sha256: a key of {owners[digest]!r} is given again")
            owners[digest] = name
        tenants.append(Tenant(name, tiers[entry.tier], digests))
    return _server_config(file, tuple(tenants))


def _server_config(file: _File, tenants: tuple[Tenant, ...]) -> ServerConfig:
    return ServerConfig(
        tenants=tenants,
        max_waiting=file.max_waiting,
        allow_open=file.allow_open,
        engine=EngineSettings(**file.engine.model_dump()),
    )


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(details) for details in error.errors(include_url=False))


def _explain_one(details: Any) -> str:
    field = ".".join(str(part) for part in details["loc"]) or "the file"
    if details["type"] == "extra_forbidden":
        return f"{field}: is not a known field"
    if "key_sha256" in details["loc"]:
        # The value may be a plain key pasted here by mistake; it must not reach a log.
        return f"{field}: allowed are SHA-256 digests in 64 lower-case hexadecimal digits, at least one"
    reason = str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"]
    return f"{field}: {shown(details['input'])} is not allowed: {reason}"
