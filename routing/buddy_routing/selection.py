"""Turns scores into paths: the best actions that a budget pays for, and a straight-through version for training."""

# ... leading dims (segments, or sequences x tokens), N of them flattened, L layers, C of them free, A actions besides
# skipping

import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_routing.action_space import RUN, SKIP, SMALL, ActionSpace

CHUNK_ROWS = 512
"""Rows whose tables of the knapsack are in memory together."""
NUM_HALVINGS = 40


def select_path(scores: Tensor, max_cost: Tensor, space: ActionSpace) -> Tensor:
    """Paths [..., L] int8 that run the forced layers and the best of the others that can be paid for.

    scores: [..., C x A], those of a free layer's actions side by side; max_cost: [...] milli-layers. Layers that run or
    not are taken in order of falling score, each that still fits; ties go to the lower index. With small FFNs, it is
    the path with the highest sum of scores, in which skipping counts 0; what pays for all layers runs all.
    """
    paths = torch.full((*scores.shape[:-1], space.num_layers), RUN, dtype=torch.int8, device=scores.device)
    free = torch.tensor(space.free, dtype=torch.int64, device=scores.device)
    left = (max_cost - space.smallest_cost).expand(scores.shape[:-1])
    if space.num_actions == 2:
        chosen = _best_layers(scores, left, space)
    else:
        rows = zip(
            scores.reshape(-1, scores.shape[-1]).split(CHUNK_ROWS), left.flatten().split(CHUNK_ROWS), strict=True
        )
        chosen = torch.cat([_best_mix(*some, space) for some in rows]).view(*scores.shape[:-1], -1)
    return paths.index_copy_(-1, free, chosen)


def _best_layers(scores: Tensor, left: Tensor, space: ActionSpace) -> Tensor:
    """[..., C] int8: the actions of the free layers, of which all cost at most `left` [...]."""
    extra = torch.tensor(
        [space.costs[layer][RUN] - space.costs[layer][SKIP] for layer in space.free], device=scores.device
    )
    chosen = torch.zeros_like(scores, dtype=torch.int8)
    for index in torch.sort(scores, dim=-1, descending=True, stable=True).indices.unbind(-1):
        runs = extra[index] <= left
        chosen.scatter_(-1, index[..., None], runs[..., None].to(torch.int8))
        left = left - extra[index] * runs
    return chosen


def _best_mix(scores: Tensor, left: Tensor, space: ActionSpace) -> Tensor:
    """[N, C] int8: the same for layers that may also run with a small FFN, from scores [N, C x 2] and left [N].

    An exact knapsack. All layers cost the same, so what a path costs follows from how many run and how many of them
    have the small FFN: best[n, r, s] is the highest sum of scores of the layers so far with r and s of them.
    """
    _, run_cost, small_cost = space.costs[space.free[0]]
    count = torch.arange(len(space.free) + 1, device=scores.device)
    run, small = scores.unflatten(-1, (-1, 2)).unbind(-1)  # [N, C]
    best = torch.full((len(scores), len(count), len(count)), -torch.inf, device=scores.device)
    best[:, 0, 0] = 0.0
    tables = [best]
    for layer in range(len(space.free)):
        with_run = F.pad(best[:, :-1], (0, 0, 1, 0), value=-torch.inf) + run[:, layer, None, None]
        with_small = F.pad(best[..., :-1], (1, 0), value=-torch.inf) + small[:, layer, None, None]
        best = torch.maximum(best, torch.maximum(with_run, with_small))
        tables.append(best)
    costs = count[:, None] * run_cost + count * small_cost
    paid = best.masked_fill(costs > left[:, None, None], -torch.inf).flatten(1).argmax(1)
    row = torch.arange(len(scores), device=scores.device)
    runs, smalls = paid // len(count), paid % len(count)
    chosen = torch.zeros_like(run, dtype=torch.int8)
    for layer in reversed(range(len(space.free))):
        before, value = tables[layer], tables[layer + 1][row, runs, smalls]
        with_run = before[row, (runs - 1).clamp_min(0), smalls] + run[:, layer]
        skipped = before[row, runs, smalls] == value
        ran = ~skipped & (runs > 0) & (with_run == value)
        chosen[:, layer] = torch.where(skipped, SKIP, torch.where(ran, RUN, SMALL))
        runs, smalls = runs - ran.long(), smalls - (~skipped & ~ran).long()
    return chosen.masked_fill(left[:, None] >= run_cost * len(space.free), RUN)


def action_shares(paths: Tensor) -> Tensor:
    """Shares [..., L, 2] of the outputs of running and of running with the small FFN: 1 for the path's action."""
    return torch.stack((paths == RUN, paths == SMALL), -1).float()


def straight_through(scores: Tensor, paths: Tensor, space: ActionSpace) -> Tensor:
    """The share of each action's output to add: floats [..., L, A], equal in value to the paths, with a gradient that
    flows to the scores [..., C x A].

    The paper passes the gradient through the softmax of the fused scores. Multiplied by the number of layers chosen,
    the softmax is a soft count with the same sum as the choice. With small FFNs, the softmax is over a layer's actions,
    at a price of milli-layers at which the path's cost is the expected one.
    """
    free = torch.tensor(space.free, dtype=torch.int64, device=scores.device)
    shares = action_shares(paths)[..., : space.num_actions - 1]
    hard = shares.index_select(-2, free)
    if space.num_actions == 2:
        soft = (scores.softmax(-1) * hard.sum((-1, -2))[..., None])[..., None]
    else:
        soft = _soft_mix(scores.unflatten(-1, (-1, 2)), hard, space)
    return shares.index_copy(-2, free, hard + soft - soft.detach())


def _soft_mix(scores: Tensor, hard: Tensor, space: ActionSpace) -> Tensor:
    """[..., C, 2]: the probabilities of running and of running with the small FFN, from scores [..., C, 2]."""
    costs = torch.tensor(space.costs[space.free[0]], device=scores.device) / space.costs[space.free[0]][RUN]
    given = F.pad(scores, (1, 0))  # [..., C, 3]
    with torch.no_grad():
        spent = (hard * costs[1:]).sum((-1, -2))  # [...], in layers
        # By bisection: a higher price makes the expected cost fall.
        low, high = (torch.full_like(spent, bound) for bound in (-64.0, 64.0))
        for _ in range(NUM_HALVINGS):
            price = (low + high) / 2
            expected = ((given - price[..., None, None] * costs).softmax(-1) * costs).sum((-1, -2))
            low, high = torch.where(expected > spent, price, low), torch.where(expected > spent, high, price)
    return (given - ((low + high) / 2)[..., None, None] * costs).softmax(-1)[..., 1:]
