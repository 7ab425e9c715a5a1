"""From scores to masks: deterministic top-k, and its straight-through version for training."""

# ... leading dims (segments, or sequences x tokens), L layers

import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_routing.budget import ALWAYS_RUN


def select_layers(scores: Tensor, num_run: Tensor) -> Tensor:
    """Masks [..., L] int8 that run the first, the last and the best-scored layers between, `num_run` in all.

    scores: [..., L - 2]; num_run: [...] integers of 2 .. L. Ties go to the lower index.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    chosen = (rank < (num_run - ALWAYS_RUN)[..., None]).to(torch.int8)  # [..., L - 2]
    return F.pad(chosen, (1, 1), value=1)


def straight_through(scores: Tensor, masks: Tensor) -> Tensor:
    """The masks [..., L] as floats, exact in value, whose gradient flows to the scores [..., L - 2].

    The paper passes the gradient through the softmax of the fused scores; times the number of layers chosen it is a
    soft count of the same size as the mask.
    """
    hard = masks[..., 1:-1].float()
    soft = scores.softmax(-1) * hard.sum(-1, keepdim=True)
    return F.pad(hard + soft - soft.detach(), (1, 1), value=1.0)
