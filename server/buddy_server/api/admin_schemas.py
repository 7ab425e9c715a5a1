"""The schemas of the admin API. Times are in UTC, days too."""

from datetime import UTC, date, datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from buddy_server.errors import InvalidRequest
from buddy_server.tenancy.administration import Source
from buddy_server.tenancy.store.ledger_store import Group
from buddy_server.tenancy.tier_entry import Name, TierEntry

GROUPS: tuple[Group, ...] = ("tenant", "day", "key")
MAX_AUDIT_ROWS = 1000
T = TypeVar("T")


def shown_time(milliseconds: int) -> datetime:
    """The time that is `milliseconds` after the beginning of 1970."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Query(BaseModel):
    """A parameter with nothing behind its "=" is absent."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in parameters.items() if value != ""}


class Listed(BaseModel, Generic[T]):
    data: list[T]


class NewTenant(_Body):
    name: Name
    tier: Name


class TenantChange(_Body):
    """Fields that are absent stay as they are. No key of a disabled tenant is valid."""

    tier: Name | None = None
    disabled: bool | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.tier is None and self.disabled is None:
            raise ValueError("give tier, disabled or both")
        return self


class TenantView(BaseModel):
    """`source` says where the tenant is defined; one of the file can only be changed there."""

    name: str
    tier: str
    disabled: bool
    source: Source


class TierView(TierEntry):
    """A limit of null is no limit."""

    name: str
    source: Source


class KeyRequest(_Body):
    """Without `expires_at`, the key is valid until it is revoked."""

    # Strict validation wants a datetime, where JSON has text.
    expires_at: Annotated[AwareDatetime | None, Field(strict=False)] = None

    @property
    def expires_ms(self) -> int | None:
        """Raises InvalidRequest for a time that is past."""
        if self.expires_at is None:
            return None
        if self.expires_at <= datetime.now(UTC):
            raise InvalidRequest(
                f"expires_at: {self.expires_at.isoformat()} is past, allowed is a time to come", param="expires_at"
            )
        return int(self.expires_at.timestamp() * 1000)


class KeyView(BaseModel):
    id: str
    tenant: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class NewKeyView(KeyView):
    """`key` is what the client sends. It is shown here and never again."""

    key: str


def _day(text: str) -> str:
    try:
        valid = date.fromisoformat(text).isoformat() == text
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("allowed is a day like 2026-11-26")
    return text


def _groups(text: str) -> str:
    names = text.split(",")
    if not set(names) <= set(GROUPS) or len(set(names)) < len(names):
        raise ValueError(f"allowed are {', '.join(GROUPS)}, each once, with commas between them")
    return text


Day = Annotated[str, AfterValidator(_day)]


class UsageQuery(_Query):
    tenant: Name | None = None
    first_day: Annotated[Day | None, Field(alias="from", description="the first day in UTC, inclusive")] = None
    last_day: Annotated[Day | None, Field(alias="to", description="the last day in UTC, inclusive")] = None
    group_by: Annotated[
        str,
        AfterValidator(_groups),
        Field(description="what to sum by: any of tenant, day and key, with commas between them"),
    ] = "tenant"
    format: Literal["json", "csv"] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.first_day and self.last_day and self.first_day > self.last_day:
            raise InvalidRequest(
                f"to: {self.last_day} is before from, allowed is {self.first_day} or later", param="to"
            )
        return self

    @property
    def groups(self) -> list[Group]:
        names = self.group_by.split(",")
        return [group for group in GROUPS if group in names]


class UsageView(BaseModel):
    """Sums over the requests of a group; tenant, day and key are there if `group_by` names them. The key is its id, and
    null for requests without one."""

    tenant: str | None = None
    day: str | None = None
    key: str | None = None
    requests: int
    prompt_tokens: int
    completion_tokens: int
    layer_tokens: float


class AuditQuery(_Query):
    limit: Annotated[int, Field(ge=1, le=MAX_AUDIT_ROWS)] = 100
    before: Annotated[
        int | None, Field(ge=1, le=2**31 - 1, description="only rows older than the one with this id")
    ] = None


class AuditView(BaseModel):
    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: dict[str, object]
