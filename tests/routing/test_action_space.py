"""What a budget pays for. How the API asks for one is in tests/server/test_budget.py."""

import math
import random

import msgspec
import pytest

import buddy_kernels
from buddy_routing.action_space import MILLI_LAYERS, RUN, SKIP, ActionSpace, BudgetError

HALVES = ActionSpace(((0, 1000), (0, 400), (0, 250), (0, 1000)), frozenset({0, 3}))
"""Layers of different cost."""


def test_actions_are_those_of_the_kernels() -> None:
    assert (SKIP, RUN) == (buddy_kernels.SKIP, buddy_kernels.RUN)


@pytest.mark.parametrize("num_layers", range(2, 81))
def test_multiples_of_one_layer_pay_for_exactly_that_many(num_layers: int) -> None:
    actions = ActionSpace.skip_or_run(num_layers)
    for count in range(2, num_layers + 1):
        assert actions.max_cost(count / num_layers) == count * MILLI_LAYERS
        assert actions.max_cost(count * (1 / num_layers)) == count * MILLI_LAYERS
    assert actions.max_cost(actions.smallest_budget) == actions.smallest_cost == 2 * MILLI_LAYERS


@pytest.mark.parametrize(
    ("budget", "num_layers", "count"), [(0.7, 10, 7), (0.29, 100, 29), (0.6, 5, 3), (0.57, 100, 57)]
)
def test_products_that_fall_short_by_rounding_lose_no_layer(budget: float, num_layers: int, count: int) -> None:
    assert ActionSpace.skip_or_run(num_layers).max_cost(budget) == count * MILLI_LAYERS


def test_budget_is_a_ceiling_and_never_wastes_a_whole_layer() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        actions = ActionSpace.skip_or_run(rng.randint(2, 80))
        budget = rng.uniform(actions.smallest_budget, 1)
        cost = actions.max_cost(budget)
        assert cost % MILLI_LAYERS == 0
        assert cost <= budget * actions.full_cost + 1e-6
        assert cost + MILLI_LAYERS > budget * actions.full_cost


@pytest.mark.parametrize("budget", [0.0, -0.5, 0.24, 1.0000001, 2.0, math.nan, math.inf, -math.inf])
def test_budget_out_of_range_is_an_error_that_names_the_smallest(budget: float) -> None:
    with pytest.raises(BudgetError, match=r"is outside the allowed range: a number from 0\.25 \(2 of 8 layers\) to 1"):
        ActionSpace.skip_or_run(8).max_cost(budget)


def test_layers_may_cost_different_amounts() -> None:
    assert (HALVES.free, HALVES.full_cost, HALVES.smallest_cost) == ([1, 2], 2650, 2000)
    assert HALVES.max_cost(1.0) == 2650
    assert HALVES.max_cost(0.9) == 2350, "costs here differ by 50 milli-layers"
    assert HALVES.cost(bytes([RUN, RUN, SKIP, RUN])) == 2400
    assert HALVES.path_costs[bytes([RUN, SKIP, RUN, RUN])] == 2250
    assert HALVES.layers_run(bytes([RUN, SKIP, RUN, RUN])) == (0, 2, 3)


def test_an_action_space_crosses_a_process_boundary() -> None:
    assert HALVES.path_costs[bytes([RUN] * 4)] == 2650
    crossed = msgspec.msgpack.decode(msgspec.msgpack.encode(HALVES), type=ActionSpace)
    assert crossed == HALVES
