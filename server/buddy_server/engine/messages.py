"""The plain types shared by the HTTP layer and the engine: no torch, no FastAPI, no pydantic.

Everything here can cross a thread or a process boundary unchanged. Types made in every step are msgspec structs, which
are several times faster than a frozen dataclass to create, encode and decode.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from msgspec import Struct

from buddy_routing.action_space import ActionSpace

FinishReason = Literal["stop", "length", "grammar", "error", "cancelled", "lost"]
"""Why a request ended: the model, its limit, a grammar that needs too much work, a failure, its client or a shutdown,
the loss of its engine."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request turns logits into tokens. Ranges are checked in the API, not here.

    `top_k` 0 switches it off; `temperature` 0 is greedy; `seed` None draws a fresh one. `stop_token_ids` end the
    request besides the model's own end tokens, or instead of them with `ignore_eos`. `top_logprobs` None requests no
    log probabilities, 0 only the sampled token's, k those of the k likeliest as well; `prompt_logprobs` does the same
    for the prompt's tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One admitted request. Every token costs at most `max_cost` milli-layers; with a `min_cost` the Budget Predictor
    chooses between the two. With `align_paths` its tokens may share paths with the tenant's other requests of the same
    cost. While tenants compete, those of the highest `priority` go first, and share in proportion to `weight`. With a
    `tier` the limit of that name (EngineProcess.limit_depth) holds as well. With a `grammar`, in llguidance's format,
    the answer is one that it allows, or the beginning of one. `shown_tokens` are special tokens that its text shows; it
    leaves out all others."""

    request_id: str
    tenant: str
    prompt_tokens: tuple[int, ...]
    max_cost: int
    sampling: SamplingParams
    align_paths: bool = False
    min_cost: int | None = None
    weight: float = 1.0
    priority: int = 0
    tier: str | None = None
    grammar: str | None = None
    shown_tokens: tuple[int, ...] = ()


class Usage(Struct, frozen=True, array_like=True):
    """What a request has used so far. Costs are the milli-layers that its tokens ran; recomputed tokens count once. The
    first `cached_tokens` of the prompt came from the prefix cache and ran none. The last token of an answer is
    generated but never run."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_cost: int = 0
    output_cost: int = 0

    @property
    def cost(self) -> int:
        return self.prompt_cost + self.output_cost


class Account(Struct, frozen=True, array_like=True):
    """What one request used, however it ended. Every request has exactly one. `max_cost` as in FinishEvent."""

    request_id: str
    tenant: str
    reason: FinishReason
    usage: Usage
    max_cost: int = 0


Served = dict[tuple[str, int], int]
"""What was run for tenants, in milli-layers, by tenant and priority. The priority is that in which it was run: a
request's own, or the one it has risen to after a long wait."""


class TokenLogprob(Struct, frozen=True, array_like=True, gc=False):
    token_id: int
    token: str
    logprob: float


class DepthEvent(Struct, frozen=True, array_like=True, tag=True):
    """The Budget Predictor's choice: milli-layers that a token may cost. Comes first, and only if the request left it
    open."""

    max_cost: int


class StartEvent(Struct, frozen=True, array_like=True, tag=True):
    """The request has, after `queue_s` seconds in the engine, its first place among those that run. Comes once, before
    all that follows from running."""

    queue_s: float


class PromptEvent(Struct, frozen=True, array_like=True, tag=True):
    """The prompt's tokens from the second on, each with the likeliest tokens at its position. Comes before the first
    TokenEvent, and only if prompt_logprobs was requested."""

    logprobs: tuple[TokenLogprob, ...]
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]


class TokenEvent(Struct, frozen=True, array_like=True, tag=True):
    """Exactly one generated token. `text` may be empty: for the end token, half a character, or text held back because
    it could become a stop string. `path` [L] holds the actions of the layers that produced it."""

    token_id: int
    text: str
    path: bytes
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class FinishEvent(Struct, frozen=True, array_like=True, tag=True):
    """The last event of every request, exactly once. `text` was held back until now. `max_cost` is the lowest limit, in
    milli-layers per token, under which any of its tokens ran; its own limit if none ran or the engine was lost."""

    reason: FinishReason
    usage: Usage
    text: str = ""
    error: str | None = None
    max_cost: int = 0


AnswerEvent = PromptEvent | TokenEvent | FinishEvent
Event = DepthEvent | StartEvent | AnswerEvent


class DepthCount(Struct, frozen=True, array_like=True):
    """Milli-layers of one tenant's tokens in one call to the model. Executed and skipped add up to the full cost of the
    tokens. `uncharged` is the part of executed that was rerun after a preemption, or that ran past the end."""

    executed: int = 0
    skipped: int = 0
    uncharged: int = 0


class StepTime(Struct, frozen=True, array_like=True):
    """The `seconds` of steps and the number of them, both summed over the sequences that waited for each."""

    seconds: float = 0.0
    num_steps: int = 0

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(self.seconds + other.seconds, self.num_steps + other.num_steps)

    @property
    def mean_s(self) -> float:
        """0.0 if there was no step."""
        return self.seconds / self.num_steps if self.num_steps else 0.0


class StepStats(Struct, frozen=True, array_like=True):
    """What one call to the model did in `seconds`, in `num_steps` steps of the same sequences. `num_layers_read` sums,
    over the steps, the number of layers that any row ran."""

    num_steps: int
    num_rows: int
    num_sequences: int
    num_layers_read: int
    num_preemptions: int
    router_s: float
    depth: Mapping[str, DepthCount]
    seconds: float = 0.0

    @property
    def time(self) -> StepTime:
        return StepTime(self.seconds * self.num_sequences, self.num_steps * self.num_sequences)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the HTTP layer may know about the engine. `kv_capacity_tokens` limits any single request, `max_sequences`
    those that run side by side. `arithmetic` is what products are computed with: one of buddy_kernels.arithmetics, or
    "torch". `system_fingerprint` changes with everything that could change the answer to a seeded request."""

    model_id: str
    actions: ActionSpace
    vocab_size: int
    max_context: int
    kv_capacity_tokens: int
    max_sequences: int
    router_id: str
    device: str
    dtype: str
    arithmetic: str
    system_fingerprint: str
    has_predictor: bool = False

    @property
    def num_layers(self) -> int:
        return self.actions.num_layers


class EngineClient(Protocol):
    """The HTTP layer's view of the engine."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def ready_in_s(self) -> float:
        """Estimated seconds until it can accept work."""
        ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    @property
    def kv_usage_ratio(self) -> float: ...

    def submit(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """Start a request and yield its events; events that arrive together come as one list. A FinishEvent with a
        reason other than "stop" or "length" comes alone. Closing the iterator at any point cancels the request."""
        ...


class OwnedEngine(EngineClient, Protocol):
    """The same, for the owner that starts and stops the engine."""

    def start(self) -> None: ...

    def stop(self) -> None:
        """End every request as cancelled, then the engine. May be called more than once, and from any thread."""
        ...
