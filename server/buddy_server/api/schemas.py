"""What the requests for completions may hold.

Fields not named here are ignored: the unknown ones, and the known ones that cannot change the answer.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from buddy_server.errors import UnsupportedField, shown

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_PROMPTS = 128


def _joined_text(value: object) -> object:
    """A list of text parts becomes one text, a part per line, as vLLM and llama.cpp do."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise ValueError("content is a string or a list of text parts; other kinds of parts are not supported")
        texts.append(part[kind])
    return "\n".join(texts)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Text = Annotated[str | None, BeforeValidator(_joined_text)]
Stops = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]],
    Field(max_length=MAX_STOPS),
]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class FunctionCall(_Schema):
    name: str
    arguments: str


class ToolCall(_Schema):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Schema):
    """One message; roles may come in any order. `content` is one text after validation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content may be null only in an assistant message with tool_calls")
        return self


class StreamOptions(_Schema):
    include_usage: bool | None = None


class BuddyOptions(_Schema):
    # Our own field: nobody sends us another server's options here, so what is unknown is a mistake.
    model_config = ConfigDict(extra="forbid")

    trace: bool | None = None


_HARMLESS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "modalities": (lambda value: value == ["text"], '["text"]; other output is not supported'),
    "audio": (lambda _: False, "null; audio output is not supported"),
    "tools": (lambda value: value == [], "null; tools are not implemented yet"),
    "tool_choice": (lambda value: value == "none", '"none"; tools are not implemented yet'),
    "functions": (lambda value: value == [], "null; functions are not implemented"),
    "function_call": (lambda value: value == "none", '"none"; functions are not implemented'),
    "response_format": (
        lambda value: isinstance(value, dict) and value.get("type") == "text",
        '{"type": "text"}; structured output is not implemented yet',
    ),
    "web_search_options": (lambda _: False, "null; web search is not supported"),
}
"""Known fields this server cannot honour: which values change nothing, and what to tell who sends another."""


class GenerationFields(_Schema):
    """What requests for chat completions and for plain ones share. An explicit null is the same as leaving a field out.

    `budget` is checked later, against the model (`tenancy.depth.parse_budget`).
    """

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[Stops | None, BeforeValidator(_listed)] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=64)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    budget: Any = None
    buddy: BuddyOptions | None = None

    @property
    def wants_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_trace(self) -> bool:
        return bool(self.buddy and self.buddy.trace)

    @property
    def scores_only(self) -> bool:
        """Whether the prompt's log probabilities are all that is asked for."""
        return self.max_tokens == 0


class ChatRequest(GenerationFields):
    """The body of POST /v1/chat/completions.

    Validation raises UnsupportedField for fields whose silent loss would give a wrong answer.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, raw: object) -> object:
        for field, (is_harmless, allowed) in _HARMLESS.items():
            value = raw.get(field) if isinstance(raw, dict) else None
            if value is not None and not is_harmless(value):
                raise UnsupportedField(f"{field}: {shown(value)} is not supported: allowed is {allowed}", param=field)
        return raw

    @model_validator(mode="after")
    def _logprobs_asked_for(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The limit the client set, by the newer name if it gave both."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each token; None tells no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for plain completions."""


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions. A prompt is a text or token ids; several give several choices.

    With `echo` the prompt stands before its completion, with log probabilities if those are asked for; `max_tokens` 0
    then scores the prompt alone.
    """

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError(f"best_of {self.best_of} is not supported: allowed is the value of n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo to be true: nothing would be answered")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    @property
    def wanted_tokens(self) -> int:
        # The engine always makes a token; one that nobody wants is dropped again.
        return max(1, DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens)

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs
