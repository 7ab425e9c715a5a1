"""The best layers that can be paid for, ties to the lower index, and a gradient where the hard choice has none."""

import pytest
import torch

from buddy_routing.action_space import MILLI_LAYERS, ActionSpace
from buddy_routing.selection import select_path, straight_through

SIX = ActionSpace.skip_or_run(6)


def test_first_and_last_run_and_the_best_between() -> None:
    scores = torch.tensor([0.1, 0.9, -1.0, 0.5])
    expected = {2: [1, 0, 0, 0, 0, 1], 3: [1, 0, 1, 0, 0, 1], 4: [1, 0, 1, 0, 1, 1], 5: [1, 1, 1, 0, 1, 1], 6: [1] * 6}
    for num_run, path in expected.items():
        assert select_path(scores, torch.tensor(num_run * MILLI_LAYERS), SIX).tolist() == path


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 1.0, 2.0]])
    assert select_path(scores, torch.tensor([4000, 5000]), SIX).tolist() == [[1, 1, 1, 0, 0, 1], [1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("num_layers", [2, 3, 6, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_runs_exactly_its_own_number(num_layers: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that there are many ties.
    scores = torch.randn(7, 5, num_layers - 2, generator=generator).mul(2).round().to(dtype)
    num_run = torch.randint(2, num_layers + 1, (7, 5), generator=generator)
    paths = select_path(scores, num_run * MILLI_LAYERS, ActionSpace.skip_or_run(num_layers))
    assert (paths.shape, paths.dtype) == ((7, 5, num_layers), torch.int8)
    assert torch.equal(paths.sum(-1), num_run)
    assert paths[..., 0].all()
    assert paths[..., -1].all()


def test_straight_through_has_the_value_of_the_path() -> None:
    scores = torch.randn(3, 9, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    actions = ActionSpace.skip_or_run(12)
    paths = select_path(scores, torch.randint(2, 13, (3, 9)) * MILLI_LAYERS, actions)
    soft = straight_through(scores, paths, actions)
    torch.testing.assert_close(soft, paths.float(), rtol=0, atol=1e-6)
    assert soft.requires_grad


def test_straight_through_has_the_gradient_of_the_softmax_times_the_number_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, generator=generator, requires_grad=True)
    num_run = torch.tensor([2, 4, 6])
    upstream = torch.randn(3, 6, generator=generator)
    straight_through(scores, select_path(scores, num_run * MILLI_LAYERS, SIX), SIX).backward(upstream)
    got, scores.grad = scores.grad, None
    (scores.softmax(-1) * (num_run - 2)[:, None]).backward(upstream[:, 1:-1])
    assert got is not None
    torch.testing.assert_close(got, scores.grad)
    assert (got[0] == 0).all(), "where nothing is chosen there is nothing to learn"
    assert (got[1] != 0).all()


def test_a_layer_that_cannot_be_paid_for_leaves_room_for_a_cheaper_one() -> None:
    actions = ActionSpace(((0, 1000), (0, 800), (0, 300), (0, 300), (0, 1000)), frozenset({0, 4}))
    scores = torch.tensor([3.0, 1.0, 2.0])
    budgets = torch.tensor([2000, 2500, 2600, 2800, 3200, 3400])
    paths = [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 1]]
    assert select_path(scores.expand(6, 3), budgets, actions)[:, 1:-1].tolist() == paths
