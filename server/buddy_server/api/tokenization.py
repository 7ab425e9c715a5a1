"""POST /tokenize and /detokenize, in vLLM's formats."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Self

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from buddy_server.api.answer_schemas import Detokenized, Tokens
from buddy_server.api.body import read_body
from buddy_server.api.field_types import refused
from buddy_server.api.json_bound import MAX_VALUES
from buddy_server.api.openapi import BODY_ERRORS, errors, keyed
from buddy_server.api.prompts import context_limit
from buddy_server.api.schemas import Messages, RequestFields
from buddy_server.api.services import Services
from buddy_server.api.tool_fields import ToolFields
from buddy_server.api.unsupported_fields import UNSUPPORTED_FIELDS, Unsupported
from buddy_server.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, shown
from buddy_server.tokenizer import ChatTokenizer, PromptTooLong

_OF_TEMPLATES = (
    "documents", "chat_template", "chat_template_kwargs", "continue_final_message", "truncate_prompt_tokens"
)  # fmt: skip


_NULL: JsonDict = {"type": "null"}
_PROMPT_ALONE: JsonDict = {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": _NULL}}
_MESSAGES_ALONE: JsonDict = {
    "required": ["messages"],
    "properties": {"messages": {"type": "array"}, "prompt": _NULL, "add_special_tokens": {"enum": [None, False]}},
}


class TokenizeRequest(RequestFields, ToolFields):
    """A text, or messages as the chat template renders them; one of the two."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_PROMPT_ALONE, _MESSAGES_ALONE]})

    unsupported: ClassVar[Mapping[str, Unsupported]] = {field: UNSUPPORTED_FIELDS[field] for field in _OF_TEMPLATES}

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer puts its special tokens around the prompt, which is the default. A chat template writes
    them itself."""
    add_generation_prompt: bool | None = None
    """Whether messages end where the assistant's answer begins, which is the default."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("prompt: give either prompt or messages", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise refused("add_special_tokens", True, "false with messages; the template writes special tokens")
        return self


class DetokenizeRequest(RequestFields):
    """Token ids of the model."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {}

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_VALUES, fail_fast=True)]


def tokenization_router(services: Services) -> APIRouter:
    """Both endpoints. They need a key as completions do, and cost nothing."""
    router = APIRouter(tags=["tokens"])
    refusals = errors(*BODY_ERRORS, ContextLengthExceeded)
    info, tokenizer = services.engine.info, services.tokenizer
    # Nobody pays for these requests, so they must not take the threads that tokenize the prompts of completions.
    threads = CapacityLimiter(2)

    def check_model(asked: str | None) -> None:
        if asked not in (None, info.model_id):
            raise ModelNotFound(str(asked), info.model_id)

    @router.post("/tokenize", responses=refusals, openapi_extra=keyed(TokenizeRequest))
    async def tokenize(request: Request) -> Tokens:
        """Count and list the tokens of a prompt."""
        services.authenticate(request)
        body = await read_body(request, TokenizeRequest)
        check_model(body.model)
        return await to_thread.run_sync(_answer, tokenizer, body, context_limit(info)[0], limiter=threads)

    @router.post("/detokenize", responses=refusals, openapi_extra=keyed(DetokenizeRequest))
    async def detokenize(request: Request) -> Detokenized:
        """The text of tokens, special ones included."""
        services.authenticate(request)
        body = await read_body(request, DetokenizeRequest)
        check_model(body.model)
        for index, token in enumerate(body.tokens):
            if token >= info.vocab_size:
                raise refused(f"tokens[{index}]", token, f"token ids of the model, 0 to {info.vocab_size - 1}")
        decode = partial(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return Detokenized(prompt=await to_thread.run_sync(decode, limiter=threads))

    return router


def _answer(tokenizer: ChatTokenizer, body: TokenizeRequest, max_model_len: int) -> Tokens:
    tokens = _tokens(tokenizer, body)
    return Tokens(
        count=len(tokens),
        max_model_len=max_model_len,
        tokens=list(tokens),
        token_strs=tokenizer.names(tokens) if body.return_token_strs else None,
    )


def _tokens(tokenizer: ChatTokenizer, body: TokenizeRequest) -> tuple[int, ...]:
    try:
        if body.messages is None:
            assert body.prompt is not None
            add_special_tokens = body.add_special_tokens is not False
            return tokenizer.encode_prompt(body.prompt, MAX_VALUES, add_special_tokens=add_special_tokens)
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        add_generation_prompt = body.add_generation_prompt is not False
        return tokenizer.render(
            messages, MAX_VALUES, body.tools_for_template(), add_generation_prompt=add_generation_prompt
        )
    except PromptTooLong as error:
        field = "prompt" if body.messages is None else "messages"
        raise ContextLengthExceeded(
            f"There are at least {shown(error.num_tokens)} tokens in the {field}; this endpoint counts up to "
            f"{MAX_VALUES}.",
            param=field,
        ) from None
