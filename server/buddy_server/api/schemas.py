"""The schemas of completion requests, and how they become jobs.

Fields not named here are ignored: unknown ones, and known ones that cannot change the answer.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.config import JsonDict

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
from buddy_server.api.job import Conversation, Job
from buddy_server.api.json_bound import JsonBound
from buddy_server.api.response_format import StructuredFields, form_of
from buddy_server.api.schema import Schema
from buddy_server.api.tool_fields import ToolFields
from buddy_server.api.unsupported_fields import UNSUPPORTED_FIELDS, Unsupported, refuse_unsupported
from buddy_server.engine.messages import SamplingParams

MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_MESSAGES = 2048
MAX_TOOL_CALLS = 128


class FunctionCall(Schema):
    name: str
    arguments: str


class ToolCall(Schema):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


_SAYS_SOMETHING: JsonDict = {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}}
_CALLS_SOMETHING: JsonDict = {
    "required": ["tool_calls"],
    "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}},
}


class ChatMessage(Schema):
    """One message; roles may come in any order. Only an assistant's message with tool calls may have no content. After
    validation, `content` is a single text."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_SAYS_SOMETHING, _CALLS_SOMETHING]})

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


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class StreamOptions(Schema):
    include_usage: bool | None = None
    """Whether a last chunk, without choices, has the usage."""


class BuddyOptions(Schema):
    # Nothing else is allowed, see below; the OpenAPI document says so by this.
    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})

    trace: bool | None = None
    """Whether the response lists the layers that every generated token ran."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, raw: object) -> object:
        # This field is ours alone, so clients of other servers never send it: an unknown option is a mistake.
        for option in raw if isinstance(raw, dict) else ():
            if option != "trace":
                raise refused("buddy", option, 'the option "trace" alone')
        return raw


class RequestFields(Schema):
    """The body of a request. Validation raises UnsupportedField for fields that would give a wrong answer if they were
    silently ignored: the `unsupported` ones that are no fields of the class."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = UNSUPPORTED_FIELDS

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, raw: object) -> object:
        if isinstance(raw, dict):
            refuse_unsupported(raw, cls.unsupported, cls.model_fields)
        return raw


class GenerationFields(RequestFields):
    """The fields shared by all endpoints that generate. An explicit null is the same as leaving a field out.

    `budget` is checked later, against the model (`tenancy.depth.parse_budget`).
    """

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Sample from this many of the likeliest tokens; 0 and -1 are no limit."""
    min_p: Share | None = None
    """Sample from tokens that are at least this likely, relative to the likeliest one."""
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """The same request with the same seed gives the same text; with several choices, they have consecutive seeds."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop_token_ids: StopTokenIds | None = None
    """Tokens that end the answer, besides the model's own end tokens."""
    ignore_eos: bool | None = None
    """Whether the model's own end tokens do not end the answer."""
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    budget: Any = None
    """The largest share of the model's layers that any token may run, or "auto" for a choice by the Budget Predictor.
    The tenant's tier may clamp it."""
    buddy: BuddyOptions | None = None
    """What else the `buddy` object of the response tells."""

    @property
    def trace(self) -> bool:
        return bool(self.buddy and self.buddy.trace)

    @abstractmethod
    def job(self) -> Job:
        """What this body asks for."""

    def sampling(
        self, max_tokens: int | None, top_logprobs: int | None = None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The sampling that these fields and the given values ask for, as in Job."""
        return SamplingParams(
            max_tokens=max_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class _CompletionFields(GenerationFields, StructuredFields):
    """The fields shared by chat and plain completions."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """Counts in place of max_tokens if both are given."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None

    @property
    def usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_CompletionFields, ToolFields):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Needs `"logprobs": true`."""

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
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", self.top_logprobs, "it together with logprobs: true")
        return self

    def job(self) -> Job:
        newer = self.max_completion_tokens is not None or self.max_tokens is None
        return Job(
            id_prefix="chatcmpl-",
            model=self.model,
            prompts=Conversation(
                [message.model_dump(exclude_none=True) for message in self.messages],
                self.tools_for_template(),
            ),
            prompt_field="messages",
            limit_field="max_completion_tokens" if newer else "max_tokens",
            sampling=self.sampling(
                self.max_completion_tokens if newer else self.max_tokens,
                top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            n=self.n or 1,
            budget=self.budget,
            stream=bool(self.stream),
            usage_chunk=self.usage_chunk,
            trace=self.trace,
            tool_choice=self.chosen_tools(),
            form=form_of(self),
        )


DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for plain completions."""


class CompletionRequest(_CompletionFields):
    """The body of POST /v1/completions. A prompt is a text or token ids; several prompts give several choices.

    With `echo` the prompt precedes its completion, with log probabilities if requested; `max_tokens` 0 then only scores
    the prompt.
    """

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """By default 16. 0 needs `"echo": true`."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    """The value of n alone."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **UNSUPPORTED_FIELDS,
        "add_special_tokens": ((True,), "the tokenizer puts its special tokens around a text; give token ids instead"),
    }

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise refused("best_of", self.best_of, f"the value of n, {self.n or 1}")
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", 0, "at least 1, or echo: true; nothing would be answered")
        return self

    def job(self) -> Job:
        newer = self.max_completion_tokens is not None
        limit = self.max_completion_tokens if newer else self.max_tokens
        max_tokens = DEFAULT_COMPLETION_TOKENS if limit is None else limit
        return Job(
            id_prefix="cmpl-",
            model=self.model,
            prompts=self.prompt,
            prompt_field="prompt",
            limit_field="max_completion_tokens" if newer else "max_tokens",
            sampling=self.sampling(
                # The engine always makes a token; an unwanted one is dropped later.
                max(1, max_tokens),
                top_logprobs=self.logprobs,
                prompt_logprobs=self.logprobs if self.echo else None,
            ),
            n=self.n or 1,
            budget=self.budget,
            stream=bool(self.stream),
            usage_chunk=self.usage_chunk,
            trace=self.trace,
            form=form_of(self),
            echo=bool(self.echo),
            scores_only=max_tokens == 0,
        )
