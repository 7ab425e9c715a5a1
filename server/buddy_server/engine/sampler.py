"""The sampling state of one request. The step draws the tokens (buddy_kernels.sampling)."""

import random
from collections import Counter, deque
from itertools import islice

from buddy_server.engine.messages import SamplingParams


class Sampler:
    """A seed reproduces the text in any batch: each token takes exactly one random number.

    `counts` is how often the answer contains each token, for the penalties.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.counts: Counter[int] = Counter()
        # `Random` treats a number and its negative alike.
        self._random = random.Random(None if params.seed is None else params.seed % 2**64)
        self._uniforms: deque[float] = deque()

    def uniforms(self, count: int) -> list[float]:
        """Numbers in [0, 1) for the next `count` tokens; none for greedy decoding."""
        if self.params.temperature == 0:
            return []
        while len(self._uniforms) < count:
            self._uniforms.append(self._random.random())
        return list(islice(self._uniforms, count))

    def accept(self, token_id: int) -> None:
        """Record the next token of the answer."""
        self.counts[token_id] += 1
        if self._uniforms:
            self._uniforms.popleft()
