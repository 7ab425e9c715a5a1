"""Our engine as a contender: scheduler, router, sampler and detokenizer included, HTTP not."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from buddy_routing.budget import num_run_layers
from buddy_routing.model_spec import ModelSpec
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_server.bench.contender import Timing, Tokens
from buddy_server.engine.build import BuiltEngine, Routing, assemble, load_served_model, make_routing
from buddy_server.engine.messages import FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from buddy_server.engine.settings import EngineSettings

MAX_STEP_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class OurEngine:
    """One engine at some budgets: one for all requests, or several that take turns."""

    spec: ModelSpec
    built: BuiltEngine
    dtype: str
    budgets: tuple[float, ...]
    engine: str = "buddy"

    @classmethod
    def load(cls, directory: Path, router: str | None, dtype: str, dtype_name: str, max_sequences: int) -> "OurEngine":
        """Of a checkpoint; `router` None is random and changes its paths all the time."""
        served = load_served_model(str(directory), router, "cpu", dtype_name)
        spec = served.loaded.model.spec
        routing = make_routing(router, served) if router else Routing(random_router(spec.kv_dim, spec.num_layers))
        step_tokens = max(MAX_STEP_TOKENS, max_sequences + routing.route_block)
        # Every round asks the same again, and is to compute it again.
        settings = EngineSettings(max_sequences=max_sequences, max_step_tokens=step_tokens, prefix_cache=False)
        built = assemble(served, routing, settings)
        # Answers end with their number of tokens and no sooner.
        built.engine.end_token_ids = frozenset()
        return cls(spec, built, dtype, (1.0,))

    def answer(self, prompts: list[Tokens], new_tokens: int) -> Timing:
        engine = self.built.engine
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        num_run = [num_run_layers(budget, self.spec.num_layers) for budget in self.budgets]
        started = time.perf_counter()
        for index, prompt in enumerate(prompts):
            engine.add(GenerationRequest(str(index), "bench", prompt, num_run[index % len(num_run)], sampling))
        first_tokens: dict[str, int] = {}
        num_decoded = num_ended = 0
        prefilled = 0.0
        while engine.has_work:
            for request_id, event in engine.step().events:
                if isinstance(event, TokenEvent):
                    assert len(event.layers) == num_run[int(request_id) % len(num_run)]
                    num_decoded += bool(prefilled)
                    first_tokens.setdefault(request_id, event.token_id)
                num_ended += isinstance(event, FinishEvent)
            if not prefilled and len(first_tokens) == len(prompts):
                prefilled = time.perf_counter()
        assert num_ended == len(prompts)
        ended = time.perf_counter()
        firsts = tuple(first_tokens[str(index)] for index in range(len(prompts)))
        return Timing(prefilled - started, ended - prefilled, num_decoded, firsts)

    @property
    def ideal_speedup(self) -> float | None:
        """Weights that a token reads at full depth over those it reads at its budget: the layers it runs, the K/V
        projections of the others, the head. The router's are too few to count. None where budgets differ."""
        if len(self.budgets) > 1:
            return None
        spec = self.spec
        kv = 2 * spec.kv_dim * spec.hidden_size
        q_and_o = 2 * spec.num_heads * spec.head_dim * spec.hidden_size
        layer = kv + q_and_o + 3 * spec.intermediate_size * spec.hidden_size
        head = spec.vocab_size * spec.hidden_size
        run = num_run_layers(self.budgets[0], spec.num_layers)
        full = spec.num_layers * layer + head
        return full / (run * layer + (spec.num_layers - run) * kv + head)


def random_router(kv_dim: int, num_layers: int) -> LearnedRouter:
    torch.manual_seed(0)
    decision = DecisionModule(2 * kv_dim, num_layers)
    with torch.no_grad():
        # Features of random weights are small: without this the first layers would win by their biases alone.
        decision.down.weight.mul_(30)
        decision.up.bias.zero_()
    return LearnedRouter(decision, torch.zeros(num_layers - 2), 0.0, "random")
