"""From logits to a token, each request by its own parameters and its own random numbers."""

# V vocabulary

import random
from collections import Counter, deque
from collections.abc import Sequence as Seq
from itertools import islice

from torch import Tensor

from buddy_kernels import Sampling, draw
from buddy_server.engine.messages import SamplingParams


class Sampler:
    """The sampling state of one request. A seed repeats the text whatever the request is batched with, because
    nothing here looks at another row and each token draws exactly one number.

    Where the logits are taken as they are, the step itself draws, by `sampling` and `uniforms`; `used` tells how many
    tokens it made of them. Otherwise `sample` does.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.sampling = Sampling(params.temperature, params.top_k, params.top_p, params.min_p)
        self._counts: Counter[int] = Counter()
        # Random makes no difference between a number and its negative.
        self._random = random.Random(None if params.seed is None else params.seed % 2**64)
        self._drawn: deque[float] = deque()

    @property
    def is_drawn_by_the_step(self) -> bool:
        return self.params.takes_logits_as_they_are and self.params.temperature > 0

    def uniforms(self, count: int) -> list[float]:
        """Numbers from [0, 1) for the next `count` tokens."""
        while len(self._drawn) < count:
            self._drawn.append(self._random.random())
        return list(islice(self._drawn, count))

    def used(self, count: int) -> None:
        """So many of the next tokens have been made."""
        for _ in range(count):
            self._drawn.popleft()

    def sample(self, logits: Tensor) -> int:
        """One token from logits [V] fp32 on the CPU."""
        token = draw(self._adjusted(logits), self.sampling, *self.uniforms(1))
        self.used(1)
        self._counts[token] += 1
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Penalties on tokens generated so far and the request's bias (OpenAI's formulas)."""
        p = self.params
        if p.takes_logits_as_they_are:
            return logits
        logits = logits.clone()
        for token, count in self._counts.items():
            logits[token] -= p.presence_penalty + p.frequency_penalty * count
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        return logits


def top_logprobs(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The token's log probability under the model, and the `count` likeliest tokens with theirs: logits [V]."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(count)
    likeliest: Seq[tuple[int, float]] = list(zip(tokens.tolist(), values.tolist(), strict=True))
    return float(logprobs[token]), list(likeliest)
