"""What a request asks the server to generate, in the same form for every endpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from buddy_server.engine.messages import SamplingParams
from buddy_server.tokenizer import Message
from buddy_server.tools.pieces import ToolParser


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that the model's template turns into one prompt."""

    messages: Sequence[Message]


@dataclass(frozen=True, slots=True)
class Job:
    """`n` answers to each prompt; prompts are a conversation, texts, or token ids.

    `sampling` is that of a prompt's first answer; its `max_tokens` is the limit that the request states, 0 without one.
    `prompt_field` and `limit_field` are what the request calls prompts and limit, for error messages. `budget` is not
    checked yet (`tenancy.depth.parse_budget`). With `echo` an answer begins with its prompt; with `scores_only` only
    the prompt's log probabilities are wanted. `new_parser` makes the parser of one answer if the request has tools.
    """

    id_prefix: str
    model: str
    prompts: Conversation | Sequence[str] | Sequence[Sequence[int]]
    prompt_field: str
    limit_field: str
    sampling: SamplingParams
    n: int = 1
    budget: Any = None
    stream: bool = False
    usage_chunk: bool = False
    trace: bool = False
    echo: bool = False
    scores_only: bool = False
    new_parser: Callable[[], ToolParser] | None = None
