"""What /v1/responses answers, for the OpenAPI document."""

from typing import Any, Literal

from pydantic import Field

from buddy_server.api.answer_schemas import Answer, BuddyView, TokenLogprobView

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprobView]


class OutputMessage(Answer):
    type: Literal["message"]
    id: str
    status: ResponseStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Answer):
    type: Literal["function_call"]
    id: str
    status: ResponseStatus
    call_id: str
    name: str
    arguments: str
    """JSON."""


class InputTokensDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(Answer):
    code: str
    message: str


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ResponseView(Answer):
    id: str
    object: Literal["response"]
    created_at: int
    """In seconds since the beginning of 1970."""
    status: ResponseStatus
    background: bool
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    buddy: BuddyView | None = None
    """When the answer is complete."""


class ResponseEvent(Answer):
    """One event of a stream. Its `type` says what it tells and which of the other fields it has."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ]
    sequence_number: int
    response: ResponseView | None = None
    item: OutputMessage | OutputCall | None = None
    part: OutputText | None = None
    item_id: str = ""
    output_index: int = 0
    content_index: int = 0
    delta: str = ""
    text: str = ""
    logprobs: list[TokenLogprobView] = Field(default_factory=list)
    name: str = ""
    arguments: str = ""
    code: str | None = None
    message: str = ""
    param: str | None = None
