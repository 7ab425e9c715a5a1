"""The schemas of completion requests.

Fields not named here are ignored: unknown ones, and known ones that cannot change the answer.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from buddy_server.api.field_types import (
    Count,
    LogitBias,
    Penalty,
    Prompts,
    Share,
    Stops,
    StopTokenIds,
    Text,
    refused,
)
from buddy_server.api.json_bound import JsonBound
from buddy_server.api.response_format import StructuredFields
from buddy_server.errors import UnsupportedField, shown

MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_MESSAGES = 2048
MAX_TOOL_CALLS = 128


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
    """One message; roles may come in any order. After validation, `content` is a single text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content may be null only in an assistant message with tool_calls")
        return self


class StreamOptions(_Schema):
    include_usage: bool | None = None


class BuddyOptions(_Schema):
    trace: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, raw: object) -> object:
        # This field is ours alone, so clients of other servers never send it: an unknown option is a mistake.
        for option in raw if isinstance(raw, dict) else ():
            if option != "trace":
                raise refused("buddy", option, 'the option "trace" alone')
        return raw


_HARMLESS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "modalities": (lambda value: value == ["text"], '["text"]; other output is not supported'),
    "audio": (lambda _: False, "null; audio output is not supported"),
    "tools": (lambda value: value == [], "null; tools are not implemented yet"),
    "tool_choice": (lambda value: value == "none", '"none"; tools are not implemented yet'),
    "functions": (lambda value: value == [], "null; functions are not implemented"),
    "function_call": (lambda value: value == "none", '"none"; functions are not implemented'),
    "web_search_options": (lambda _: False, "null; web search is not supported"),
}
"""Known fields that this server cannot honour: which values change nothing, and the error text for all others."""


class GenerationFields(StructuredFields):
    """The fields shared by chat and plain completions. An explicit null is the same as leaving a field out.

    `budget` is checked later, against the model (`tenancy.depth.parse_budget`).
    """

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop_token_ids: StopTokenIds | None = None
    logit_bias: LogitBias | None = None
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
    def limit_field(self) -> str:
        """The field that limits the answer's length."""
        return "max_tokens"

    @property
    def scores_only(self) -> bool:
        """Whether only the prompt's log probabilities are requested."""
        return self.max_tokens == 0


class ChatRequest(GenerationFields):
    """The body of POST /v1/chat/completions.

    Validation raises UnsupportedField for fields that would give a wrong answer if they were silently ignored.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
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
    def _bounded_arguments(self) -> Self:
        # Templates print arguments as JSON, so they are parsed as well.
        bound = JsonBound()
        for place, message in enumerate(self.messages):
            for index, call in enumerate(message.tool_calls or ()):
                field = f"messages[{place}].tool_calls[{index}].function.arguments"
                bound.add(call.function.arguments.encode(), field)
        return self

    @model_validator(mode="after")
    def _logprobs_asked_for(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", self.top_logprobs, "it together with logprobs: true")
        return self

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None and self.max_tokens else "max_completion_tokens"

    @property
    def wanted_tokens(self) -> int | None:
        """The client's limit; the newer field wins if both are set."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to return with each token; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for plain completions."""


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions. A prompt is a text or token ids; several prompts give several choices.

    With `echo` the prompt precedes its completion, with log probabilities if requested; `max_tokens` 0 then only scores
    the prompt.
    """

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise refused("best_of", self.best_of, f"the value of n, {self.n or 1}")
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", 0, "at least 1, or echo: true; nothing would be answered")
        return self

    @property
    def wanted_tokens(self) -> int:
        # The engine always makes a token; an unwanted one is dropped later.
        return max(1, DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens)

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs
