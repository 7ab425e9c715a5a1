"""What the scheduler passes to the runner, and what the runner returns."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from buddy_server.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

    from buddy_kernels import SampledToken


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens `start` to `start + length - 1` of a sequence: a segment of one step, each at up to `max_cost`
    milli-layers.

    A route block may run in pieces. The first piece reads `ahead` tokens further, to the end of the route block, to
    choose the path. The other pieces, with `continues`, take the same path.
    """

    sequence: Sequence
    start: int
    length: int
    max_cost: int
    ahead: int = 0
    continues: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def tokens_left(self) -> int:
        """Of a decode: tokens that its sequence may still make, this one's included."""
        return self.sequence.num_prompt + self.sequence.request.sampling.max_tokens - self.end

    @property
    def scored(self) -> range:
        """Positions whose next token is a prompt token that still needs a log probability."""
        if self.sequence.request.sampling.prompt_logprobs is None:
            return range(0)
        first = max(self.start, len(self.sequence.scored_prompt))
        return range(first, min(self.end, self.sequence.num_prompt - 1))

    @property
    def begins_depth(self) -> bool:
        """Whether the first token may cost another amount than the token before it."""
        return self.start > 0 and self.max_cost != self.sequence.max_cost(self.start - 1)

    def after(self, num_tokens: int) -> "Work":
        """The decode of the token that comes `num_tokens` later."""
        start = self.start + num_tokens
        return replace(self, start=start, max_cost=self.sequence.max_cost(start))

    @property
    def makes_token(self) -> bool:
        return self.end == len(self.sequence.tokens)

    @property
    def is_decode(self) -> bool:
        """Whether the work is the newest token of an answer; false for a prompt and for recomputed answer tokens."""
        return self.makes_token and self.start >= self.sequence.num_prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """The works of one call to the model: one step, or up to `most_steps` decode steps of multi-step within about
    `most_s` seconds, with blocks reserved for all of them. `num_prefill` are the tokens that are not decodes."""

    works: list[Work]
    num_prefill: int
    most_steps: int = 1
    most_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens in one step."""
        return sum(work.length for work in self.works)


@dataclass(frozen=True, slots=True)
class WorkResult:
    """What a work produced: the path of each step it took part in, the token each step made if it makes tokens, the
    requested log probabilities of prompt tokens, and the running features' `sums` [F] fp64 after it."""

    paths: "list[bytes]"
    tokens: "list[SampledToken]"
    scored: "list[SampledToken]"
    sums: "Tensor"


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One entry per work. `num_layers_read` sums, over the steps, the layers that any token ran. `router_s` is the time
    spent on choosing paths, `seconds` that of the whole call."""

    works: list[WorkResult]
    num_steps: int
    num_layers_read: int
    router_s: float
    seconds: float
