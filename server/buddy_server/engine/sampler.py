"""From logits to a token, each request by its own parameters and its own random numbers."""

# V vocabulary

from collections import Counter
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from buddy_server.engine.messages import SamplingParams


class Sampler:
    """The sampling state of one request. A seed repeats the text whatever the request is batched with, because
    nothing here looks at another row and each token draws exactly one number."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**63)

    def sample(self, logits: Tensor) -> int:
        """One token from logits [V] fp32 on the CPU."""
        token = self._draw(self._adjusted(logits))
        self._counts[token] += 1
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Penalties on tokens generated so far and the request's bias (OpenAI's formulas)."""
        p = self.params
        if not (p.presence_penalty or p.frequency_penalty or p.logit_bias):
            return logits
        logits = logits.clone()
        for token, count in self._counts.items():
            logits[token] -= p.presence_penalty + p.frequency_penalty * count
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        return logits

    def _draw(self, logits: Tensor) -> int:
        p = self.params
        if p.temperature == 0:
            return int(logits.argmax())
        # fp64 so that the running sum, and with it the drawn token, does not hang on rounding. The largest logit
        # becomes 0 first: divided by a temperature next to nothing, it would overflow.
        below = logits.double() - logits.max()
        probs = (below / p.temperature).softmax(-1)
        if p.top_k or p.min_p or p.top_p < 1:
            # Stable, as topk is not: of equal ones the lower index is kept.
            probs, tokens = torch.sort(probs, descending=True, stable=True)
            probs = _filtered(probs[: p.top_k or None], p.min_p, p.top_p)
        else:
            # Nothing to cut off, nothing to sort: a large vocabulary takes milliseconds.
            tokens = torch.arange(len(probs))
        cumulative = probs.cumsum(0)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        # Clamped: rounding may leave the drawn number a hair past the last kept token's share.
        index = min(int(torch.searchsorted(cumulative, drawn, right=True)), int(probs.nonzero()[-1]))
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


def top_logprobs(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The token's log probability under the model, and the `count` likeliest tokens with theirs: logits [V]."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(count)
    likeliest: Seq[tuple[int, float]] = list(zip(tokens.tolist(), values.tolist(), strict=True))
    return float(logprobs[token]), list(likeliest)
