"""What the endpoints answer, for the OpenAPI document. Completions themselves are built without these classes."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from buddy_server.tenancy.depth import DecidedBy
from buddy_server.tenancy.policy import Auto

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorDetails(Answer):
    message: str
    type: str
    param: str | None
    """The field of the request that is to blame."""
    code: str | None


class ErrorView(Answer):
    """What every endpoint answers when it refuses or fails."""

    error: ErrorDetails


class PromptTokensDetails(Answer):
    cached_tokens: int
    """Tokens that were reused from the KV cache."""


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class BuddyView(Answer):
    """How deep the request ran, over all of its choices."""

    budget_requested: float | Auto | None
    budget_granted: float
    """After clamping to the limits of the tenant's tier, and the lowest of any token if budgets were lowered under
    load."""
    decided_by: DecidedBy
    layers: int
    """Of the model."""
    layers_per_token: float
    """The mean over the generated tokens."""
    layer_tokens: float
    """The charge: the sum, over all tokens run for the request, of the share of layers each one ran."""
    distinct_paths: int
    paths: list[list[int]] | list[list[list[int]]] = Field(default_factory=list)
    """With `"trace": true`: the indices of the layers that each generated token ran; with several choices, a list of
    those for each. An exit is a layer behind the model's: the first one is number `layers`."""


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobView(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprobView] | None
    refusal: list[TokenLogprobView] | None


class CalledFunction(Answer):
    name: str
    arguments: str
    """JSON."""


class ToolCallView(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCallView] = Field(default_factory=list)


class ChatChoice(Answer):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class _Envelope(Answer):
    id: str
    created: int
    """In seconds since the beginning of 1970."""
    model: str
    system_fingerprint: str
    """Changes with everything on the server that could change the answer to a seeded request."""


class ChatCompletion(_Envelope):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    buddy: BuddyView


class CalledFunctionDelta(Answer):
    name: str = ""
    arguments: str = ""


class ToolCallDelta(Answer):
    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunctionDelta


class MessageDelta(Answer):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[ToolCallDelta] = Field(default_factory=list)


class ChatChunkChoice(Answer):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class _StreamEnd(Answer):
    usage: Annotated[Usage | None, Field(description="In the last chunk, if the request asked for it")] = None
    buddy: Annotated[BuddyView | None, Field(description="In the last chunk alone")] = None


class ChatCompletionChunk(_Envelope, _StreamEnd):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(_Envelope):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    buddy: BuddyView


class CompletionChunkChoice(CompletionChoice):
    finish_reason: FinishReason | None  # type: ignore[assignment]


class CompletionChunk(_Envelope, _StreamEnd):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class Tokens(Answer):
    count: int
    max_model_len: int
    """Tokens that a request may have, prompt and answer together."""
    tokens: list[int]
    token_strs: list[str | None] | None
    """The vocabulary's names of the tokens, with `"return_token_strs": true`."""


class Detokenized(Answer):
    prompt: str


class ModelView(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    """vLLM's: tokens that prompt and answer may have together."""


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelView]


class Status(Answer):
    status: str


class Version(Answer):
    version: str
