"""What the scheduler hands to the runner, and what comes back."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from buddy_server.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

    from buddy_kernels import SampledToken


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens `start` to `start + length - 1` of a sequence, one segment of one step, each at `max_cost` milli-layers.

    A route block may run in pieces: the first looks `ahead` to the rest of it, from which its path follows, and the
    others, `continues`, take that path too.
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
    def scored(self) -> range:
        """Positions here whose successor is a prompt token with a log probability to be told, the first time only."""
        if self.sequence.request.sampling.prompt_logprobs is None:
            return range(0)
        first = max(self.start, len(self.sequence.scored_prompt))
        return range(first, min(self.end, self.sequence.num_prompt - 1))

    @property
    def makes_token(self) -> bool:
        return self.end == len(self.sequence.tokens)

    @property
    def is_decode(self) -> bool:
        """Whether it is the newest token of an answer; not so of a prompt, nor of an answer that is computed again."""
        return self.makes_token and self.start >= self.sequence.num_prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """The works of one call to the model: one step, or up to `most_steps` of answers that go on by themselves for about
    `most_s` seconds, with blocks for all of them."""

    works: list[Work]
    most_steps: int = 1
    most_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Of one step."""
        return sum(work.length for work in self.works)


@dataclass(frozen=True, slots=True)
class WorkResult:
    """What became of a work: the path of each step it took part in, the token that each made if it makes tokens, the
    log probabilities of prompt tokens that were asked for, and the running features' `sums` [F] fp64 after it."""

    paths: "list[bytes]"
    tokens: "list[SampledToken]"
    scored: "list[SampledToken]"
    sums: "Tensor"


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One entry a work. `num_layers_read` adds up, over the steps, the layers that any token ran; `router_s` are the
    seconds of choosing paths, `seconds` those of the whole call."""

    works: list[WorkResult]
    num_steps: int
    num_layers_read: int
    router_s: float
    seconds: float
