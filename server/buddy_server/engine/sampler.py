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
        self._params = params
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**63)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest token is the answer as it stands."""
        p = self._params
        return p.temperature == 0 and not (p.presence_penalty or p.frequency_penalty or p.logit_bias)

    def sample(self, logits: Tensor) -> int:
        """One token from logits [V] fp32 on the CPU."""
        token = self._draw(self._adjusted(logits))
        self._counts[token] += 1
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Penalties on tokens generated so far and the request's bias (OpenAI's formulas)."""
        p = self._params
        if not (p.presence_penalty or p.frequency_penalty or p.logit_bias):
            return logits
        logits = logits.clone()
        for token, count in self._counts.items():
            logits[token] -= p.presence_penalty + p.frequency_penalty * count
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        return logits

    def _draw(self, logits: Tensor) -> int:
        p = self._params
        if p.temperature == 0:
            return int(logits.argmax())
        # fp64 so that the running sum, and with it the drawn token, does not hang on rounding. The largest logit
        # becomes 0 first: divided by a temperature next to nothing, it would overflow.
        below = logits.double() - logits.max()
        probs, tokens = torch.sort((below / p.temperature).softmax(-1), descending=True, stable=True)
        keep = torch.ones_like(probs, dtype=torch.bool)
        if p.top_k:
            keep[p.top_k :] = False
        if p.min_p:
            keep &= probs >= p.min_p * probs[0]
        if p.top_p < 1:
            # A share of what top_k and min_p have left, as vLLM takes it.
            left = torch.where(keep, probs, 0.0)
            keep &= left.cumsum(0) - left < p.top_p * left.sum()
        keep[0] = True
        cumulative = torch.where(keep, probs, 0.0).cumsum(0)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        # Clamped: rounding may leave the drawn number a hair past the last kept token's share.
        index = min(int(torch.searchsorted(cumulative, drawn, right=True)), int(keep.nonzero()[-1]))
        return int(tokens[index])


def top_logprobs(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The token's log probability under the model, and the `count` likeliest tokens with theirs: logits [V]."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(count)
    likeliest: Seq[tuple[int, float]] = list(zip(tokens.tolist(), values.tolist(), strict=True))
    return float(logprobs[token]), list(likeliest)
