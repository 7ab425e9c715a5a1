"""What a request asks the server to generate, in the same form for every endpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buddy_server.api.response_format import Form
from buddy_server.engine.messages import SamplingParams
from buddy_server.template_messages import Message
from buddy_server.tools.choice import ToolChoice


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that the model's template turns into one prompt, and the tools that it tells the model of."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """`n` answers to each prompt; prompts are a conversation, texts, or token ids.

    `sampling` is that of a prompt's first answer; its `max_tokens` is the limit that the request states, 0 without one.
    `prompt_field` and `limit_field` are what the request calls prompts and limit, for error messages. `budget` is not
    checked yet (`tenancy.depth.parse_budget`). With `echo` an answer begins with its prompt; with `scores_only` only
    the prompt's log probabilities are wanted. `tool_choice` says which calls the answers may contain, None for none;
    `form` is that of their text.
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
    tool_choice: ToolChoice | None = None
    form: Form | None = None
