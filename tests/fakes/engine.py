"""An engine without a model: deterministic, a little slow, and it remembers what was asked and cancelled."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Set
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from buddy_routing.action_space import MILLI_LAYERS, ActionSpace
from buddy_server.engine.messages import (
    Account,
    DepthEvent,
    EngineInfo,
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    StartEvent,
    StepTime,
    TokenEvent,
    TokenLogprob,
    Usage,
)

NUM_LAYERS = 8
INFO = EngineInfo(
    model_id="tiny/fake-8l",
    actions=ActionSpace.skip_or_run(NUM_LAYERS),
    vocab_size=1000,
    max_context=256,
    kv_capacity_tokens=200,
    max_sequences=4,
    router_id="static",
    device="cpu",
    dtype="float32",
    arithmetic="fma",
    system_fingerprint="fp_0123456789ab",
)


def path_of(token_index: int, max_cost: int) -> bytes:
    """Always the first and the last layer, the others in turn."""
    middle = [1 + (token_index + step) % (NUM_LAYERS - 2) for step in range(max_cost // MILLI_LAYERS - 2)]
    return bytes(layer in (0, NUM_LAYERS - 1, *middle) for layer in range(NUM_LAYERS))


PREDICTING = replace(INFO, has_predictor=True)


@dataclass
class FakeEngine:
    """Says `words`, one a token, over and over, up to `num_words`. Its token `fail_at` is an error event."""

    info: EngineInfo = INFO
    is_ready: bool = True
    num_waiting: int = 0
    num_running: int = 0
    kv_usage_ratio: float = 0.0
    queue_s: float = 0.0
    words: tuple[str, ...] = ("Hello", " there", "", ",", " wörld", " 🐦")
    num_words: int = 6
    last_text: str = "!"
    group_size: int = 1
    delay_s: float = 0.001
    fail_at: int | None = None
    fail_with: FinishReason = "error"
    raise_at: int | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    stopped: bool = False
    logprob: float = -0.5
    """Of every token; the likeliest others are impossible."""
    predicted: int | None = None
    """Layers that the Budget Predictor wants."""
    num_cached: tuple[int, ...] = (0,)
    """Of the prompts of requests in turn."""
    settle: Callable[[Account], None] = lambda _: None
    """Called with the account of every request before its last event is yielded."""
    limits: dict[str, int] = field(default_factory=dict)
    """The last that limit_depth was given."""
    served: dict[tuple[str, int], int] = field(default_factory=dict)
    served_elsewhere: Counter[tuple[str, int]] = field(default_factory=Counter)
    """In all."""
    waiting_tenants: frozenset[tuple[str, int]] = frozenset()
    waiting_elsewhere: Set[tuple[str, int]] = frozenset()
    """As last told."""

    def take_step_time(self) -> StepTime:
        return StepTime()

    def charge_elsewhere(self, served: Mapping[tuple[str, int], int], waiting: Set[tuple[str, int]]) -> None:
        self.served_elsewhere.update(served)
        self.waiting_elsewhere = waiting

    @property
    def ready_in_s(self) -> float:
        return 0.0 if self.is_ready else 6.5

    def stop(self) -> None:
        """What runs then ends as cancelled."""
        self.stopped = True

    def limit_depth(self, limits: Mapping[str, int]) -> None:
        self.limits = dict(limits)

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """`group_size` events come at the same time; an end that is a failure comes alone."""
        group: list[Event] = []
        async with aclosing(self._events(request)) as events:
            async for event in events:
                if isinstance(event, FinishEvent):
                    self._account(request, event.reason, event.usage, event.max_cost)
                if group and isinstance(event, FinishEvent) and event.reason in ("error", "cancelled"):
                    yield group
                    group = []
                group.append(event)
                if len(group) == self.group_size or isinstance(event, FinishEvent):
                    yield group
                    group = []

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        cached_tokens = self.num_cached[len(self.requests) % len(self.num_cached)]
        self.requests.append(request)
        ended = False
        try:
            if request.min_cost is not None:
                wanted = MILLI_LAYERS * (self.predicted or NUM_LAYERS)
                request = replace(request, max_cost=min(max(wanted, request.min_cost), request.max_cost))
                yield DepthEvent(request.max_cost)
            own_cost = request.max_cost
            request = replace(request, max_cost=min(own_cost, self.limits.get(request.tier or "", own_cost)))
            yield StartEvent(self.queue_s)
            num_tokens = min(self.num_words, request.sampling.max_tokens)
            if request.sampling.prompt_logprobs is not None:
                yield self._prompt(request)
            for index in range(num_tokens):
                await asyncio.sleep(self.delay_s)
                if index == self.raise_at:
                    raise RuntimeError("secret inside of the engine")
                if self.stopped:
                    ended = True
                    yield FinishEvent("cancelled", Usage(0), max_cost=request.max_cost)
                    return
                if index == self.fail_at:
                    ended = True
                    yield FinishEvent(
                        self.fail_with, Usage(0), error="secret inside of the engine", max_cost=request.max_cost
                    )
                    return
                yield self._token(index, request)
            ended = True
            yield FinishEvent(
                reason="length" if num_tokens == request.sampling.max_tokens else "stop",
                usage=Usage(
                    prompt_tokens=len(request.prompt_tokens),
                    cached_tokens=cached_tokens,
                    completion_tokens=num_tokens,
                    prompt_cost=len(request.prompt_tokens) * request.max_cost,
                    output_cost=(num_tokens - 1) * request.max_cost,
                ),
                text=self.last_text,
                max_cost=request.max_cost,
            )
        finally:
            (self.finished if ended else self.cancelled).append(request.request_id)
            if not ended:
                self._account(request, "cancelled", Usage(len(request.prompt_tokens)), request.max_cost)

    def _account(self, request: GenerationRequest, reason: FinishReason, usage: Usage, max_cost: int) -> None:
        self.settle(Account(request.request_id, request.tenant, reason, usage, max_cost))

    def _prompt(self, request: GenerationRequest) -> PromptEvent:
        tokens = tuple(TokenLogprob(token, f" w{token}", self.logprob) for token in request.prompt_tokens[1:])
        count = request.sampling.prompt_logprobs or 0
        likeliest = tuple(TokenLogprob(other, f"t{other}", self.logprob) for other in range(count))
        return PromptEvent(tokens, (likeliest,) * len(tokens))

    def _token(self, index: int, request: GenerationRequest) -> TokenEvent:
        text = self.words[index % len(self.words)]
        top = request.sampling.top_logprobs
        return TokenEvent(
            token_id=index,
            text=text,
            path=path_of(index, request.max_cost),
            logprob=None if top is None else TokenLogprob(index, text, self.logprob),
            top_logprobs=tuple(TokenLogprob(other, f"t{other}", float("-inf")) for other in range(top or 0)),
        )
