"""The interface of what is timed: an engine that answers a batch of prompts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

Tokens = tuple[int, ...]


class PeerError(ValueError):
    """A peer that is not installed or cannot run the model; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Timing:
    """`prefill_s` is the time until every prompt has its first token, listed in `first_tokens`; `decode_s` the time
    after that, for `num_decoded` tokens. `layer_rows` maps a number of rows to how often, over layers and decode steps,
    that many rows ran a layer."""

    prefill_s: float
    decode_s: float
    num_decoded: int
    first_tokens: Tokens
    layer_rows: Mapping[int, int] = field(default_factory=dict)


class Contender(Protocol):
    """`engine` and `dtype` identify it in the rows."""

    @property
    def engine(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def answer(self, prompts: list[Tokens], new_tokens: int) -> Timing:
        """Greedy answers of `new_tokens` tokens each to all `prompts` at once."""
        ...
