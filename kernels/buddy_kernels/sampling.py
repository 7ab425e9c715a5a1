"""From logits to a token. The reference; the fast path is native/sampling.h, inside the step."""

# V vocabulary

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's token is drawn. `temperature` 0 takes the likeliest, the lowest of equals; `top_k` 0, `top_p` 1 and
    `min_p` 0 cut nothing off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Sampling()


def draw(logits: Tensor, sampling: Sampling, uniform: float) -> int:
    """One token from logits [V] fp32 on the CPU; `uniform` is from [0, 1)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # fp64 so that the running sum, and with it the drawn token, does not hang on rounding. The largest logit becomes 0
    # first: divided by a temperature next to nothing, it would overflow.
    below = logits.double() - logits.max()
    probs = (below / sampling.temperature).softmax(-1)
    if sampling.top_k or sampling.min_p or sampling.top_p < 1:
        # Stable, as topk is not: of equal ones the lower index is kept.
        probs, tokens = torch.sort(probs, descending=True, stable=True)
        probs = _filtered(probs[: sampling.top_k or None], sampling.min_p, sampling.top_p)
    else:
        # Nothing to cut off, nothing to sort: a large vocabulary takes milliseconds.
        tokens = torch.arange(len(probs))
    cumulative = probs.cumsum(0)
    # Clamped: rounding may leave the drawn number a hair past the last kept token's share.
    index = min(int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)), int(probs.nonzero()[-1]))
    return int(tokens[index])


def _filtered(probs: Tensor, min_p: float, top_p: float) -> Tensor:
    """Probabilities in falling order, those beyond `min_p` and `top_p` set to 0; the first always stays."""
    keep = probs >= min_p * probs[0]
    if top_p < 1:
        # A share of what top_k and min_p have left, as vLLM takes it.
        left = torch.where(keep, probs, 0.0)
        keep &= left.cumsum(0) - left < top_p * left.sum()
    keep[0] = True
    return torch.where(keep, probs, 0.0)
