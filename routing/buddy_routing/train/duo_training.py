"""Trains small FFNs beside a finished model's big ones, then a router that chooses (Duo-LLM, arXiv 2410.10846).

First the choices are random, so that every mixture of actions works. Then a router makes them, as the server does, and
the small FFNs learn on with it. The paper trains the model along, from scratch; here it stays as it is, or gets LoRA.
"""

# B rows of examples, T tokens, C free layers, F width of one token's V

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from buddy_routing.action_space import MILLI_LAYERS, RUN, SMALL, ActionSpace
from buddy_routing.adapter import add_adapter
from buddy_routing.checkpoint import LoadedModel
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.duo import DuoRouter, new_small_ffns
from buddy_routing.features import causal_features, feature_dim
from buddy_routing.first_layer import FirstLayer
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router import DecisionModule, Router
from buddy_routing.router_config import DuoConfig
from buddy_routing.train.batch_training import train_on_batches
from buddy_routing.train.duo_plan import DuoPlan
from buddy_routing.train.example import Example, ExampleBatch, packed_batches
from buddy_routing.train.routed_paths import cost_per_conversation
from buddy_routing.train.router_training import (
    CALIBRATION_TOKENS,
    RouterLoss,
    blank_decision_module,
    fold_scaling,
    mean_and_spread,
)
from buddy_routing.train.training_state import run_name


class RandomMixes(nn.Module):
    """Scores of which each token has its own, and that mix the actions in all proportions, from mostly small FFNs to
    few of them."""

    router_id = "random"
    reroute_every = 1

    def __init__(self, actions: ActionSpace, device: torch.device) -> None:
        super().__init__()
        costs = actions.costs[actions.free[0]]
        # From equal scores for both FFNs to a big one worth three times as much per milli-layer.
        self._most = math.log(3 * costs[RUN] / costs[SMALL])
        self._count = len(actions.free)
        self.generator = torch.Generator(device)

    def scores(self, features: Tensor) -> Tensor:
        """[..., 2F] -> [..., C x 2]."""
        shape, device = features.shape[:-1], features.device
        drawn = torch.rand(*shape, self._count, 2, generator=self.generator, device=device)
        favour = torch.rand(*shape, 1, generator=self.generator, device=device) * self._most
        drawn[..., 0] *= favour.exp()
        return drawn.flatten(-2)


def train_duo(
    loaded: LoadedModel,
    examples: Callable[[], Iterator[Example]],
    plan: DuoPlan,
    num_steps: int,
    checkpoints: Path,
    log_directory: Path | None = None,
    data_name: str = "",
) -> tuple[DuoRouter, DuoConfig]:
    """Train in fp32; resumes from the two files in `checkpoints` if they exist. The same seed gives the same router.

    `examples` gives the same ones at every call. Raises what train_on_batches raises, and ValueError for small FFNs
    that the model cannot have.
    """
    small_ffns = new_small_ffns(loaded.model, plan.divisor)
    torch.manual_seed(plan.seed)
    adapter = add_adapter(loaded.model, plan.lora_rank) if plan.lora_rank else []
    model = loaded.model.with_small_ffns(small_ffns)
    trained = [*model.small_ffns.parameters(), *adapter]
    num_random = round(plan.random_share * num_steps)
    mixes = RandomMixes(model.spec.actions, model.inv_freq.device)
    router = DuoRouter(_new_decision_module(model, examples(), plan), small_ffns, "training")

    def train(name: str, by: Router, num_steps: int) -> None:
        def inputs_of(batch: ExampleBatch, seed: int) -> tuple[object, ...]:
            mixes.generator.manual_seed(seed ^ 1)  # Not that of the budgets.
            # A model that stays as it is has nothing to learn at full depth.
            highest = model.spec.num_layers - (0 if plan.lora_rank else 1)
            return batch, cost_per_conversation(batch.begins, model.spec.actions, plan.lowest_budget, highest, seed)

        train_on_batches(
            name,
            RouterLoss(model, by, trained, "cross_entropy" if plan.lora_rank else "distill", plan.route_block),
            inputs_of,
            lambda done: 1 - done,
            examples(),
            plan,
            num_steps,
            checkpoints / f"training_{name}.safetensors",
            run_name(loaded.fingerprint, data_name, plan, num_steps),
            model.inv_freq.device,
            log_directory,
            1.0,
        )

    train("random", mixes, num_random)
    train("router", router, num_steps - num_random)
    spec = model.spec
    config = DuoConfig(
        base_fingerprint=loaded.fingerprint,
        num_layers=spec.num_layers,
        kv_dim=spec.kv_dim,
        rank=plan.rank,
        small_ffn_size=spec.small_ffn_size,
        route_block=plan.route_block,
    )
    return router, config


def _new_decision_module(model: RoutedDecoder, examples: Iterator[Example], plan: DuoPlan) -> DecisionModule:
    """A module that scores every action by what it costs."""
    num_rows = max(1, CALIBRATION_TOKENS // plan.num_tokens)
    batch = next(packed_batches(examples, num_rows, plan.num_tokens, plan.seed)).to(model.inv_freq.device)
    features = causal_features(FirstLayer.of(model).v(batch.tokens), conversation_starts(batch.begins))
    actions = model.spec.actions
    decision = blank_decision_module(feature_dim(model.spec.kv_dim), actions.num_scores, plan.rank, plan.seed)
    costs = [cost / MILLI_LAYERS for layer in actions.free for cost in actions.costs[layer][RUN:]]
    with torch.no_grad():
        decision.up.bias.copy_(torch.tensor(costs))
    decision = decision.to(features.device)
    fold_scaling(decision, *mean_and_spread(features[batch.counted]))
    return decision
