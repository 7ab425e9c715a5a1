"""Decides, once and before the engine sees a request, whether it may run, how deep and how long."""

import time
import uuid
from dataclasses import dataclass

from fastapi import Request

from buddy_routing.action_space import ActionSpace
from buddy_server.api.prompts import Body, check_named_tokens, context_limit, prompt_tokens, source
from buddy_server.api.response_format import grammar_of
from buddy_server.api.schemas import ChatRequest, CompletionRequest
from buddy_server.api.services import Services
from buddy_server.engine.messages import EngineInfo, GenerationRequest, SamplingParams
from buddy_server.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    shown,
)
from buddy_server.tenancy.bills import Order
from buddy_server.tenancy.depth import (
    DepthDecision,
    decide_depth,
    parse_budget,
    parse_budget_header,
)
from buddy_server.tenancy.policy import Auto, Tier
from buddy_server.tenancy.request_life import RequestLife
from buddy_server.tenancy.tenants import Caller

BUDGET_HEADER = "x-buddy-budget"


@dataclass(frozen=True, slots=True)
class Admitted:
    """A completion that may run: one engine request per choice, all of the same depth; the `n` choices of a prompt are
    adjacent.

    `id` and `created` are those of the response; `request_id` is the x-request-id, for logs.
    """

    id: str
    created: int
    request_id: str
    body: Body
    depth: DepthDecision
    actions: ActionSpace
    choices: tuple[GenerationRequest, ...]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The tokens of each prompt, once per prompt."""
        return [choice.prompt_tokens for choice in self.choices[:: self.body.n or 1]]


async def admit(services: Services, life: RequestLife, caller: Caller, request: Request, body: Body) -> Admitted:
    """Decide everything about `body` that the engine should not have to, and reserve what it may use in `life`.

    Raises ModelNotFound, InvalidBudget, ContextLengthExceeded, InvalidRequest, and what RequestLife.admit raises.
    """
    info, tier = services.engine.info, caller.tenant.tier
    if body.model != info.model_id:
        raise ModelNotFound(body.model, info.model_id)
    asked = _asked_budget(body, request.headers.get(BUDGET_HEADER), info.actions)
    depth = decide_depth(asked, tier, info.actions, info.has_predictor)
    check_named_tokens(body, info.vocab_size)
    grammar = await grammar_of(body, services.compiler)
    prompts = await prompt_tokens(services.tokenizer, body, info)
    n = body.n or 1
    affordable = _affordable_tokens(tier, depth, n * len(prompts), info)
    limits = [_max_tokens(len(prompt), body, tier, affordable, info) for prompt in prompts]
    completion_id = f"{'chatcmpl' if isinstance(body, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
    await life.admit(
        Order(
            id=completion_id,
            caller=caller,
            depth=depth,
            num_answers=n * len(prompts),
            num_prompt_tokens=sum(map(len, prompts)),
            cost=n * depth.max_cost * (sum(map(len, prompts)) + sum(limits)),
            scores_only=body.scores_only,
        )
    )
    choices = tuple(
        GenerationRequest(
            request_id=f"{completion_id}-{prompt_index * n + index}",
            tenant=caller.tenant.name,
            prompt_tokens=prompt,
            max_cost=depth.max_cost,
            min_cost=depth.min_cost,
            sampling=_sampling(body, limits[prompt_index], index),
            align_paths=tier.align_paths,
            weight=tier.weight,
            priority=tier.priority,
            tier=tier.name if tier.elastic_floor is not None else None,
            grammar=grammar,
        )
        for prompt_index, prompt in enumerate(prompts)
        for index in range(n)
    )
    return Admitted(completion_id, int(time.time()), request.state.request_id, body, depth, info.actions, choices)


def _asked_budget(body: Body, header: str | None, actions: ActionSpace) -> float | Auto | None:
    if body.budget is not None:
        return parse_budget(body.budget, actions)
    return None if header is None else parse_budget_header(header, actions)


def _max_tokens(num_prompt_tokens: int, body: Body, tier: Tier, affordable: int | None, info: EngineInfo) -> int:
    """The output limit: the requested one if tier and context allow it. Without one: all that the context has left, the
    tier allows, and its limits of layer-tokens can ever pay for."""
    field, wanted = source(body), body.wanted_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequest(f"There is not a single token in the {field}.", param=field)
    limit, bound = context_limit(info)
    num_tokens = num_prompt_tokens + (wanted or 1)
    if num_tokens > limit:
        raise ContextLengthExceeded(
            f"The request needs {shown(num_tokens)} tokens ({num_prompt_tokens} in the {field}, "
            f"{'at least 1' if wanted is None else shown(wanted)} in the completion), {bound} holds {limit}.",
            param=field if num_prompt_tokens >= limit else body.limit_field,
        )
    most = tier.max_completion_tokens
    if wanted is not None:
        if most is not None and wanted > most:
            raise InvalidRequest(
                f"{body.limit_field}: {shown(wanted)} is not allowed: tier {tier.name!r} allows at most {most}",
                param=body.limit_field,
            )
        return wanted
    left = [limit - num_prompt_tokens]
    if most is not None:
        left.append(most)
    if affordable is not None:
        left.append(affordable - num_prompt_tokens)
    return max(1, min(left))


def _affordable_tokens(tier: Tier, depth: DepthDecision, num_answers: int, info: EngineInfo) -> int | None:
    """Prompt and output tokens that the tier's limits can pay for, in each of `num_answers`; None without limits."""
    limits = [limit for limit in (tier.layer_tokens_per_minute, tier.layer_tokens_per_month) if limit is not None]
    return min(limits) * info.actions.full_cost // (depth.max_cost * num_answers) if limits else None


def _sampling(body: Body, max_tokens: int, choice: int) -> SamplingParams:
    """The sampling of one choice. The choices of a seeded request get consecutive seeds; otherwise all would be
    equal."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        seed=None if body.seed is None else body.seed + choice,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        top_logprobs=body.wanted_logprobs,
        prompt_logprobs=body.wanted_logprobs if isinstance(body, CompletionRequest) and body.echo else None,
    )
