"""The search bound on a tiny model, against trying every path."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.duo import new_small_ffns
from buddy_routing.train.answer_loss import answer_loss, fixed_paths
from buddy_routing.train.example import Example, ExampleBatch, packed_in_order
from buddy_server.eval.search_bound import path_costs, search_paths
from tiny_models import SHAPE, save_random_model

NUM_EXAMPLES = 3


@pytest.fixture
def model(tmp_path: Path) -> RoutedDecoder:
    save_random_model("llama", tmp_path)
    return load_model(tmp_path, torch.float32, torch.device("cpu")).model


@pytest.fixture
def batch() -> ExampleBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, SHAPE["vocab_size"], (NUM_EXAMPLES, 12), generator=generator).tolist()
    return next(packed_in_order([Example(tuple(of_one), 8) for of_one in ids], 1, 40))


def lowest_nats(model: RoutedDecoder, batch: ExampleBatch, max_cost: int) -> Tensor:
    """[E]: of all paths that cost at most so much."""
    actions = model.spec.actions
    paths = torch.tensor(list(itertools.product(*(range(len(of)) for of in actions.costs))), dtype=torch.int8)
    paths = paths[(paths[:, 0] == 1) & (paths[:, -1] == 1) & (path_costs(paths, actions) <= max_cost)]
    nats = [answer_loss(model, batch, fixed_paths(batch, path.expand(NUM_EXAMPLES, -1))).nats for path in paths]
    return torch.stack(nats).amin(0)


@pytest.mark.parametrize("small", [False, True])
def test_found_paths_are_paid_for_and_near_the_best_of_all(
    small: bool, model: RoutedDecoder, batch: ExampleBatch
) -> None:
    if small:
        model = model.with_small_ffns(new_small_ffns(model, 4))
    max_costs = (5000, 3500)
    found = search_paths(model, batch, max_costs)
    assert tuple(found) == max_costs
    for max_cost in max_costs:
        best, full = (lowest_nats(model, batch, cost) for cost in (max_cost, model.spec.actions.full_cost))
        assert (found[max_cost].costs <= max_cost).all()
        assert (found[max_cost].nats >= best - 1e-5).all()
        # A beam does not find every best path; most of what there is to gain on one path for all it does.
        assert (found[max_cost].nats - best).mean() < 0.3 * (full.mean() - best.mean()).abs() + 0.05
