"""Paths from scores: the best actions that a budget pays for. The reference is `buddy_routing.selection.select_path`
with what `buddy_routing.planner` does around it; the same scores give the same path, to the last tie."""

# N rows, L layers, C of them free, A actions of a layer, skipping included

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.launch import launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.step import RUN, SKIP, SMALL, PathAction
from buddy_kernels.step_weights import RouterWeights

_SKIP, _RUN, _SMALL = tl.constexpr(SKIP), tl.constexpr(RUN), tl.constexpr(SMALL)
_CHOOSE = tl.constexpr(int(PathAction.CHOOSE))


@triton.jit
def _choose_paths_kernel(
    scores,
    max_costs,
    lanes,
    path_actions,
    aligned,
    costs,
    forced,
    last_paths,
    live,
    live_count,
    paths,
    decisions,
    NUM_LAYERS: tl.constexpr,
    NUM_ACTIONS: tl.constexpr,
    NUM_SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    num_live = tl.load(live_count)
    if place >= num_live:
        return
    row = tl.load(live + place).to(tl.int64)
    kept = last_paths + tl.load(lanes + row) * NUM_LAYERS
    layer = tl.arange(0, BLOCK)
    is_layer = layer < NUM_LAYERS
    is_free = is_layer & (tl.load(forced + layer, mask=is_layer, other=1) == 0)
    path = tl.load(kept + layer, mask=is_layer, other=_SKIP)
    if tl.load(path_actions + row) == _CHOOSE:
        leader = tl.load(aligned + row)
        skip_cost = tl.load(costs + layer * NUM_ACTIONS, mask=is_layer, other=0)
        run_cost = tl.load(costs + layer * NUM_ACTIONS + _RUN, mask=is_layer, other=0)
        left = tl.load(max_costs + leader) - tl.sum(tl.where(is_free, skip_cost, run_cost), 0)
        own_scores = scores + (tl.cumsum(is_free.to(tl.int32), 0) - 1) * (NUM_ACTIONS - 1)
        score_of_run = _summed(own_scores, is_free, leader, live, num_live, aligned, NUM_SCORES)
        if NUM_ACTIONS == 2:
            chosen = _best_layers(score_of_run, run_cost - skip_cost, left, is_free, BLOCK)
        else:
            score_of_small = _summed(own_scores + 1, is_free, leader, live, num_live, aligned, NUM_SCORES)
            small_cost = tl.load(costs + layer * NUM_ACTIONS + _SMALL, mask=is_layer, other=0)
            own = decisions + place.to(tl.int64) * BLOCK * BLOCK * BLOCK
            chosen = _best_mix(score_of_run, score_of_small, run_cost, small_cost, left, is_free, own, BLOCK)
        path = tl.where(is_free, chosen, _RUN).to(tl.int8)
    tl.store(kept + layer, path, mask=is_layer)
    tl.store(paths + row * NUM_LAYERS + layer, path, mask=is_layer)


@triton.jit
def _summed(scores, is_free, leader, live, num_live, aligned, NUM_SCORES: tl.constexpr):
    """The scores of all rows that share the leader's path, added in their order."""
    total = tl.where(is_free, 0.0, 0.0)
    for place in range(num_live):
        row = tl.load(live + place).to(tl.int64)
        if tl.load(aligned + row) == leader:
            total += tl.load(scores + row * NUM_SCORES, mask=is_free, other=0.0)
    return total


@triton.jit
def _best_layers(score, extra, left, is_free, BLOCK: tl.constexpr):
    """The free layers by falling score, of equals the lower first, each that still fits."""
    layer = tl.arange(0, BLOCK)
    runs = layer < 0
    for _ in range(BLOCK):
        fits = is_free & (runs == 0) & (extra <= left)
        # A score of -inf is still a score of a layer that fits.
        rank = tl.where(fits, tl.maximum(score, -3.4e38), float("-inf"))
        best = tl.argmax(rank, 0, tie_break_left=True)
        taken = fits & (layer == best)
        left -= tl.sum(tl.where(taken, extra, 0), 0)
        runs = runs | taken
    return tl.where(runs, _RUN, _SKIP)


@triton.jit
def _best_mix(score_of_run, score_of_small, run_cost, small_cost, left, is_free, decisions, BLOCK: tl.constexpr):
    """All free layers if that is paid for, else the mix with the highest sum: an exact knapsack.

    All free layers cost the same, so that what a path costs follows from how many run and how many have the small FFN.
    best[r, s] is the highest sum of the layers so far of which r and s do; how each layer came to it is kept in
    `decisions` [L, r, s], to be followed back from the end.
    """
    layer = tl.arange(0, BLOCK)
    runs, smalls = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    one_run_less = tl.maximum(runs - 1, 0) + smalls * 0
    one_small_less = tl.maximum(smalls - 1, 0) + runs * 0
    cell = runs * BLOCK + smalls
    best = tl.where(cell == 0, 0.0, float("-inf"))
    for index in range(BLOCK):
        here = is_free & (layer == index)
        if tl.sum(here.to(tl.int32), 0) == 1:
            run = tl.sum(tl.where(here, score_of_run, 0.0), 0)
            small = tl.sum(tl.where(here, score_of_small, 0.0), 0)
            with_run = tl.where(runs > 0, tl.gather(best, one_run_less, 0) + run, float("-inf"))
            with_small = tl.where(smalls > 0, tl.gather(best, one_small_less, 1) + small, float("-inf"))
            better = tl.maximum(best, tl.maximum(with_run, with_small))
            decision = tl.where(better == best, _SKIP, tl.where(better == with_run, _RUN, _SMALL))
            tl.store(decisions + index * BLOCK * BLOCK + cell, decision.to(tl.int8))
            best = better
    of_run = tl.max(tl.where(is_free, run_cost, 0), 0)
    of_small = tl.max(tl.where(is_free, small_cost, 0), 0)
    paid = tl.where(runs * of_run + smalls * of_small <= left, best, float("-inf"))
    most = tl.max(tl.max(paid, 1), 0)
    at = tl.min(tl.min(tl.where(paid == most, cell, BLOCK * BLOCK), 1), 0)
    tl.debug_barrier()  # What follows reads what other threads have stored.
    chosen = layer * 0
    for back in range(BLOCK):
        index = BLOCK - 1 - back
        here = is_free & (layer == index)
        if tl.sum(here.to(tl.int32), 0) == 1:
            decision = tl.load(decisions + index * BLOCK * BLOCK + at).to(tl.int32)
            chosen = tl.where(here, decision, chosen)
            at -= tl.where(decision == _RUN, BLOCK, tl.where(decision == _SMALL, 1, 0))
    runs_all = left >= of_run * tl.sum(is_free.to(tl.int32), 0)
    return tl.where(runs_all, _RUN, chosen)


def choose_paths(
    scores: Tensor,
    max_costs: Tensor,
    lanes: Tensor,
    path_actions: Tensor,
    aligned: Tensor,
    router: RouterWeights,
    live: RowList,
    paths: Tensor,
) -> None:
    """The path of each live row: what its scores and its budget give, or the lane's last one.

    A warm-up before a capture must have a live count of 0, or it changes paths that later tokens keep.

    Args:
        scores: [N, C x (A - 1)] fp32, those of a free layer's actions besides skipping it side by side.
        max_costs: [N] int64, milli-layers that a token may cost.
        lanes: [N] int64.
        path_actions: [N] uint8 of PathAction.
        aligned: [N] int64, the live row whose path each shares, by the sum of their scores; itself: none.
        router: `costs` and `forced` on the device; `last_paths` [lanes, L] are changed in place.
        live: of N.
        paths: [N, L] int8; rows that are not live stay.

    Raises:
        ValueError: a tensor does not fit, or a layer has more than three actions.
    """
    num_rows, (num_layers, num_actions) = live.num_rows, router.costs.shape
    if num_actions not in (2, 3):
        raise ValueError(f"router.costs has {num_actions} actions, allowed is 2 or 3")
    device = scores.device
    check_dense("scores", scores, device, (num_rows, None), torch.float32)
    for name, of_rows in (("max_costs", max_costs), ("lanes", lanes), ("aligned", aligned)):
        check_dense(name, of_rows, device, (num_rows,), torch.int64)
    check_dense("path_actions", path_actions, device, (num_rows,), torch.uint8)
    check_dense("router.costs", router.costs, device, (num_layers, num_actions), torch.int64)
    check_dense("router.forced", router.forced, device, (num_layers,), torch.bool)
    check_dense("router.last_paths", router.last_paths, device, (None, num_layers), torch.int8)
    live.check("live", num_rows, device)
    check_dense("paths", paths, device, (num_rows, num_layers), torch.int8)
    block = triton.next_power_of_2(num_layers)
    if num_actions == 3 and scores.shape[1] // 2 >= block:
        raise ValueError(f"scores are of {scores.shape[1] // 2} free layers, allowed with small FFNs are {block - 1}")
    decisions = None
    if num_actions == 3:
        decisions = torch.empty(num_rows, block, block, block, dtype=torch.int8, device=device)
    launch(
        _choose_paths_kernel,
        (num_rows,),
        scores,
        max_costs,
        lanes,
        path_actions,
        aligned,
        router.costs,
        router.forced,
        router.last_paths,
        live.indices,
        live.count,
        paths,
        decisions,
        NUM_LAYERS=num_layers,
        NUM_ACTIONS=num_actions,
        NUM_SCORES=scores.shape[1],
        BLOCK=block,
        num_warps=1 if num_actions == 2 else 4,
    )
