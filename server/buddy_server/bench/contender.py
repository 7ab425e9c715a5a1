"""What is timed: something that answers prompts side by side."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

Tokens = tuple[int, ...]


class PeerError(ValueError):
    """A peer that is not installed or cannot run the model; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Timing:
    """`prefill_s` until every prompt has its first token, which are `first_tokens`; `decode_s` from there on for
    `num_decoded` tokens. `layer_rows` counts, over layers and decode steps, by how many rows a layer was run."""

    prefill_s: float
    decode_s: float
    num_decoded: int
    first_tokens: Tokens
    layer_rows: Mapping[int, int] = field(default_factory=dict)


class Contender(Protocol):
    """`engine` and `dtype` name it in the rows."""

    @property
    def engine(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def answer(self, prompts: list[Tokens], new_tokens: int) -> Timing:
        """Greedy answers of `new_tokens` each to all `prompts` at once."""
        ...
