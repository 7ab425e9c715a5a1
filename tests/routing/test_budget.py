"""What a budget buys. How the API asks for one is in tests/server/test_budget.py."""

import math
import random

import pytest

from buddy_routing.budget import BudgetError, num_run_layers, smallest_budget


@pytest.mark.parametrize("num_layers", range(2, 81))
def test_multiples_of_one_layer_buy_exactly_that_many(num_layers: int) -> None:
    for count in range(2, num_layers + 1):
        assert num_run_layers(count / num_layers, num_layers) == count
        assert num_run_layers(count * (1 / num_layers), num_layers) == count
    assert num_run_layers(smallest_budget(num_layers), num_layers) == 2


@pytest.mark.parametrize(
    ("budget", "num_layers", "count"), [(0.7, 10, 7), (0.29, 100, 29), (0.6, 5, 3), (0.57, 100, 57)]
)
def test_products_that_fall_short_by_rounding_lose_no_layer(budget: float, num_layers: int, count: int) -> None:
    assert num_run_layers(budget, num_layers) == count


def test_budget_is_a_ceiling_and_never_wastes_a_whole_layer() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        num_layers = rng.randint(2, 80)
        budget = rng.uniform(smallest_budget(num_layers), 1)
        count = num_run_layers(budget, num_layers)
        assert count <= budget * num_layers + 1e-9
        assert count + 1 > budget * num_layers


@pytest.mark.parametrize("budget", [0.0, -0.5, 0.24, 1.0000001, 2.0, math.nan, math.inf, -math.inf])
def test_budget_out_of_range_is_an_error_that_names_the_smallest(budget: float) -> None:
    with pytest.raises(BudgetError, match=r"is outside the allowed range: a number from 0\.25 \(2 of 8 layers\) to 1"):
        num_run_layers(budget, 8)
