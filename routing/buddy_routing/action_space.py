"""The actions of a path's layers and their costs (design section 1). Imports no torch.

A path names an action for each of its columns, which are the layers and, behind them, the model's exits: `SKIP`, `RUN`
or, in a model with small FFNs, `SMALL`. An action costs an integer number of milli-layers, so that the cost of a token
adds up exactly, from the step to the accounts. A budget is a limit that is never exceeded. The paper rounds to the
nearest layer (arXiv 2606.09514, section 3), which can exceed the budget by half a layer, so we round down.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

SKIP, RUN, SMALL = 0, 1, 2
"""The actions, as in buddy_kernels.step."""
MILLI_LAYERS = 1000
"""The cost of running a full layer."""
MOST_KNOWN = 1 << 16


class BudgetError(ValueError):
    """A budget that the model cannot honour; the message names the value and the allowed range."""


@dataclass(frozen=True)
class ActionSpace:
    """`costs` [C][A] are the milli-layers of each action at each column of a path. `forced` columns run in every path;
    the others are free.

    The i-th of the `exits` stands for all layers after the first `exits[i]`, in column num_layers + i. A model with
    exits has one path for each, and the path of all layers: a budget takes the deepest that it pays for."""

    costs: tuple[tuple[int, ...], ...]
    forced: frozenset[int]
    exits: tuple[int, ...] = ()

    @classmethod
    def skip_or_run(cls, num_layers: int) -> "ActionSpace":
        """Every layer except the first and the last may be skipped."""
        return cls(((0, MILLI_LAYERS),) * num_layers, frozenset({0, num_layers - 1}))

    @classmethod
    def with_small_ffns(cls, num_layers: int, small_cost: int) -> "ActionSpace":
        """As `skip_or_run`, and a layer that may be skipped may also run with a small FFN, which costs `small_cost`
        milli-layers (Duo-LLM, arXiv 2410.10846)."""
        whole = (0, MILLI_LAYERS)
        free = ((*whole, small_cost),) * (num_layers - 2)
        return cls((whole, *free, whole), frozenset({0, num_layers - 1}))

    @classmethod
    def of_exits(cls, num_layers: int, exits: tuple[int, ...]) -> "ActionSpace":
        """An exit after each of the numbers of layers in `exits`; it costs a layer (Balcony, arXiv 2503.05005).

        Raises ValueError for exits that are not in rising order, or no cheaper than all layers.
        """
        if not exits or list(exits) != sorted(set(exits)) or not 0 < exits[0] <= exits[-1] < num_layers - 1:
            raise ValueError(
                f"exits {list(exits)} are not allowed: give one or more numbers of layers in rising order, "
                f"from 1 to {num_layers - 2} in a model of {num_layers} layers"
            )
        return cls(((0, MILLI_LAYERS),) * (num_layers + len(exits)), frozenset(range(exits[0])), exits)

    @property
    def num_columns(self) -> int:
        """The length of a path."""
        return len(self.costs)

    @property
    def num_layers(self) -> int:
        return len(self.costs) - len(self.exits)

    @cached_property
    def free(self) -> list[int]:
        """The columns that are not forced, in order."""
        return [column for column in range(self.num_columns) if column not in self.forced]

    @cached_property
    def num_actions(self) -> int:
        """The actions of the column that has most."""
        return max(map(len, self.costs))

    @property
    def num_scores(self) -> int:
        """The scores from which a path follows: one for each action of a free column besides skipping it."""
        return sum(len(self.costs[column]) - 1 for column in self.free)

    @cached_property
    def full_cost(self) -> int:
        """The cost of a token that runs every layer."""
        return sum(of_layer[RUN] for of_layer in self.costs[: self.num_layers])

    @cached_property
    def smallest_cost(self) -> int:
        """The cost of a token that leaves at the first exit; without exits, of one that runs only the forced layers."""
        if self.exits:
            return self.path_costs[self.exit_paths[0]]
        return sum(of_layer[RUN if layer in self.forced else SKIP] for layer, of_layer in enumerate(self.costs))

    @cached_property
    def exit_paths(self) -> tuple[bytes, ...]:
        """The paths of a model with exits, cheapest first; the last one runs all layers."""
        last = [self.num_layers + index for index in range(len(self.exits))]
        ran = [{*range(exit_), column} for exit_, column in zip(self.exits, last, strict=True)]
        ran.append(set(range(self.num_layers)))
        return tuple(bytes(RUN if column in path else SKIP for column in range(self.num_columns)) for path in ran)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The costs among which a Budget Predictor chooses, cheapest first: those of the exits' paths, or whole numbers
        of layers. The last one is full depth."""
        if self.exits:
            return tuple(self.path_costs[path] for path in self.exit_paths)
        lowest = -(-self.smallest_cost // MILLI_LAYERS)
        return (*range(lowest * MILLI_LAYERS, self.full_cost, MILLI_LAYERS), self.full_cost)

    def exit_path(self, max_cost: int) -> bytes:
        """The deepest path of a model with exits that `max_cost` pays for."""
        return max(
            (path for path in self.exit_paths if self.path_costs[path] <= max_cost), key=self.path_costs.__getitem__
        )

    @property
    def smallest_budget(self) -> float:
        return self.smallest_cost / self.full_cost

    @property
    def allowed_budgets(self) -> str:
        """The allowed range, for error messages."""
        num_layers = f"{self.smallest_cost / MILLI_LAYERS:g} of {self.num_layers} layers"
        return f"a number from {self.smallest_budget:.4g} ({num_layers}) to 1"

    def max_cost(self, budget: float) -> int:
        """The milli-layers that a token may cost at `budget`: what the deepest exit costs that it pays for, or a
        multiple of what all costs are multiples of.

        The epsilon keeps products such as 0.7 * 10 = 6.999... from losing a layer that the budget pays for.

        Raises BudgetError for a budget that does not pay for the cheapest path, is above 1, or not finite.
        """
        if not (math.isfinite(budget) and self.smallest_budget - 1e-9 <= budget <= 1.0):
            raise BudgetError(f"budget {budget!r} is outside the allowed range: {self.allowed_budgets}")
        paid = max(self.smallest_cost, math.floor(budget * self.full_cost + 1e-6))
        if self.exits:
            return self.path_costs[self.exit_path(paid)]
        step = math.gcd(*(cost for of_layer in self.costs for cost in of_layer))
        return paid // step * step

    def cost(self, path: Iterable[int]) -> int:
        """The milli-layers that a path [C] costs."""
        return sum(of_layer[action] for of_layer, action in zip(self.costs, path, strict=True))

    def layers_run(self, path: Iterable[int]) -> tuple[int, ...]:
        """The columns that a path [C] runs: the indices of its layers, and num_layers + i for the i-th exit."""
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
