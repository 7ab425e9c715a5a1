"""Our engine as a contender: with scheduler, router, sampler and detokenizer, without HTTP."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from buddy_routing.action_space import MILLI_LAYERS, SKIP
from buddy_routing.duo import DuoRouter, new_small_ffns
from buddy_routing.exits import ExitRouter, new_exits
from buddy_routing.model_spec import ModelSpec
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_server.bench.contender import Timing, Tokens
from buddy_server.engine.build import BuiltEngine, assemble
from buddy_server.engine.messages import FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from buddy_server.engine.routing import Routing, make_routing
from buddy_server.engine.served_model import ServedModel, load_served_model
from buddy_server.engine.settings import EngineSettings

MAX_STEP_TOKENS = 1024
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class OurEngine:
    """One engine at one budget for all requests, or at several that alternate."""

    spec: ModelSpec
    built: BuiltEngine
    settings: EngineSettings
    dtype: str
    budgets: tuple[float, ...]
    engine: str = "buddy"
    align_paths: bool = False

    @classmethod
    def load(
        cls,
        directory: Path,
        router: str | None,
        dtype: str,
        dtype_name: str,
        max_sequences: int,
        max_step_tokens: int = MAX_STEP_TOKENS,
        exits: tuple[int, ...] = (),
        small_ffns: int | None = None,
    ) -> "OurEngine":
        """The engine of a checkpoint. `router` None is a random router, which changes its paths all the time; it also
        chooses untrained small FFNs of a `small_ffns`-th of the big ones, if asked. With `exits` there are untrained
        exits instead. A step computes `max_step_tokens`, or more if `max_sequences` needs it. Raises ValueError for
        exits and small FFNs that the model cannot have."""
        served = load_served_model(str(directory), router, "cpu", dtype_name)
        spec = served.loaded.model.spec
        if exits:
            made = new_exits(served.loaded.model, exits)
            routing = Routing(
                ExitRouter({number: exit_.to(served.dtype) for number, exit_ in made.items()}, "untrained")
            )
        elif small_ffns is not None:
            routing = Routing(random_duo(served, small_ffns))
        else:
            routing = make_routing(router, served) if router else Routing(random_router(spec))
        step_tokens = max(max_step_tokens, max_sequences + routing.route_block)
        # Every round repeats the same prompts, and should compute them again.
        settings = EngineSettings(max_sequences=max_sequences, max_step_tokens=step_tokens, prefix_cache=False)
        built = assemble(served, routing, settings)
        # Answers end only at their number of tokens.
        built.engine.end_token_ids = frozenset()
        return cls(spec, built, settings, dtype, (1.0,))

    def answer(self, prompts: list[Tokens], new_tokens: int) -> Timing:
        engine = self.built.engine
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        actions = self.built.info.actions
        costs = [actions.max_cost(budget) for budget in self.budgets]
        started = time.perf_counter()
        for index, prompt in enumerate(prompts):
            max_cost = costs[index % len(costs)]
            engine.add(GenerationRequest(str(index), "bench", prompt, max_cost, sampling, self.align_paths))
        first_tokens: dict[str, int] = {}
        paths: list[list[bytes]] = [[] for _ in prompts]
        num_decoded = num_ended = 0
        prefilled = 0.0
        while engine.has_work:
            for request_id, event in engine.step().events:
                if isinstance(event, TokenEvent):
                    most = costs[int(request_id) % len(costs)]
                    # With small FFNs, what is left of a budget may not pay for a big one.
                    most_left = MILLI_LAYERS if actions.num_actions > 2 else 1
                    assert 0 <= most - actions.path_costs[event.path] < most_left
                    paths[int(request_id)].append(event.path)
                    num_decoded += bool(prefilled)
                    first_tokens.setdefault(request_id, event.token_id)
                num_ended += isinstance(event, FinishEvent)
            if not prefilled and len(first_tokens) == len(prompts):
                prefilled = time.perf_counter()
        assert num_ended == len(prompts)
        ended = time.perf_counter()
        firsts = tuple(first_tokens[str(index)] for index in range(len(prompts)))
        # All started together, so tokens at the same position of their answers come from the same step.
        steps = zip(*(of_prompt[1:] for of_prompt in paths), strict=True)
        rows = Counter(count for step in steps for count in self._layer_rows(step))
        return Timing(prefilled - started, ended - prefilled, num_decoded, firsts, rows)

    def _layer_rows(self, paths: Sequence[bytes]) -> list[int]:
        """[L]: how many of a step's paths run each layer."""
        return [sum(action != SKIP for action in of_layer) for of_layer in zip(*paths, strict=True)]

    def predicted_s(self, layer_rows: Mapping[int, int], batch: int, step_s: Mapping[int, float]) -> float:
        """The predicted decode time, if the layers run with the row counts `layer_rows`. `step_s` has the seconds of a
        step at full depth with 1 to `batch` rows. A step's time is split between layers and head, and a layer's between
        the K/V projections, which all rows run, and the rest, in proportion to the weights they read."""
        kv, layer, head = self._num_weights
        num_layers = self.spec.num_layers
        head_share, kv_share = head / (num_layers * layer + head), kv / layer
        layer_s = {0: 0.0, **{rows: (1 - head_share) * seconds / num_layers for rows, seconds in step_s.items()}}
        num_steps = sum(layer_rows.values()) / num_layers
        in_layers = sum(
            count * ((1 - kv_share) * layer_s[rows] + kv_share * layer_s[batch]) for rows, count in layer_rows.items()
        )
        return in_layers + num_steps * head_share * step_s[batch]

    @property
    def ideal_speedup(self) -> float | None:
        """Weights that a token reads at full depth over those it reads at its budget: the layers it runs, the K/V
        projections of the others unless it leaves at an exit, the head. The router's are too few to count. With small
        FFNs, as if no layer were skipped. None if budgets differ."""
        if len(self.budgets) > 1:
            return None
        kv, layer, head = self._num_weights
        num_layers, actions = self.spec.num_layers, self.built.info.actions
        run = actions.max_cost(self.budgets[0]) / MILLI_LAYERS
        if actions.exits or actions.num_actions > 2:
            kv = 0
        return (num_layers * layer + head) / (run * layer + (num_layers - run) * kv + head)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight matrices, each counted once."""
        _, layer, head = self._num_weights
        num_heads = 1 if self.spec.tie_embeddings else 2
        actions = self.built.info.actions
        small = 0
        if actions.num_actions > 2:
            small = 3 * self.spec.small_ffn_size * self.spec.hidden_size * len(actions.free)
        return (actions.num_columns * layer + small + num_heads * head) * WEIGHT_BYTES[self.dtype]

    @property
    def kv_cache_bytes(self) -> int:
        # With int8 weights, K/V keep the dtype from which the weights were quantized.
        token = 2 * self.built.info.actions.num_columns * self.spec.kv_dim * max(2, WEIGHT_BYTES[self.dtype])
        return self.built.info.kv_capacity_tokens * token

    @property
    def _num_weights(self) -> tuple[int, int, int]:
        """Number of weights in a layer's K/V projections, in a whole layer, in the head."""
        spec = self.spec
        kv = 2 * spec.kv_dim * spec.hidden_size
        q_and_o = 2 * spec.num_heads * spec.head_dim * spec.hidden_size
        return kv, kv + q_and_o + 3 * spec.intermediate_size * spec.hidden_size, spec.vocab_size * spec.hidden_size


def random_router(spec: ModelSpec) -> LearnedRouter:
    torch.manual_seed(0)
    decision = DecisionModule(2 * spec.kv_dim, spec.actions.num_scores)
    with torch.no_grad():
        # Random weights give small features: without this, the biases alone would favour the first layers.
        decision.down.weight.mul_(30)
        decision.up.bias.zero_()
    return LearnedRouter(decision, torch.zeros(len(spec.actions.free)), 0.0, "random")


def random_duo(served: ServedModel, divisor: int) -> DuoRouter:
    small_ffns = {layer: mlp.to(served.dtype) for layer, mlp in new_small_ffns(served.loaded.model, divisor).items()}
    spec = served.loaded.model.with_small_ffns(small_ffns).spec
    decision = random_router(spec).decision
    with torch.no_grad():
        # Worth a little more than its cost, a small FFN is preferred to skipping, and most layers have theirs.
        decision.up.weight.mul_(0.1)
        decision.up.bias.copy_(torch.tensor([1.0, 1.1 * spec.small_cost / MILLI_LAYERS]).repeat(len(spec.actions.free)))
    return DuoRouter(decision, small_ffns, "random")
