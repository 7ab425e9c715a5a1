"""Budget arithmetic: how many layers a budget buys. A budget is a ceiling, never exceeded (design section 1).

The paper rounds to the nearest layer (arXiv 2606.09514, section 3); rounding can exceed the budget by half a
layer, so we floor.
"""

import math

ALWAYS_RUN = 2
"""The first and the last layer run at any budget."""


class BudgetError(ValueError):
    """A budget outside what the model can honour; the message names the value and the allowed range."""


def smallest_budget(num_layers: int) -> float:
    """The smallest budget that pays for the layers that always run: 2 / L."""
    return ALWAYS_RUN / num_layers


def num_run_layers(budget: float, num_layers: int) -> int:
    """n(b) = max(2, floor(b * L + 1e-9)), the layers every token runs at `budget`.

    The epsilon keeps products such as 0.7 * 10 = 6.999... from losing the layer they pay for.

    Raises BudgetError for a budget below 2 / L, above 1, or not finite.
    """
    lowest = smallest_budget(num_layers)
    if not (math.isfinite(budget) and lowest - 1e-9 <= budget <= 1.0):
        raise BudgetError(
            f"budget {budget!r} is outside the allowed range: a number from {lowest:.4g} "
            f"({ALWAYS_RUN} of {num_layers} layers) to 1"
        )
    return max(ALWAYS_RUN, math.floor(budget * num_layers + 1e-9))
