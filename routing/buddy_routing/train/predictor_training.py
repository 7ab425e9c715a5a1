"""Trains a Budget Predictor on right and wrong answers, with model and router frozen.

With model and router frozen, whether an answer is right at a depth never changes. So every example is measured once at
every depth, and the predictor learns from the table. The paper samples depths and learns from their rewards by GRPO
(arXiv 2606.09514, section 3.5); its weights left the policy at the entropy of a uniform one.

The choice depends on differences between depths, which are much smaller than those between prompts, and noisy. So the
loss is the squared error, which confident mistakes do not dominate, features are dropped at random, and the predictor
is the mean of several networks, each of which stops when it gets worse on a fold of the examples that it does not see.
"""

# E examples, K depths, F width of one token's V

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.exits import ExitRouter
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.train.depth_table import DepthTable, measure_depth_table
from buddy_routing.train.example import Example, packed_batches
from buddy_routing.train.predictor_plan import PredictorPlan
from buddy_routing.train.router_training import blank_decision_module, fold_scaling, mean_and_spread, weighted_sum
from buddy_routing.train.training_state import run_name

NUM_MEMBERS = 4
NUM_FOLDS = 6
EXAMPLES_A_STEP = 128
MOST_EPOCHS = 60
PATIENCE = 6
"""Epochs without improvement after which a member stops."""
DROPOUT = 0.3
WEIGHT_DECAY = 0.01


def train_predictor(
    model: RoutedDecoder,
    router: LearnedRouter | ExitRouter,
    route_block: int,
    examples: Iterator[Example],
    plan: PredictorPlan,
    checkpoint: Path,
    data_name: str = "",
) -> BudgetPredictor:
    """Resumes from `checkpoint` if it exists. The same seed gives the same predictor; `data_name` identifies the
    examples. Exits are those of `model`. Raises OtherTrainingError for a checkpoint of another router, other data or
    other depths."""
    actions = model.spec.actions
    lowest = actions.max_cost(max(plan.lowest_budget, actions.smallest_budget))
    depths = tuple(depth for depth in actions.depths if depth >= lowest)
    # Excludes the settings of the predictor's own training, so that it can be retried without measuring again.
    run = run_name(router.router_id, data_name, depths, route_block, plan.num_rows, plan.num_tokens, plan.seed)
    batches = packed_batches(examples, plan.num_rows, plan.num_tokens, plan.seed)
    table = measure_depth_table(model, router, route_block, batches, depths, plan.num_batches, checkpoint, run)
    return fit_predictor(table, depths, plan)


def fit_predictor(table: DepthTable, depths: tuple[int, ...], plan: PredictorPlan) -> BudgetPredictor:
    """The predictor of a table's quality."""
    mean, spread = mean_and_spread(table.features)
    # Scaled outside the networks, so that their first layers learn as fast as their second ones.
    scaled = DepthTable((table.features - mean) / spread, table.quality)
    drawn = torch.randperm(len(table.quality), generator=torch.Generator().manual_seed(plan.seed))
    fold_of = drawn.to(mean.device) % NUM_FOLDS  # [E]
    bar = tqdm(range(NUM_MEMBERS), desc="predictor", unit="network", mininterval=2)
    members = [_member(scaled, fold_of == number, plan, plan.seed + number) for number in bar]
    predictor = BudgetPredictor(table.features.shape[1], depths, NUM_MEMBERS * plan.rank, plan.cost_weight)
    predictor.estimator = weighted_sum(members, [1 / NUM_MEMBERS] * NUM_MEMBERS)
    fold_scaling(predictor.estimator, mean, spread)
    return predictor.to(mean.device)


def _member(table: DepthTable, held_out: Tensor, plan: PredictorPlan, seed: int) -> DecisionModule:
    """A network trained on the examples that are not `held_out` [E], as it was when it was best on those that are."""
    features, quality = table.features, table.quality
    shown, unseen = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    member = blank_decision_module(features.shape[1], quality.shape[1], plan.rank, seed).to(features.device)
    with torch.no_grad():
        member.up.bias.copy_(quality.mean(0))
    optimizer = torch.optim.AdamW(member.parameters(), lr=plan.learning_rate, weight_decay=WEIGHT_DECAY)
    best, best_epoch, state = float("inf"), 0, member.state_dict()
    for epoch in range(MOST_EPOCHS):
        for step in shown[torch.randperm(len(shown)).to(shown.device)].split(EXAMPLES_A_STEP):
            loss = F.mse_loss(member(F.dropout(features[step], DROPOUT)), quality[step])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            error = F.mse_loss(member(features[unseen]), quality[unseen]).item()
        if error < best:
            best, best_epoch = error, epoch
            state = {name: tensor.clone() for name, tensor in member.state_dict().items()}
        elif epoch - best_epoch == PATIENCE:
            break
    member.load_state_dict(state)
    return member
