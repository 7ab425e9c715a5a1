"""A tier as people write it, in the configuration file and in the admin API."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from buddy_server.tenancy.policy import Auto, Tier


def _number_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1):
        return value
    raise ValueError('allowed is a number from 0 to 1, or "auto"')


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Of a tenant or a tier."""
_Budget = Annotated[float, Field(ge=0, le=1)]
_Limit = Annotated[int, Field(ge=1, le=10**12)] | None


class TierEntry(BaseModel):
    """The fields of `Tier` but its name; absent limits are unlimited."""

    model_config = ConfigDict(extra="forbid", strict=True)

    min_budget: _Budget = 0.0
    max_budget: _Budget = 1.0
    default_budget: Annotated[float | Auto, BeforeValidator(_number_or_auto)] = "auto"
    requests_per_minute: _Limit = None
    layer_tokens_per_minute: _Limit = None
    max_concurrent_requests: _Limit = None
    layer_tokens_per_month: _Limit = None
    max_completion_tokens: _Limit = None
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    elastic_floor: _Budget | None = None
    align_paths: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> "TierEntry":
        default = self.min_budget if self.default_budget == "auto" else self.default_budget
        if not self.min_budget <= default <= self.max_budget:
            raise ValueError("allowed is min_budget <= default_budget <= max_budget")
        if self.elastic_floor is not None and not self.min_budget <= self.elastic_floor <= self.max_budget:
            raise ValueError("allowed is min_budget <= elastic_floor <= max_budget")
        return self

    def tier(self, name: str) -> Tier:
        return Tier(name, **self.model_dump())
