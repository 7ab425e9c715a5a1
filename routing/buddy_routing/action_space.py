"""The actions of a path's layers and their costs (design section 1). Imports no torch.

A path names an action for each layer: `SKIP` or `RUN`. An action costs an integer number of milli-layers, so that the
cost of a token adds up exactly, from the step to the accounts. A budget is a limit that is never exceeded. The paper
rounds to the nearest layer (arXiv 2606.09514, section 3), which can exceed the budget by half a layer, so we round
down.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

SKIP, RUN = 0, 1
"""The actions, as in buddy_kernels.step."""
MILLI_LAYERS = 1000
"""The cost of running a full layer."""
MOST_KNOWN = 1 << 16


class BudgetError(ValueError):
    """A budget that the model cannot honour; the message names the value and the allowed range."""


@dataclass(frozen=True)
class ActionSpace:
    """`costs` [L][A] are the milli-layers of each action at each layer. `forced` layers run in every path; the others
    are free."""

    costs: tuple[tuple[int, ...], ...]
    forced: frozenset[int]

    @classmethod
    def skip_or_run(cls, num_layers: int) -> "ActionSpace":
        """Every layer except the first and the last may be skipped."""
        return cls(((0, MILLI_LAYERS),) * num_layers, frozenset({0, num_layers - 1}))

    @property
    def num_layers(self) -> int:
        return len(self.costs)

    @cached_property
    def free(self) -> list[int]:
        """The layers that are not forced, in order."""
        return [layer for layer in range(self.num_layers) if layer not in self.forced]

    @cached_property
    def full_cost(self) -> int:
        """The cost of a token that runs every layer."""
        return sum(of_layer[RUN] for of_layer in self.costs)

    @cached_property
    def smallest_cost(self) -> int:
        """The cost of a token that runs only the forced layers."""
        return sum(of_layer[RUN if layer in self.forced else SKIP] for layer, of_layer in enumerate(self.costs))

    @property
    def smallest_budget(self) -> float:
        return self.smallest_cost / self.full_cost

    @property
    def allowed_budgets(self) -> str:
        """The allowed range, for error messages."""
        return f"a number from {self.smallest_budget:.4g} ({len(self.forced)} of {self.num_layers} layers) to 1"

    def max_cost(self, budget: float) -> int:
        """The milli-layers that a token may cost at `budget`, in steps of the smallest cost difference between actions.

        The epsilon keeps products such as 0.7 * 10 = 6.999... from losing a layer that the budget pays for.

        Raises BudgetError for a budget that does not pay for the forced layers, is above 1, or not finite.
        """
        if not (math.isfinite(budget) and self.smallest_budget - 1e-9 <= budget <= 1.0):
            raise BudgetError(f"budget {budget!r} is outside the allowed range: {self.allowed_budgets}")
        step = math.gcd(*(cost for of_layer in self.costs for cost in of_layer))
        return max(self.smallest_cost, math.floor(budget * self.full_cost + 1e-6) // step * step)

    def cost(self, path: Iterable[int]) -> int:
        """The milli-layers that a path [L] costs."""
        return sum(of_layer[action] for of_layer, action in zip(self.costs, path, strict=True))

    def layers_run(self, path: Iterable[int]) -> tuple[int, ...]:
        """The indices of the layers that a path [L] runs."""
        return tuple(layer for layer, action in enumerate(path) if action != SKIP)

    @cached_property
    def path_costs(self) -> "PathCosts":
        """`cost` for paths as bytes, cached because the same few paths keep recurring."""
        return PathCosts(self)


class PathCosts(dict[bytes, int]):
    """A cache of path costs."""

    def __init__(self, space: ActionSpace) -> None:
        super().__init__()
        self._space = space

    def __missing__(self, path: bytes) -> int:
        if len(self) == MOST_KNOWN:
            self.clear()
        cost = self[path] = self._space.cost(path)
        return cost
