import pytest
import torch

from buddy_kernels import PathAction, RouterWeights
from buddy_kernels.gpu.path_choice import choose_paths
from buddy_routing.action_space import ActionSpace
from buddy_routing.selection import select_path
from listed_rows import listed

POISON = -5


def a_router(space, num_lanes, device):
    """Costs as buddy_routing.stepper gives them; each lane's last path is its own."""
    costs = [[*of_layer, *of_layer[-1:] * (space.num_actions - len(of_layer))] for of_layer in space.costs]
    none = torch.empty(0)
    return RouterWeights(
        prior=none,
        costs=torch.tensor(costs, device=device),
        forced=torch.tensor([layer in space.forced for layer in range(space.num_layers)], device=device),
        sums=none,
        last_paths=torch.randint(0, 2, (num_lanes, space.num_layers), dtype=torch.int8, device=device),
    )


def chosen(space, scores, max_costs, live, device, aligned=None, actions=None, router=None):
    """Paths of the rows, poisoned where there is none."""
    num_rows = len(scores)
    router = router or a_router(space, num_rows, device)
    lanes = torch.arange(num_rows, device=device).flip(0)
    if actions is None:
        actions = torch.full((num_rows,), PathAction.CHOOSE, dtype=torch.uint8, device=device)
    if aligned is None:
        aligned = torch.arange(num_rows, device=device)
    paths = torch.full((num_rows, space.num_layers), POISON, dtype=torch.int8, device=device)
    choose_paths(scores, max_costs, lanes, actions, aligned, router, live, paths)
    return paths


def random_scores(space, num_rows, device):
    """Half of the rows with many ties."""
    scores = torch.randn(num_rows, space.num_scores, device=device)
    scores[::2] = (scores[::2] * 2).round() / 2
    return scores


def random_max_costs(space, num_rows, device):
    return torch.randint(space.smallest_cost, space.full_cost + 1, (num_rows,), device=device)


each_space = pytest.mark.parametrize(
    "space",
    [
        ActionSpace.skip_or_run(2),
        ActionSpace.skip_or_run(32),
        ActionSpace(((0, 1000), (0, 700), (0, 300), (100, 1100), (0, 500), (0, 1000)), frozenset({0, 5})),
        ActionSpace.with_small_ffns(3, 400),
        ActionSpace.with_small_ffns(17, 250),
    ],
    ids=["two_layers", "32_layers", "uneven_costs", "one_small_ffn", "small_ffns"],
)


@each_space
@pytest.mark.parametrize("num_rows", [1, 9])
def test_paths_are_those_of_select_path(space, num_rows, device):
    torch.manual_seed(num_rows)
    scores, max_costs = random_scores(space, num_rows, device), random_max_costs(space, num_rows, device)
    got = chosen(space, scores, max_costs, listed(range(num_rows), num_rows, device), device)
    assert torch.equal(got.cpu(), select_path(scores.cpu(), max_costs.cpu(), space))


@each_space
def test_what_pays_for_all_layers_runs_all(space, device):
    scores = -random_scores(space, 3, device).abs()
    got = chosen(space, scores, torch.full((3,), space.full_cost, device=device), listed(range(3), 3, device), device)
    assert (got == 1).all()


@each_space
def test_aligned_rows_share_the_path_of_their_summed_scores(space, device):
    torch.manual_seed(0)
    aligned = torch.tensor([0, 1, 0, 0, 1, 0], device=device)
    scores, max_costs = random_scores(space, 6, device), random_max_costs(space, 6, device)[aligned]
    live = [0, 1, 2, 4, 5]
    together = torch.zeros_like(scores).index_add_(0, aligned[live], scores[live])
    scores[3] = torch.nan
    got = chosen(space, scores, max_costs, listed(live, 6, device), device, aligned=aligned)
    want = select_path(together.cpu(), max_costs.cpu(), space)[aligned.cpu()]
    assert torch.equal(got[live].cpu(), want[live])
    assert (got[3] == POISON).all()


def test_rows_that_do_not_choose_keep_their_lane_s_path_and_others_leave_theirs_there(device):
    space = ActionSpace.skip_or_run(5)
    router = a_router(space, 4, device)
    before = router.last_paths.clone()
    actions = torch.tensor(
        [PathAction.KEEP, PathAction.CHOOSE, PathAction.CONTINUE, 1], dtype=torch.uint8, device=device
    )
    max_costs = torch.full((4,), 4000, device=device)
    live = listed([0, 1, 2], 4, device)
    got = chosen(space, random_scores(space, 4, device), max_costs, live, device, actions=actions, router=router)
    after = router.last_paths.flip(0)  # of each row's lane
    assert torch.equal(got[[0, 2]], before.flip(0)[[0, 2]])
    assert torch.equal(after[[0, 1, 2]], got[[0, 1, 2]])
    assert got[1].sum() == 4
    assert (got[3] == POISON).all()
    assert torch.equal(after[3], before.flip(0)[3])


def test_without_rows_nothing_is_chosen(device):
    space = ActionSpace.with_small_ffns(4, 250)
    max_costs = torch.full((3,), 3000, device=device)
    got = chosen(space, random_scores(space, 3, device), max_costs, listed([], 3, device), device)
    assert (got == POISON).all()


def test_more_than_three_actions_are_refused(device):
    space = ActionSpace(((0, 1000), (0, 1000, 500, 100), (0, 1000)), frozenset({0, 2}))
    with pytest.raises(ValueError, match="costs has 4 actions, allowed is 2 or 3"):
        chosen(
            space, torch.zeros(1, 3, device=device), torch.tensor([3000], device=device), listed([0], 1, device), device
        )
