"""A whole engine on a tiny random checkpoint: real scheduler, cache, router and kernels, in a second."""

import itertools
import json
import string
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from buddy_kernels.arithmetics import AUTO, arithmetics
from buddy_kernels.routed_step import BLOCK_SIZE as NATIVE_BLOCK_SIZE
from buddy_routing.action_space import MILLI_LAYERS, ActionSpace
from buddy_routing.artifact import save_duo, save_exits, save_router
from buddy_routing.checkpoint import load_model
from buddy_routing.duo import DuoRouter, new_small_ffns
from buddy_routing.exits import new_exits
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.router_config import DuoConfig, ExitsConfig, RouterConfig
from buddy_routing.stepper import NativeStepper
from buddy_server.engine.build import BuiltEngine, build_engine
from buddy_server.engine.detokenizer import Detokenizer
from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import (
    DepthEvent,
    FinishEvent,
    GenerationRequest,
    PromptEvent,
    SamplingParams,
    TokenEvent,
)
from buddy_server.engine.pace import Pace
from buddy_server.engine.sampler import Sampler
from buddy_server.engine.scheduler import StepOutput
from buddy_server.engine.sequence import Sequence
from buddy_server.engine.settings import EngineSettings
from tiny_models import SHAPE, save_random_model

NUM_LAYERS: int = SHAPE["num_hidden_layers"]
ACTIONS = ActionSpace.skip_or_run(NUM_LAYERS)
KV_DIM: int = SHAPE["hidden_size"] * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
BLOCK_SIZE = 4
ROUTE_BLOCK = 16
"""Of the learned router; a static prior's is 128."""


@dataclass(frozen=True)
class TinySite:
    """Directories of a model with a tokenizer, and of a learned router for it."""

    model: Path
    router: Path


def save_tiny_site(directory: Path) -> TinySite:
    """Write a random model and router.

    No token ends a request, so that lengths are the test's to choose.
    """
    model, router = directory / "model", directory / "router"
    save_tiny_model("llama", model)
    save_random_router(model, router)
    return TinySite(model, router)


