"""Scores of the layers, from the running mean of the first layer's V: one row is one sequence's newest token."""

# N rows, F width of one token's V, R rank, C scores

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.step import PathAction
from buddy_kernels.step_weights import RouterWeights

_BLOCK_FEATURES = 128
_CONTINUE = tl.constexpr(int(PathAction.CONTINUE))


def score_layers_reference(
    first_v: Tensor,
    positions: Tensor,
    lanes: Tensor,
    path_actions: Tensor,
    router: RouterWeights,
    live: RowList,
    scores: Tensor,
) -> None:
    """`score_layers` in plain torch; the truth up to the order of summation."""
    rows = live.listed()
    counted = rows[path_actions[rows] != PathAction.CONTINUE]
    router.sums[lanes[counted]] += first_v[counted].double()
    scores[rows] = router.prior
    if router.down is not None and router.up is not None:
        mean = (router.sums[lanes[rows]] / (positions[rows, None] + 1)).float()
        features = torch.cat((mean, first_v[rows].float()), -1)[:, : router.down.weight.shape[1]]
        hidden = functional.silu(functional.linear(features, router.down.weight, router.down.bias))
        scores[rows] = functional.linear(hidden, router.up.weight, router.up.bias) + router.prior


@triton.jit
def _score_layers_kernel(
    first_v,
    positions,
    lanes,
    path_actions,
    sums,
    prior,
    down,
    down_bias,
    up,
    up_bias,
    live,
    live_count,
    scores,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_SCORES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    place = tl.program_id(0)
    if place >= tl.load(live_count):
        return
    row = tl.load(live + place).to(tl.int64)
    lane = tl.load(lanes + row)
    num_tokens = (tl.load(positions + row) + 1).to(tl.float64)
    is_counted = tl.load(path_actions + row) != _CONTINUE
    unit, score = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_SCORES)
    hidden = tl.zeros((BLOCK_RANK,), tl.float32)
    for start in range(0, WIDTH, BLOCK_FEATURES):
        index = start + tl.arange(0, BLOCK_FEATURES)
        newest = tl.load(first_v + row * WIDTH + index, mask=index < WIDTH, other=0.0)
        total = tl.load(sums + lane * WIDTH + index, mask=index < WIDTH, other=0.0)
        if is_counted:
            total += newest.to(tl.float64)
            tl.store(sums + lane * WIDTH + index, total, mask=index < WIDTH)
        if down is not None:
            weights = down + unit[:, None] * FEATURES + index[None, :]
            read = (unit < RANK)[:, None] & (index < WIDTH)[None, :]
            mean = (total / num_tokens).to(tl.float32)
            hidden += tl.sum(tl.load(weights, mask=read, other=0.0) * mean[None, :], 1)
            if FEATURES > WIDTH:
                newest = newest.to(tl.float32)
                hidden += tl.sum(tl.load(weights + WIDTH, mask=read, other=0.0) * newest[None, :], 1)
    scored = tl.load(prior + score, mask=score < SCORES, other=0.0)
    if down is not None:
        hidden += tl.load(down_bias + unit, mask=unit < RANK, other=0.0)
        hidden = hidden * tl.sigmoid(hidden)
        read = (score < SCORES)[:, None] & (unit < RANK)[None, :]
        weights = tl.load(up + score[:, None] * RANK + unit[None, :], mask=read, other=0.0)
        scored += tl.sum(weights * hidden[None, :], 1) + tl.load(up_bias + score, mask=score < SCORES, other=0.0)
    tl.store(scores + row * SCORES + score, scored, mask=score < SCORES)


def score_layers(
    first_v: Tensor,
    positions: Tensor,
    lanes: Tensor,
    path_actions: Tensor,
    router: RouterWeights,
    live: RowList,
    scores: Tensor,
) -> None:
    """Count each live row's V in its lane's running sums, unless it is counted already, and score the layers.

    The sums are fp64 and take one addition a token, as the reference's: both have the same bits, and so has the mean.
    A warm-up before a capture must have a live count of 0, or it counts tokens that are none.

    Args:
        first_v: [N, F] contiguous, fp32, bf16 or fp16, the first layer's V of each row.
        positions: [N] int64.
        lanes: [N] int64.
        path_actions: [N] uint8 of PathAction.
        router: its tensors on the device, the Decision Module's fp32; without `down` the scores are the prior. `sums`
            [lanes, F] are changed in place.
        live: of N.
        scores: [N, C] fp32.

    Raises:
        ValueError: a tensor does not fit.
    """
    num_rows, width = first_v.shape
    num_scores = router.prior.shape[0]
    device = first_v.device
    check_dense("first_v", first_v, device, (num_rows, width), *FLOATS)
    check_dense("positions", positions, device, (num_rows,), torch.int64)
    check_dense("lanes", lanes, device, (num_rows,), torch.int64)
    check_dense("path_actions", path_actions, device, (num_rows,), torch.uint8)
    check_dense("router.sums", router.sums, device, (None, width), torch.float64)
    check_dense("router.prior", router.prior, device, (num_scores,), torch.float32)
    live.check("live", num_rows, device)
    check_dense("scores", scores, device, (num_rows, num_scores), torch.float32)
    down, up = router.down, router.up
    rank, num_features = (1, width) if down is None else down.weight.shape
    if num_features not in (width, 2 * width):
        raise ValueError(f"router.down has {num_features} inputs, allowed is {width} or {2 * width}")
    for name, projection, shape in (("down", down, (rank, num_features)), ("up", up, (num_scores, rank))):
        if projection is not None:
            check_dense(f"router.{name}.weight", projection.weight, device, shape, torch.float32)
            if projection.bias is None:
                raise ValueError(f"router.{name}.bias is None, allowed is [{shape[0]}]")
            check_dense(f"router.{name}.bias", projection.bias, device, shape[:1], torch.float32)
    launch(
        _score_layers_kernel,
        (num_rows,),
        first_v,
        positions,
        lanes,
        path_actions,
        router.sums,
        router.prior,
        None if down is None else down.weight,
        None if down is None else down.bias,
        None if up is None else up.weight,
        None if up is None else up.bias,
        live.indices,
        live.count,
        scores,
        WIDTH=width,
        FEATURES=num_features,
        RANK=rank,
        SCORES=num_scores,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_SCORES=triton.next_power_of_2(num_scores),
        BLOCK_FEATURES=_BLOCK_FEATURES,
        # A thread for each feature: with more, copies of a thread could read a sum after it was stored, and add again.
        num_warps=_BLOCK_FEATURES // 32,
    )
