"""What sampling remembers of one request. The step draws the tokens (buddy_kernels.sampling)."""

import random
from collections import Counter, deque
from itertools import islice

from buddy_server.engine.messages import SamplingParams


class Sampler:
    """A seed repeats the text whatever the request is batched with: each token takes exactly one random number.

    `counts` says how often the answer has each token, for the penalties.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.counts: Counter[int] = Counter()
        # Random makes no difference between a number and its negative.
        self._random = random.Random(None if params.seed is None else params.seed % 2**64)
        self._uniforms: deque[float] = deque()

    def uniforms(self, count: int) -> list[float]:
        """Numbers from [0, 1) for the next `count` tokens; none where the likeliest is taken."""
        if self.params.temperature == 0:
            return []
        while len(self._uniforms) < count:
            self._uniforms.append(self._random.random())
        return list(islice(self._uniforms, count))

    def accept(self, token_id: int) -> None:
        """The next token of the answer has been made."""
        self.counts[token_id] += 1
        if self._uniforms:
            self._uniforms.popleft()
