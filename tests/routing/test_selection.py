"""The best layers that can be paid for, ties to the lower index, and a gradient where the hard choice has none."""

import itertools

import pytest
import torch
from torch import Tensor

from buddy_routing.action_space import MILLI_LAYERS, ActionSpace
from buddy_routing.selection import _soft_mix, action_shares, select_path, straight_through

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
    torch.testing.assert_close(soft[..., 0], paths.float(), rtol=0, atol=1e-6)
    assert soft.requires_grad


def test_straight_through_has_the_gradient_of_the_softmax_times_the_number_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, generator=generator, requires_grad=True)
    num_run = torch.tensor([2, 4, 6])
    upstream = torch.randn(3, 6, generator=generator)
    straight_through(scores, select_path(scores, num_run * MILLI_LAYERS, SIX), SIX)[..., 0].backward(upstream)
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


@pytest.mark.parametrize("small_cost", [297, 500, 1])
def test_with_small_ffns_no_path_that_can_be_paid_for_has_a_higher_sum_of_scores(small_cost: int) -> None:
    actions = ActionSpace.with_small_ffns(7, small_cost)
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that there are ties; costs to the milli-layer, as budgets never are.
    scores = torch.randn(60, 10, generator=generator).mul(2).round() / 2
    max_cost = torch.cat((torch.randint(2000, 7001, (59,), generator=generator), torch.tensor([7000])))
    mixes = torch.tensor(list(itertools.product(range(3), repeat=5)))  # [3^5, 5]
    costs = torch.tensor([0, 1000, small_cost])[mixes].sum(-1)
    paths = select_path(scores, max_cost, actions)
    for row_scores, most, path in zip(scores, max_cost, paths, strict=True):
        affordable = mixes[costs <= most - 2000]
        assert actions.cost(path.tolist()) <= most
        if most == actions.full_cost:
            assert path.tolist() == [1] * 7, "full depth is the model itself"
            continue
        assert _total(row_scores, path[1:-1].long()[None]) == _total(row_scores, affordable).max()


def _total(scores: Tensor, mixes: Tensor) -> Tensor:
    """[N]: sums of scores [C x 2] of the actions in mixes [N, C]."""
    given = torch.nn.functional.pad(scores.view(-1, 2), (1, 0))  # [C, 3]
    return given[torch.arange(len(given)), mixes].sum(-1)


def test_straight_through_with_small_ffns_has_the_value_of_the_path_and_a_soft_one_of_the_same_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    actions = ActionSpace.with_small_ffns(8, 297)
    scores = torch.randn(4, 12, generator=generator, requires_grad=True)
    paths = select_path(scores, torch.tensor([2300, 4100, 6000, 7900]), actions)
    shares = straight_through(scores, paths, actions)
    torch.testing.assert_close(shares, action_shares(paths), rtol=0, atol=1e-6)
    hard = action_shares(paths)[:, 1:-1]
    soft = _soft_mix(scores.unflatten(-1, (-1, 2)), hard, actions)
    costs = torch.tensor([1.0, 0.297])
    torch.testing.assert_close((soft * costs).sum((-1, -2)), (hard * costs).sum((-1, -2)), rtol=1e-4, atol=1e-4)
    (shares[..., 1:-1, :] * costs).sum().backward()
    assert scores.grad is not None
    assert (scores.grad.abs().sum(-1) > 0).all()
