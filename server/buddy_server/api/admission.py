"""Decides, once and before the engine sees a request, whether it may run, how deep and how long."""

import time
import uuid
from dataclasses import dataclass, replace

from fastapi import Request

from buddy_routing.action_space import ActionSpace
from buddy_server.api.answer_grammar import answer_grammar
from buddy_server.api.field_types import refused
from buddy_server.api.job import Job
from buddy_server.api.prompts import check_named_tokens, context_limit, prompt_tokens
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
from buddy_server.tools.pieces import ToolParser
from buddy_server.tools.tool_format import ToolFormat

BUDGET_HEADER = "x-buddy-budget"


@dataclass(frozen=True, slots=True)
class Admitted:
    """A job that may run: one engine request per choice, all of the same depth; the `n` choices of a prompt are
    adjacent.

    `id`, `created` and `system_fingerprint` are those of the response; `request_id` is the x-request-id, for logs. A
    job with a tool_choice has the model's `tool_format`.
    """

    id: str
    created: int
    system_fingerprint: str
    request_id: str
    job: Job
    depth: DepthDecision
    actions: ActionSpace
    choices: tuple[GenerationRequest, ...]
    tool_format: ToolFormat | None = None

    def new_parser(self) -> ToolParser | None:
        """A parser for one answer; None if there cannot be tool calls in it."""
        if self.tool_format is None or self.job.tool_choice is None:
            return None
        return self.tool_format.parser(self.job.tool_choice)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The tokens of each prompt, once per prompt."""
        return [choice.prompt_tokens for choice in self.choices[:: self.job.n]]


async def admit(services: Services, life: RequestLife, caller: Caller, request: Request, job: Job) -> Admitted:
    """Decide everything about `job` that the engine should not have to, and reserve what it may use in `life`.

    Raises ModelNotFound, InvalidBudget, ContextLengthExceeded, InvalidRequest, and what RequestLife.admit raises.
    """
    info, tier = services.engine.info, caller.tenant.tier
    if job.model != info.model_id:
        raise ModelNotFound(job.model, info.model_id)
    asked = _asked_budget(job, request.headers.get(BUDGET_HEADER), info.actions)
    depth = decide_depth(asked, tier, info.actions, info.has_predictor)
    check_named_tokens(job.sampling, info.vocab_size)
    prompts = await prompt_tokens(services.tokenizer, job, info)
    tool_format = services.tokenizer.tool_format if job.tool_choice else None
    grammar = await answer_grammar(job, tool_format, services.compiler)
    if grammar is not None and job.sampling.ignore_eos:
        raise refused("ignore_eos", True, "false where the form of the answer says when it ends")
    num_answers = job.n * len(prompts)
    affordable = _affordable_tokens(tier, depth, num_answers, info)
    limits = [_max_tokens(len(prompt), job, tier, affordable, info) for prompt in prompts]
    answer_id = f"{job.id_prefix}{uuid.uuid4().hex}"
    await life.admit(
        Order(
            id=answer_id,
            caller=caller,
            depth=depth,
            num_answers=num_answers,
            num_prompt_tokens=sum(map(len, prompts)),
            cost=job.n * depth.max_cost * (sum(map(len, prompts)) + sum(limits)),
            scores_only=job.scores_only,
        )
    )
    choices = tuple(
        GenerationRequest(
            request_id=f"{answer_id}-{prompt_index * job.n + index}",
            tenant=caller.tenant.name,
            prompt_tokens=prompt,
            max_cost=depth.max_cost,
            min_cost=depth.min_cost,
            sampling=_sampling(job, limits[prompt_index], index),
            align_paths=tier.align_paths,
            weight=tier.weight,
            priority=tier.priority,
            tier=tier.name if tier.elastic_floor is not None else None,
            grammar=grammar,
            shown_tokens=tool_format.shown_tokens if tool_format else (),
        )
        for prompt_index, prompt in enumerate(prompts)
        for index in range(job.n)
    )
    return Admitted(
        id=answer_id,
        created=int(time.time()),
        system_fingerprint=info.system_fingerprint,
        request_id=request.state.request_id,
        job=job,
        depth=depth,
        actions=info.actions,
        choices=choices,
        tool_format=tool_format,
    )


def _asked_budget(job: Job, header: str | None, actions: ActionSpace) -> float | Auto | None:
    # Checked even where the field counts: a header that says nothing sensible is a mistake.
    in_header = None if header is None else parse_budget_header(header, actions)
    return in_header if job.budget is None else parse_budget(job.budget, actions)


def _max_tokens(num_prompt_tokens: int, job: Job, tier: Tier, affordable: int | None, info: EngineInfo) -> int:
    """The output limit: the requested one if tier and context allow it. Without one: all that the context has left, the
    tier allows, and its limits of layer-tokens can ever pay for."""
    field, wanted = job.prompt_field, job.sampling.max_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequest(f"There is not a single token in the {field}.", param=field)
    limit, bound = context_limit(info)
    num_tokens = num_prompt_tokens + max(1, wanted)
    if num_tokens > limit:
        raise ContextLengthExceeded(
            f"The request needs {shown(num_tokens)} tokens ({num_prompt_tokens} in the {field}, "
            f"{shown(wanted) if wanted else 'at least 1'} in the completion), {bound} holds {limit}.",
            param=field if num_prompt_tokens >= limit else job.limit_field,
        )
    most = tier.max_completion_tokens
    if wanted:
        if most is not None and wanted > most:
            raise InvalidRequest(
                f"{job.limit_field}: {shown(wanted)} is not allowed: tier {tier.name!r} allows at most {most}",
                param=job.limit_field,
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


def _sampling(job: Job, max_tokens: int, choice: int) -> SamplingParams:
    """The sampling of one choice. The choices of a seeded request get consecutive seeds; otherwise all would be
    equal."""
    seed = job.sampling.seed
    return replace(job.sampling, max_tokens=max_tokens, seed=None if seed is None else seed + choice)