def save_tiny_model(name: str, directory: Path) -> Any:
    """Write a random model that no token ends, with a tokenizer; transformers' model of it."""
    theirs = save_random_model(name, directory)
    for file in (directory / "config.json", directory / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    save_character_tokenizer(directory)
    return theirs


def save_character_tokenizer(directory: Path) -> None:
    """A token for every printable ASCII character: exactly the tiny models' vocabulary."""
    characters = ["<unk>", "\n", *sorted(string.ascii_letters + string.digits + string.punctuation + " ")]
    assert len(characters) == SHAPE["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    # llguidance takes tokenizers that say how they spell bytes.
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def save_random_router(model: Path, directory: Path, reroute_every: int = 1) -> None:
    """Random, with a weak prior: its paths change from token to token."""
    torch.manual_seed(1)
    decision = DecisionModule(2 * KV_DIM, NUM_LAYERS - 2)
    with torch.no_grad():
        decision.up.bias.zero_()
        decision.up.weight.mul_(3)
    router = LearnedRouter(decision, torch.linspace(0, 1, NUM_LAYERS - 2), 0.1, "random")
    fingerprint = load_model(model, torch.float32, torch.device("cpu")).fingerprint
    config = RouterConfig(
        fingerprint, NUM_LAYERS, KV_DIM, 32, "cosine", 0.1, route_block=ROUTE_BLOCK, reroute_every=reroute_every
    )
    save_router(directory, router, config)


def save_random_exits(model: Path, directory: Path, exits: tuple[int, ...]) -> None:
    """Each is a layer of its own, so that none can be taken for another."""
    loaded = load_model(model, torch.float32, torch.device("cpu"))
    torch.manual_seed(2)
    made = new_exits(loaded.model, exits)
    with torch.no_grad():
        for exit_ in made.values():
            for name, parameter in exit_.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    save_exits(directory, made, ExitsConfig(loaded.fingerprint, exits, route_block=ROUTE_BLOCK), torch.float32)


def save_random_duo(model: Path, directory: Path) -> None:
    """Its paths change from token to token, and mix all three actions."""
    loaded = load_model(model, torch.float32, torch.device("cpu"))
    torch.manual_seed(2)
    small_ffns = new_small_ffns(loaded.model, 4)
    actions = loaded.model.with_small_ffns(small_ffns).spec.actions
    decision = DecisionModule(2 * KV_DIM, actions.num_scores)
    with torch.no_grad():
        for mlp in small_ffns.values():
            for parameter in mlp.parameters():
                parameter.normal_(0.0, 0.2)
        decision.up.weight.mul_(3)
        decision.up.bias.copy_(torch.tensor([1.0, 0.5]).repeat(NUM_LAYERS - 2))
    config = DuoConfig(
        base_fingerprint=loaded.fingerprint,
        num_layers=NUM_LAYERS,
        kv_dim=KV_DIM,
        rank=decision.down.out_features,
        small_ffn_size=small_ffns[1].down_proj.in_features,
        route_block=ROUTE_BLOCK,
    )
    save_duo(directory, DuoRouter(decision, small_ffns, "test"), config, torch.float32)


def build_tiny_engine(
    model: Path,
    router: Path | str,
    dtype: str = "float32",
    num_blocks: int | None = None,
    max_sequences: int = 16,
    max_step_tokens: int = 256,
    native: bool = False,
    prefix_cache: bool = True,
) -> BuiltEngine:
    """`num_blocks` None gives every sequence a full context; a block holds 4 tokens, in the native step 16."""
    block_size = NATIVE_BLOCK_SIZE if native else BLOCK_SIZE
    itemsize = 4 if dtype == "float32" else 2
    block_bytes = 2 * NUM_LAYERS * KV_DIM * itemsize * block_size
    # Half a block more, so that rounding takes none away.
    gib = 1.0 if num_blocks is None else (num_blocks + 0.5) * block_bytes / 2**30
    # Always the same one, where a choice by time would change the last bits from engine to engine.
    arithmetic = arithmetics(dtype)[-1] if native else AUTO
    settings = EngineSettings(
        gib, block_size, max_sequences, max_step_tokens, prefix_cache=prefix_cache, arithmetic=arithmetic
    )
    built = build_engine(str(model), str(router), settings, "cpu", dtype)
    assert isinstance(built.engine.runner.stepper, NativeStepper) == native
    return built


class SlowPace(Pace):
    """Room for three rows of prefill beside answers."""

    def prefill_rows(self, most: int, in_bursts: bool) -> int:
        return min(most, 3)


def make_request(
    request_id: str = "r",
    num_prompt: int = 9,
    num_run: float = 4,
    seed: int = 0,
    tenant: str = "default",
    **sampling: Any,
) -> GenerationRequest:
    """A request with a prompt drawn from its own seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    prompt = tuple(torch.randint(1, SHAPE["vocab_size"], (num_prompt,), generator=generator).tolist())
    params = SamplingParams(**{"max_tokens": 12, "seed": seed, **sampling})
    return GenerationRequest(request_id, tenant, prompt, round(MILLI_LAYERS * num_run), params)


class NoDetokenizer(Detokenizer):
    """Says nothing."""

    def __init__(self) -> None:
        self.stopped = False

    def add(self, token_id: int) -> str:
        return ""

    def name(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


_arrivals = itertools.count()


def new_sequence(request: GenerationRequest) -> Sequence:
    """What the engine makes of a request, for tests that have no tokenizer."""
    return Sequence(request, next(_arrivals), Sampler(request.sampling), NoDetokenizer(), frozenset())


@dataclass
class Answer:
    """All that came of one request."""

    prompts: list[PromptEvent] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    finish: FinishEvent | None = None

    @property
    def end(self) -> FinishEvent:
        assert self.finish is not None
        return self.finish

    @property
    def token_ids(self) -> list[int]:
        return [event.token_id for event in self.tokens]

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """The layers that made each token."""
        return [ACTIONS.layers_run(event.path) for event in self.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.tokens) + self.end.text


@dataclass
class Run:
    """`depths` are those that the Budget Predictor chose."""

    answers: dict[str, Answer]
    steps: list[StepOutput]
    depths: dict[str, int] = field(default_factory=dict)

    @property
    def num_preemptions(self) -> int:
        return sum(step.stats.num_preemptions for step in self.steps)


def run_engine(engine: Engine, requests: Seq[GenerationRequest]) -> Run:
    """Give all requests to the engine at once and step it until it is idle."""
    run = Run({request.request_id: Answer() for request in requests}, [])
    for request_id, event in engine.add(*requests):
        assert isinstance(event, DepthEvent)
        run.depths[request_id] = event.max_cost
    while engine.has_work:
        run.steps.append(engine.step())
        for request_id, event in run.steps[-1].events:
            answer = run.answers[request_id]
            assert answer.finish is None, f"{request_id} got an event after its last"
            if isinstance(event, FinishEvent):
                answer.finish = event
            elif isinstance(event, PromptEvent):
                assert not answer.tokens, f"{request_id} got its prompt's log probabilities late"
                answer.prompts.append(event)
            elif isinstance(event, TokenEvent):
                answer.tokens.append(event)
    engine.scheduler.check_idle()
    assert engine.scheduler.pool.usage_ratio == 0
    return run
