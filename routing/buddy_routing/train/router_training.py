"""Trains a Decision Module on a finished model: at every budget, answer like the model at full depth.

By default the paths are chosen as in the server: prompts in route blocks, answers token by token, from causal features
(design section 2). The teacher is the frozen model itself at full depth, so that budget 1.0 remains the model. The
paper (arXiv 2606.09514, section 3) draws one path per example and learns the next token; both are available for
comparison.
"""

# B rows of examples, T tokens, V vocabulary, L layers, F width of one token's V

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from buddy_routing.adapter import add_adapter
from buddy_routing.checkpoint import LoadedModel
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.features import causal_features, feature_dim
from buddy_routing.first_layer import FirstLayer
from buddy_routing.prior import measure_prior
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router import DecisionModule, LearnedRouter, Router
from buddy_routing.router_config import FeatureKind, RouterConfig
from buddy_routing.train.batch_training import train_on_batches
from buddy_routing.train.example import Example, ExampleBatch, packed_batches
from buddy_routing.train.routed_paths import cost_per_conversation, routed_paths
from buddy_routing.train.router_plan import MaskKind, Objective, RouterPlan
from buddy_routing.train.training_state import run_name

CALIBRATION_TOKENS = 4096


class RouterLoss(nn.Module):
    """The training loss as a module, so that accelerate can wrap it. The router has gradients, and so do those
    parameters of the model that are `trained`, if any."""

    def __init__(
        self,
        model: RoutedDecoder,
        router: Router,
        trained: list[nn.Parameter],
        objective: Objective,
        route_block: int,
        masks: MaskKind = "served",
    ) -> None:
        super().__init__()
        self.router = router
        self.trained = nn.ParameterList(trained)
        # In a tuple, so that the frozen model is not a submodule: it is neither saved nor synchronised.
        self._model = (model,)
        self._objective, self._route_block, self._masks = objective, route_block, masks

    def forward(self, batch: ExampleBatch, max_cost: Tensor) -> Tensor:
        """Mean loss over the answers' tokens; `max_cost` [B, T] is the milli-layers of a token."""
        (model,) = self._model
        starts = conversation_starts(batch.begins)
        # Without answers, an example is one route block: one path for all tokens, from the last one's features.
        block, in_answer = self._route_block, batch.in_answer
        if self._masks == "example":
            block, in_answer = batch.tokens.shape[1], torch.zeros_like(batch.in_answer)
        choose = routed_paths(self.router, model.spec.actions, batch.begins, in_answer, max_cost, block)
        student = model.lm_head(model.dense(batch.tokens, choose, starts=starts)[batch.counted]).float()
        if self._objective == "cross_entropy":
            return F.cross_entropy(student, batch.tokens[batch.in_answer])
        with torch.no_grad():
            teacher = model.lm_head(model.dense(batch.tokens, starts=starts)[batch.counted]).float()
        return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def train_router(
    loaded: LoadedModel,
    examples: Iterator[Example],
    plan: RouterPlan,
    num_steps: int,
    checkpoint: Path,
    decision: DecisionModule | None = None,
    log_directory: Path | None = None,
    data_name: str = "",
) -> tuple[LearnedRouter, RouterConfig]:
    """Train a router, starting from `decision` if given; resumes from `checkpoint` if it exists.

    The same seed gives the same router. As train_on_batches; `data_name` identifies the examples. Raises
    OtherTrainingError for a checkpoint of another model, other data or another plan.
    """
    router = _new_router(loaded.model, examples, plan, decision)
    torch.manual_seed(plan.seed)
    adapter = add_adapter(loaded.model, plan.lora_rank) if plan.lora_rank else []
    spec = loaded.model.spec
    # A frozen model has nothing to learn at full depth.
    highest = spec.num_layers if plan.lora_rank else spec.num_layers - 1
    train_on_batches(
        "router",
        RouterLoss(loaded.model, router, adapter, plan.objective, plan.route_block, plan.masks),
        lambda batch, seed: (
            batch,
            cost_per_conversation(batch.begins, spec.actions, plan.lowest_budget, highest, seed),
        ),
        lambda done: 1 - done,
        examples,
        plan,
        num_steps,
        checkpoint,
        run_name(loaded.fingerprint, data_name, plan, num_steps),
        loaded.model.inv_freq.device,
        log_directory,
    )
    return router, config_of(loaded, plan)


