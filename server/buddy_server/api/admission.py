"""Whether a request may run, how deep and how long: decided once, before the engine sees it."""

import time
import uuid
from dataclasses import dataclass

from anyio import to_thread
from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from buddy_server.api.errors_handler import invalid_request
from buddy_server.api.schemas import ChatRequest
from buddy_server.api.services import Services
from buddy_server.engine.messages import EngineClient, EngineInfo, GenerationRequest, SamplingParams
from buddy_server.errors import (
    ClientDisconnected,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    shown,
)
from buddy_server.tenancy.depth import (
    DepthDecision,
    decide_depth,
    lowest_depth,
    parse_budget,
    parse_budget_header,
    predicted_depth,
)
from buddy_server.tenancy.policy import Auto, Tenant, Tier

BUDGET_HEADER = "x-buddy-budget"


@dataclass(frozen=True, slots=True)
class AdmittedChat:
    """A chat completion that may run: one engine request for each choice, all of the same prompt and depth.

    `id` and `created` are those of the response; `request_id` is the x-request-id, for logs.
    """

    id: str
    created: int
    request_id: str
    chat: ChatRequest
    depth: DepthDecision
    num_layers: int
    choices: tuple[GenerationRequest, ...]


async def read_chat_request(request: Request) -> ChatRequest:
    """The body of `request`, checked.

    Raises InvalidRequest (malformed JSON included), BodyTooLarge, or ClientDisconnected when it ends early.
    """
    try:
        return ChatRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None
    except ClientDisconnect:
        raise ClientDisconnected from None


async def admit(services: Services, tenant: Tenant, request: Request, chat: ChatRequest) -> AdmittedChat:
    """Decide everything about `chat` that the engine is not to ask about.

    Raises ModelNotFound, InvalidBudget, NotReady, Overloaded, ContextLengthExceeded or InvalidRequest.
    """
    info = services.engine.info
    if chat.model != info.model_id:
        raise ModelNotFound(chat.model, info.model_id)
    asked = _asked_budget(chat, request.headers.get(BUDGET_HEADER), info.num_layers)
    depth = decide_depth(asked, tenant.tier, info.num_layers)
    bias = _logit_bias(chat.logit_bias or {}, info.vocab_size)
    messages = [message.model_dump(exclude_none=True) for message in chat.messages]
    # A long prompt takes the tokenizer a while; other requests must not wait for it.
    prompt_tokens = await to_thread.run_sync(services.tokenizer.render, messages)
    _check_vocabulary(prompt_tokens, info.vocab_size)
    # After the wait, so that those who waited too are counted.
    _check_capacity(services.engine, chat.n or 1, services.config.max_waiting)
    max_tokens = _max_tokens(len(prompt_tokens), chat.wanted_tokens, info)
    depth = await _settled(depth, tenant.tier, services.engine, prompt_tokens)
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    choices = tuple(
        GenerationRequest(
            request_id=f"{completion_id}-{index}",
            tenant=tenant.name,
            prompt_tokens=prompt_tokens,
            num_run_layers=depth.num_run_layers,
            sampling=_sampling(chat, max_tokens, bias, index),
        )
        for index in range(chat.n or 1)
    )
    return AdmittedChat(
        completion_id, int(time.time()), request.state.request_id, chat, depth, info.num_layers, choices
    )


async def _settled(
    depth: DepthDecision, tier: Tier, engine: EngineClient, prompt_tokens: tuple[int, ...]
) -> DepthDecision:
    """The decision, with the predictor's depth where the request and the tenant leave it open."""
    if not depth.is_open:
        return depth
    num_layers = engine.info.num_layers
    lowest = lowest_depth(tier, num_layers)
    num_run = await engine.predict_depth(prompt_tokens, lowest, depth.num_run_layers)
    return depth if num_run is None else predicted_depth(depth, num_run, num_layers)


def _asked_budget(chat: ChatRequest, header: str | None, num_layers: int) -> float | Auto | None:
    if chat.budget is not None:
        return parse_budget(chat.budget, num_layers)
    return None if header is None else parse_budget_header(header, num_layers)


def _check_vocabulary(prompt_tokens: tuple[int, ...], vocab_size: int) -> None:
    """Some published tokenizers know a token more than their model has."""
    if prompt_tokens and max(prompt_tokens) >= vocab_size:
        raise InvalidRequest(
            f"The messages contain token {max(prompt_tokens)}, which the tokenizer knows and the model, with "
            f"{vocab_size} tokens, does not.",
            param="messages",
        )


def _check_capacity(engine: EngineClient, num_choices: int, max_waiting: int) -> None:
    if not engine.is_ready:
        raise NotReady("The engine cannot take work yet.")
    if engine.num_waiting + num_choices > max_waiting:
        raise Overloaded(f"{engine.num_waiting} requests are waiting already; try again in a moment.")


def _max_tokens(num_prompt_tokens: int, wanted: int | None, info: EngineInfo) -> int:
    """The output limit: what was asked for if it fits, all that remains if nothing was asked for."""
    if num_prompt_tokens == 0:
        raise InvalidRequest("The messages make an empty prompt.", param="messages")
    limit = min(info.max_context, info.kv_capacity_tokens)
    bound = "the model's context" if limit == info.max_context else "the cache of this server"
    num_tokens = num_prompt_tokens + (wanted or 1)
    if num_tokens > limit:
        raise ContextLengthExceeded(
            f"The request needs {num_tokens} tokens ({num_prompt_tokens} in the messages, "
            f"{wanted or 'at least 1'} in the completion), {bound} holds {limit}.",
            param="messages" if num_prompt_tokens >= limit else "max_completion_tokens",
        )
    return wanted or limit - num_prompt_tokens


def _logit_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    for key in given:
        # isdecimal() alone lets other scripts' digits pass, and a long one is no number worth parsing.
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias: {shown(key)} is no token id, allowed are 0 to {vocab_size - 1}",
                param="logit_bias",
            )
    return {int(key): bias for key, bias in given.items()}


def _sampling(chat: ChatRequest, max_tokens: int, bias: dict[int, float], choice: int) -> SamplingParams:
    """The sampling of one choice. Choices of one seed get consecutive ones, or all would be the same."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if chat.temperature is None else chat.temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        top_k=max(0, chat.top_k or 0),
        min_p=chat.min_p or 0.0,
        presence_penalty=chat.presence_penalty or 0.0,
        frequency_penalty=chat.frequency_penalty or 0.0,
        logit_bias=bias,
        seed=None if chat.seed is None else min(chat.seed, 2**63 - 1 - choice) + choice,
        stop=tuple(chat.stop or ()),
        stop_token_ids=tuple(chat.stop_token_ids or ()),
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
    )
