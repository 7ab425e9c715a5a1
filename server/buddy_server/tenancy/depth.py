"""Decides what each token of a request may cost: once, at admission. The request states a budget, the tier clamps
it."""

from dataclasses import dataclass, replace
from typing import Literal

from buddy_routing.action_space import ActionSpace, BudgetError
from buddy_server.errors import FieldError, InvalidBudget, shown
from buddy_server.tenancy.policy import Auto, Tier

DecidedBy = Literal["request", "tenant", "predictor", "elastic"]
ClampReason = Literal["tier_min", "tier_max"]


@dataclass(frozen=True, slots=True)
class DepthDecision:
    """`requested` is the budget in the request, None if absent. `granted` is the budget after clamping, which pays for
    `max_cost` milli-layers per token. `decided_by` is "request" only if the request got the budget it stated; `clamped`
    is the bound of the tier that changed it. With a `min_cost` the Budget Predictor chooses between the two."""

    requested: float | Auto | None
    granted: float
    max_cost: int
    decided_by: DecidedBy
    clamped: ClampReason | None = None
    min_cost: int | None = None


def parse_budget(value: object, actions: ActionSpace) -> float | Auto:
    """Check a budget from a request: "auto" or a number that pays for the forced layers, at most 1.

    Raises InvalidBudget, naming the value and the allowed range.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidBudget(f'budget {shown(value)} is not allowed: give {actions.allowed_budgets}, or "auto"')
    try:
        actions.max_cost(value)
        return float(value)
    # OverflowError: JSON allows integers too large for a float.
    except (BudgetError, OverflowError):
        raise InvalidBudget(
            f'budget {shown(value)} is outside the allowed range: give {actions.allowed_budgets}, or "auto"'
        ) from None


def parse_budget_header(value: str, actions: ActionSpace) -> float | Auto:
    """`parse_budget` for the text of the header `x-buddy-budget`."""
    text = value.strip()
    if text == "auto":
        return "auto"
    try:
        return parse_budget(float(text), actions)
    except ValueError:
        return parse_budget(text, actions)


def decide_depth(
    requested: float | Auto | None, tier: Tier, actions: ActionSpace, has_predictor: bool
) -> DepthDecision:
    """The depth of one request from a tenant in `tier`, which `check_tier` has accepted for this model.

    Without a budget in the request, the tier's default applies.
    """
    asked = tier.default_budget if requested is None else requested
    if asked == "auto":
        lowest = actions.max_cost(max(tier.min_budget, actions.smallest_budget)) if has_predictor else None
        return DepthDecision(requested, tier.max_budget, actions.max_cost(tier.max_budget), "tenant", min_cost=lowest)
    granted = min(max(asked, tier.min_budget), tier.max_budget)
    clamped: ClampReason | None = None
    if granted > asked:
        clamped = "tier_min"
    elif granted < asked:
        clamped = "tier_max"
    decided_by: DecidedBy = "tenant" if requested is None or clamped else "request"
    return DepthDecision(requested, granted, actions.max_cost(granted), decided_by, clamped)


def predicted_depth(decision: DepthDecision, max_cost: int, actions: ActionSpace) -> DepthDecision:
    """The decision after the Budget Predictor has chosen the depth that it left open."""
    return replace(
        decision, granted=max_cost / actions.full_cost, max_cost=max_cost, decided_by="predictor", min_cost=None
    )


def lowered_depth(decision: DepthDecision, max_cost: int, actions: ActionSpace) -> DepthDecision:
    """The decision after the engine has lowered the depth under load."""
    return replace(decision, granted=max_cost / actions.full_cost, max_cost=max_cost, decided_by="elastic")


def check_tier(tier: Tier, actions: ActionSpace) -> None:
    """Raise FieldError if a budget of `tier` cannot pay for the layers that always run in this model."""
    budgets = {"max_budget": tier.max_budget, "default_budget": tier.default_budget}
    for field, budget in budgets.items():
        if budget != "auto" and budget < actions.smallest_budget - 1e-9:
            reason = f"{budget!r} is too small for this model, allowed is {actions.allowed_budgets}"
            raise FieldError(("tiers", tier.name, field), reason)