def config_of(loaded: LoadedModel, plan: RouterPlan) -> RouterConfig:
    """The config of a router of this plan."""
    return RouterConfig(
        base_fingerprint=loaded.fingerprint,
        num_layers=loaded.model.spec.num_layers,
        kv_dim=loaded.model.spec.kv_dim,
        rank=plan.rank,
        prior=plan.prior,
        prior_weight=plan.prior_weight,
        route_block=plan.route_block,
        features=plan.features,
    )


def _new_router(
    model: RoutedDecoder, examples: Iterator[Example], plan: RouterPlan, decision: DecisionModule | None
) -> LearnedRouter:
    """A new router with a prior measured on the first examples, which this removes from the iterator."""
    device = model.inv_freq.device
    num_rows = max(1, CALIBRATION_TOKENS // plan.num_tokens)
    calibration = next(packed_batches(examples, num_rows, plan.num_tokens, plan.seed)).to(device)
    tqdm.write(f"measuring the prior ({plan.prior}) on {calibration.tokens.numel()} tokens", file=sys.stderr)
    prior = measure_prior(model, calibration.tokens, plan.prior, calibration.counted).to(device)
    if decision is None:
        starts = conversation_starts(calibration.begins)
        features = causal_features(FirstLayer.of(model).v(calibration.tokens), starts)[calibration.counted]
        decision = new_decision_module(model, features, plan.features, plan.rank, plan.seed)
    return LearnedRouter(decision, prior, plan.prior_weight, "training").to(device)


def new_decision_module(
    model: RoutedDecoder, features: Tensor, kind: FeatureKind, rank: int, seed: int
) -> DecisionModule:
    """A module that scores all layers equally, with mean and spread of features [N, 2F] folded into its first layer."""
    spec = model.spec
    decision = blank_decision_module(feature_dim(spec.kv_dim, kind), spec.actions.num_scores, rank, seed).to(
        features.device
    )
    features = features[:, : decision.down.in_features]
    fold_scaling(decision, *mean_and_spread(features))
    return decision


def blank_decision_module(num_features: int, num_scores: int, rank: int, seed: int) -> DecisionModule:
    """A module that scores everything equally."""
    torch.manual_seed(seed)
    decision = DecisionModule(num_features, num_scores, rank)
    nn.init.zeros_(decision.up.weight)
    nn.init.zeros_(decision.up.bias)
    return decision


def mean_and_spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of features [N, 2F]. The latter has a minimum, which keeps nearly constant features
    small: prompts end with the same token, whose V would otherwise be nothing but amplified rounding errors."""
    least = 0.05 * features.square().mean().sqrt()
    return features.mean(0), features.std(0).clamp_min(least)


def fold_scaling(decision: DecisionModule, mean: Tensor, spread: Tensor) -> None:
    """Turn a module for (features - mean) / spread into one for the unscaled features."""
    with torch.no_grad():
        decision.down.weight.div_(spread)
        decision.down.bias.sub_(decision.down.weight @ mean)


def weighted_sum(modules: Sequence[DecisionModule], weights: Sequence[float]) -> DecisionModule:
    """One module with the hidden units of all, whose output is the weighted sum of theirs."""
    down = torch.cat([module.down.weight for module in modules])
    whole = DecisionModule(down.shape[1], modules[0].up.out_features, len(down)).to(down.device)
    weighted = list(zip(modules, weights, strict=True))
    with torch.no_grad():
        whole.down.weight.copy_(down)
        whole.down.bias.copy_(torch.cat([module.down.bias for module in modules]))
        whole.up.weight.copy_(torch.cat([weight * module.up.weight for module, weight in weighted], 1))
        whole.up.bias.copy_(torch.stack([weight * module.up.bias for module, weight in weighted]).sum(0))
    return whole
