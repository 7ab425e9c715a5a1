from dataclasses import replace

import pytest
import torch

from buddy_kernels import PathAction, Projection, RouterWeights
from buddy_kernels.gpu.path_router import score_layers, score_layers_reference
from listed_rows import every_other, listed
from tolerances import assert_close


def a_router(num_lanes, width, num_scores, num_features, rank, device):
    torch.manual_seed(width)
    router = RouterWeights(
        prior=torch.randn(num_scores, device=device),
        costs=torch.empty(0),
        forced=torch.empty(0),
        sums=torch.randn(num_lanes, width, dtype=torch.float64, device=device),
        last_paths=torch.empty(0),
    )
    if not num_features:
        return router
    down = Projection(torch.randn(rank, num_features, device=device) / 8, torch.randn(rank, device=device))
    return replace(router, down=down, up=Projection(torch.randn(num_scores, rank, device=device), router.prior.flip(0)))


def rows_of(num_rows, width, dtype, device):
    """first_v, positions, lanes and path actions; every third row is counted already."""
    torch.manual_seed(num_rows)
    first_v = torch.randn(num_rows, width, device=device).to(dtype)
    positions = torch.randint(0, 5000, (num_rows,), device=device)
    lanes = torch.randperm(num_rows + 3, device=device)[:num_rows]
    actions = torch.full((num_rows,), PathAction.CHOOSE, dtype=torch.uint8, device=device)
    actions[::3] = PathAction.CONTINUE
    return first_v, positions, lanes, actions


def both(given, router, live, num_scores, device):
    """Sums and scores by the kernel and by the reference."""
    results = []
    for run in (score_layers, score_layers_reference):
        own = replace(router, sums=router.sums.clone())
        scores = torch.full((live.num_rows, num_scores), torch.nan, device=device)
        run(*given, own, live, scores)
        results.append((own.sums, scores))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("num_rows", "width", "num_scores", "halves", "rank"),
    [(1, 1, 1, 2, 1), (63, 130, 30, 2, 5), (5, 257, 14, 1, 32), (5, 128, 6, 0, 0)],
    ids=["one", "mean_and_newest", "mean", "prior"],
)
def test_sums_have_the_reference_s_bits_and_scores_follow(dtype, num_rows, width, num_scores, halves, rank, device):
    router = a_router(num_rows + 3, width, num_scores, halves * width, rank, device)
    live = every_other(num_rows, device)
    given = rows_of(num_rows, width, dtype, device)
    (sums, scores), (want_sums, want_scores) = both(given, router, live, num_scores, device)
    assert torch.equal(sums, want_sums)
    assert torch.equal(scores.isnan(), want_scores.isnan())
    done = live.listed()
    assert_close(scores[done], want_scores[done], 2 * width, depth=2)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(device):
    router = a_router(66, 130, 30, 260, 5, device)
    given = rows_of(63, 130, torch.float32, device)
    (_, together), _ = both(given, router, listed(range(63), 63, device), 30, device)
    for row in (0, 17, 62):
        (_, alone), _ = both([x[row : row + 1] for x in given], router, listed([0], 1, device), 30, device)
        assert torch.equal(alone[0], together[row])


def test_without_rows_nothing_is_counted(device):
    router = a_router(8, 16, 4, 32, 2, device)
    (sums, scores), _ = both(rows_of(5, 16, torch.float32, device), router, listed([], 5, device), 4, device)
    assert torch.equal(sums, router.sums)
    assert scores.isnan().all()


def test_a_decision_module_of_another_width_is_named(device):
    router = a_router(8, 16, 4, 17, 2, device)
    with pytest.raises(ValueError, match="down has 17 inputs, allowed is 16 or 32"):
        score_layers(
            *rows_of(5, 16, torch.float32, device), router, every_other(5, device), torch.empty(5, 4, device=device)
        )
