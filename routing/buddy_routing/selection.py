"""Turns scores into paths: the best layers that a budget pays for, and a straight-through version for training."""

# ... leading dims (segments, or sequences x tokens), L layers, C of them free

import torch
from torch import Tensor

from buddy_routing.action_space import RUN, SKIP, ActionSpace


def select_path(scores: Tensor, max_cost: Tensor, space: ActionSpace) -> Tensor:
    """Paths [..., L] int8 that run the forced layers and, in order of falling score, each free layer that still fits.

    scores: [..., C] of the free layers; max_cost: [...] milli-layers. Ties go to the lower index.
    """
    paths = torch.full((*scores.shape[:-1], space.num_layers), RUN, dtype=torch.int8, device=scores.device)
    free = torch.tensor(space.free, dtype=torch.int64, device=scores.device)
    extra = torch.tensor(
        [space.costs[layer][RUN] - space.costs[layer][SKIP] for layer in space.free], device=scores.device
    )
    left = (max_cost - space.smallest_cost).expand(scores.shape[:-1])
    chosen = torch.zeros_like(scores, dtype=torch.int8)
    for index in torch.sort(scores, dim=-1, descending=True, stable=True).indices.unbind(-1):
        runs = extra[index] <= left
        chosen.scatter_(-1, index[..., None], runs[..., None].to(torch.int8))
        left = left - extra[index] * runs
    return paths.index_copy_(-1, free, chosen)


def straight_through(scores: Tensor, paths: Tensor, space: ActionSpace) -> Tensor:
    """The share of each layer's output to add: floats [..., L], equal in value to the paths, with a gradient that flows
    to the scores [..., C].

    The paper passes the gradient through the softmax of the fused scores. Multiplied by the number of layers chosen,
    the softmax is a soft count with the same sum as the choice.
    """
    free = torch.tensor(space.free, dtype=torch.int64, device=scores.device)
    hard = paths.index_select(-1, free).float()
    soft = scores.softmax(-1) * hard.sum(-1, keepdim=True)
    shares = torch.ones(paths.shape, device=scores.device)
    return shares.index_copy(-1, free, hard + soft - soft.detach())
