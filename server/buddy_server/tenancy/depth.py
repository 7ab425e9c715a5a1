"""Deciding how many layers a request runs: once, at admission. The request asks, the tier clamps."""

from dataclasses import dataclass, replace
from typing import Literal

from buddy_routing.budget import BudgetError, num_run_layers, smallest_budget
from buddy_server.errors import ConfigError, InvalidBudget, shown
from buddy_server.tenancy.policy import Auto, Tier

DecidedBy = Literal["request", "tenant", "predictor", "elastic"]
ClampReason = Literal["tier_min", "tier_max"]


@dataclass(frozen=True, slots=True)
class DepthDecision:
    """`requested` is what the request said, None if nothing. `granted` is the budget after clamping, which
    buys `num_run_layers` layers for every token. `decided_by` is "request" only when the request got what
    it asked for; `clamped` says which bound of the tier changed it. `is_open` leaves the depth, up to what is
    granted, to the Budget Predictor if there is one."""

    requested: float | Auto | None
    granted: float
    num_run_layers: int
    decided_by: DecidedBy
    clamped: ClampReason | None = None
    is_open: bool = False


def parse_budget(value: object, num_layers: int) -> float | Auto:
    """A budget as a request gives it: "auto" or a number in [2 / L, 1].

    Raises InvalidBudget, naming the value and the allowed range.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidBudget(f'budget {shown(value)} is not allowed: give {_allowed(num_layers)}, or "auto"')
    try:
        num_run_layers(value, num_layers)
        return float(value)
    # OverflowError: JSON knows integers that no float holds.
    except (BudgetError, OverflowError):
        raise InvalidBudget(
            f'budget {shown(value)} is outside the allowed range: give {_allowed(num_layers)}, or "auto"'
        ) from None


def parse_budget_header(value: str, num_layers: int) -> float | Auto:
    """`parse_budget` for the text of the header `x-buddy-budget`."""
    text = value.strip()
    if text == "auto":
        return "auto"
    try:
        return parse_budget(float(text), num_layers)
    except ValueError:
        return parse_budget(text, num_layers)


def decide_depth(requested: float | Auto | None, tier: Tier, num_layers: int) -> DepthDecision:
    """The depth of one request of a tenant in `tier`, which `check_tier` has accepted for this model.

    Without a budget in the request, the tier's default counts as asked for.
    """
    asked = tier.default_budget if requested is None else requested
    if asked == "auto":
        granted = tier.max_budget
        return DepthDecision(requested, granted, num_run_layers(granted, num_layers), "tenant", is_open=True)
    granted = min(max(asked, tier.min_budget), tier.max_budget)
    clamped: ClampReason | None = None
    if granted > asked:
        clamped = "tier_min"
    elif granted < asked:
        clamped = "tier_max"
    return DepthDecision(
        requested,
        granted,
        num_run_layers(granted, num_layers),
        "tenant" if requested is None or clamped else "request",
        clamped,
    )


def lowest_depth(tier: Tier, num_layers: int) -> int:
    """The fewest layers that the predictor may choose for a tenant in `tier`."""
    return num_run_layers(max(tier.min_budget, smallest_budget(num_layers)), num_layers)


def predicted_depth(decision: DepthDecision, num_run: int, num_layers: int) -> DepthDecision:
    """An open decision that the predictor has settled on `num_run` layers."""
    return replace(
        decision, granted=num_run / num_layers, num_run_layers=num_run, decided_by="predictor", is_open=False
    )


def check_tier(tier: Tier, num_layers: int) -> None:
    """Raise ConfigError when a budget of `tier` cannot pay for the layers that always run in this model."""
    budgets = {"max_budget": tier.max_budget, "default_budget": tier.default_budget}
    for field, budget in budgets.items():
        if budget != "auto" and budget < smallest_budget(num_layers) - 1e-9:
            raise ConfigError(
                f"tiers.{tier.name}.{field}: {budget!r} is too small for this model, allowed is {_allowed(num_layers)}"
            )


def _allowed(num_layers: int) -> str:
    return f"a number from {smallest_budget(num_layers):.4g} (2 of {num_layers} layers) to 1"
