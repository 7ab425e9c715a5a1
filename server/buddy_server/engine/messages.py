"""The plain types in which the HTTP layer and the engine meet: no torch, no FastAPI, no pydantic.

Everything here can cross a thread or a process boundary unchanged. What every step makes is a msgspec struct: several
times as quick as a frozen dataclass to make, to encode and to decode.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from msgspec import Struct

FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request turns logits into tokens. Ranges are checked where requests enter, not here.

    `top_k` 0 switches it off; `temperature` 0 is greedy; `seed` None draws a fresh one.
    `stop_token_ids` end the request besides the model's own end tokens. `top_logprobs` None asks for no
    log probabilities, 0 for the sampled token's only, k for the k likeliest as well; `prompt_logprobs` the same for
    the prompt's tokens.
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
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def takes_logits_as_they_are(self) -> bool:
        """Whether nothing is added to them that depends on the request."""
        return not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One admitted request. Its depth was decided at admission: `num_run_layers` layers for every token. With
    `align_paths` its tokens may share their paths with the tenant's others of the same depth."""

    request_id: str
    tenant: str
    prompt_tokens: tuple[int, ...]
    num_run_layers: int
    sampling: SamplingParams
    align_paths: bool = False


class TokenLogprob(Struct, frozen=True, array_like=True):
    token_id: int
    token: str
    logprob: float


class PromptEvent(Struct, frozen=True, array_like=True, tag=True):
    """The prompt's tokens from the second on, each with the likeliest ones in its place. Comes before the first
    TokenEvent, and only when prompt_logprobs was asked for."""

    logprobs: tuple[TokenLogprob, ...]
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]


class TokenEvent(Struct, frozen=True, array_like=True, tag=True):
    """Exactly one generated token. `text` may be empty: the end token, half a character, or text held back
    because it could become a stop string. `layers` are the indices of the layers this token ran."""

    token_id: int
    text: str
    layers: tuple[int, ...]
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class FinishEvent(Struct, frozen=True, array_like=True, tag=True):
    """The last event of every request, exactly once. `text` is what was held back and is now released.

    `prompt_layer_runs` and `output_layer_runs` count layers executed, summed over tokens. The first `cached_tokens` of
    the prompt were found computed and ran none.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prompt_layer_runs: int
    output_layer_runs: int
    text: str = ""
    error: str | None = None
    cached_tokens: int = 0


Event = PromptEvent | TokenEvent | FinishEvent


class DepthCount(Struct, frozen=True, array_like=True):
    """Layers executed and skipped by one tenant's tokens in one step; their sum is L x tokens routed."""

    executed: int = 0
    skipped: int = 0


class StepStats(Struct, frozen=True, array_like=True):
    """What one call to the model did, in `num_steps` steps of the same sequences. `num_layers_read` adds up the sizes
    of each step's union of layers that any row ran."""

    num_steps: int
    num_rows: int
    num_sequences: int
    num_layers_read: int
    num_preemptions: int
    router_s: float
    depth: Mapping[str, DepthCount]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the HTTP layer may know about the engine: `kv_capacity_tokens` bounds any single request. `arithmetic` is
    what products are computed with: one of buddy_kernels.arithmetics, or "torch"."""

    model_id: str
    num_layers: int
    vocab_size: int
    max_context: int
    kv_capacity_tokens: int
    router_id: str
    device: str
    dtype: str
    arithmetic: str


class EngineClient(Protocol):
    """What the HTTP layer sees of the engine."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    @property
    def kv_usage_ratio(self) -> float: ...

    async def predict_depth(self, prompt_tokens: tuple[int, ...], lowest: int, highest: int) -> int | None:
        """Layers for a prompt whose request leaves them open, within the bounds; None without a Budget Predictor, and
        when the engine stops or fails before it has answered."""
        ...

    def submit(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """Start a request and yield its events, those that come at the same time as one list; a FinishEvent by "error"
        or "cancelled" comes alone. Closing the iterator at any point cancels the request."""
        ...


class OwnedEngine(EngineClient, Protocol):
    """The same for who starts and stops the engine."""

    def start(self) -> None: ...

    def stop(self) -> None:
        """End every request as cancelled, then the engine. May be called again, and from any thread."""
        ...
