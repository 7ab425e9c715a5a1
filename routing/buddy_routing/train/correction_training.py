"""Corrects a router's scores by what variations of its paths did to answers, with model and router frozen.

Training by distillation rates each layer by what it adds to the path as it is, and leaves the scores nearly tied. Here
random variations of the path are measured, and the sum of the scores of the layers that run is fitted to how well each
does, by least squares. The correction is a Decision Module of its own, added to the router's, so that the result is a
router like any other, of a greater rank.
"""

# N tokens before which an answer's tokens come, K budgets, P paths at a budget, C free layers, F width of one token's V

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from buddy_routing.action_space import MILLI_LAYERS, ActionSpace
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.train.correction_plan import CorrectionPlan
from buddy_routing.train.example import Example, packed_batches
from buddy_routing.train.path_table import PathTable, measure_path_table
from buddy_routing.train.router_training import blank_decision_module, fold_scaling, mean_and_spread, weighted_sum
from buddy_routing.train.training_state import run_name

NUM_FOLDS = 6
"""One of them is held out, to see whether a correction is worth having; the one that is kept is fitted to all."""
NUM_EPOCHS = 8
TOKENS_A_STEP = 1024
WEIGHT_DECAY = 1e-3
LEAST_NATS, MOST_NATS = 1e-5, 2.0
"""Below and above, it makes no difference how far a token is from full depth."""
DISCOUNT = 0.95
"""Weight of the next token's loss in what a path costs: it reads the keys and values that the path left."""


def train_correction(
    model: RoutedDecoder,
    router: LearnedRouter,
    route_block: int,
    examples: Iterator[Example],
    plan: CorrectionPlan,
    checkpoint: Path,
    data_name: str = "",
) -> LearnedRouter:
    """The corrected router. Resumes from `checkpoint` if it exists. The same seed gives the same router; `data_name`
    identifies the examples.

    Raises OtherTrainingError for a checkpoint of another router, other data or other paths; ValueError for budgets that
    leave no choice of layers, and for too few examples.
    """
    max_costs = tuple(_max_cost(model.spec.actions, budget) for budget in plan.budgets)
    # Excludes the settings of the fit, so that it can be retried without measuring again.
    measured = (max_costs, route_block, plan.num_variations, plan.num_rows, plan.num_tokens, plan.seed)
    run = run_name(router.router_id, data_name, *measured)
    batches = packed_batches(examples, plan.num_rows, plan.num_tokens, plan.seed)
    table = measure_path_table(model, router, route_block, batches, max_costs, plan, checkpoint, run)
    return fit_correction(router, table, plan)


def _max_cost(actions: ActionSpace, budget: float) -> int:
    """The milli-layers of a token at `budget`. Raises ValueError if all paths are the same there."""
    max_cost = actions.max_cost(budget)
    if not actions.smallest_cost < max_cost < actions.full_cost:
        num_layers = actions.num_layers
        raise ValueError(
            f"budget {budget:g} pays for {max_cost // MILLI_LAYERS} of {num_layers} layers, where there is nothing to "
            f"choose; allowed are budgets that pay for {actions.smallest_cost // MILLI_LAYERS + 1} to {num_layers - 1}"
        )
    return max_cost


def fit_correction(router: LearnedRouter, table: PathTable, plan: CorrectionPlan) -> LearnedRouter:
    """The router whose scores are those of `router`, scaled, plus a correction.

    Raises ValueError for a table of fewer than NUM_FOLDS examples, or of too few to predict other examples from.
    """
    unseen = _held_out(table.is_last, plan.seed)
    before = _correlation(router, _part(table, unseen))
    after = _correlation(_corrected(router, _part(table, ~unseen), plan), _part(table, unseen))
    told = f"on examples held out, the scores' correlation with what paths gain goes from {before:.3f} to {after:.3f}"
    if after <= before:
        raise ValueError(f"{told}: too few examples or variations were measured for a correction")
    tqdm.write(told, file=sys.stderr)
    return _corrected(router, table, plan)


def path_gains(table: PathTable) -> Tensor:
    """[N, K, P]: how much better a token's path is than the mean of its paths at that budget, in standard deviations of
    the budget. Counts the roots of the nats of this token and, discounted, of those after it in the answer."""
    costs = table.nats.clamp(LEAST_NATS, MOST_NATS).sqrt()
    is_last = table.is_last.tolist()
    for token in reversed(range(len(costs) - 1)):
        if not is_last[token]:
            costs[token] += DISCOUNT * costs[token + 1]
    gains = costs.mean(-1, keepdim=True) - costs
    return gains / gains.square().mean((0, 2), keepdim=True).sqrt().clamp_min(1e-12)


def _held_out(is_last: Tensor, seed: int) -> Tensor:
    """[N] bool: the tokens of one fold of the examples."""
    num_examples = int(is_last.sum())
    if num_examples < NUM_FOLDS:
        raise ValueError(f"there are {num_examples} examples to learn from, allowed are {NUM_FOLDS} or more")
    drawn = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed)) % NUM_FOLDS
    example = is_last.cumsum(0) - is_last.long()  # [N]
    return drawn.to(is_last.device)[example] == 0


def _part(table: PathTable, tokens: Tensor) -> PathTable:
    """The rows of whole examples; `tokens` [N] bool."""
    return PathTable(table.features[tokens], table.is_last[tokens], table.runs[tokens], table.nats[tokens])


@torch.no_grad()
def _correlation(router: LearnedRouter, table: PathTable) -> float:
    """Between the sums of the scores of the layers that a path runs and what it gains."""
    sums, gains = _sums_of_scores(router.scores(table.features), table.runs), path_gains(table)
    return float(F.cosine_similarity(sums.flatten(), gains.flatten(), dim=0))


def _corrected(router: LearnedRouter, table: PathTable, plan: CorrectionPlan) -> LearnedRouter:
    """The router with a correction fitted to all of the table."""
    gains = path_gains(table)
    with torch.no_grad():
        own = _sums_of_scores(router.scores(table.features), table.runs)
    # A router that has learnt nothing yet scores all layers equally.
    scale = float((own * gains).sum() / own.square().sum().clamp_min(1e-12))
    correction = _fitted(table, gains - scale * own, router.decision.down.in_features, plan)
    whole = weighted_sum([router.decision, correction], [scale, 1.0])
    return LearnedRouter(whole, router.prior, scale * router.prior_weight, "training", router.reroute_every)


def _fitted(table: PathTable, rest: Tensor, num_features: int, plan: CorrectionPlan) -> DecisionModule:
    """The module whose scores predict `rest` [N, K, P], gains that the router does not predict."""
    features = table.features[:, :num_features]
    mean, spread = mean_and_spread(features)
    # Scaled outside the module, so that its first layer learns as fast as its second one.
    features = (features - mean) / spread
    correction = blank_decision_module(num_features, table.runs.shape[-1], plan.rank, plan.seed).to(features.device)
    optimizer = torch.optim.AdamW(correction.parameters(), lr=plan.learning_rate, weight_decay=WEIGHT_DECAY)
    num_steps = NUM_EPOCHS * -(-len(rest) // TOKENS_A_STEP)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    for _ in tqdm(range(NUM_EPOCHS), desc="correction", unit="epoch", mininterval=2):
        for step in torch.randperm(len(rest)).to(rest.device).split(TOKENS_A_STEP):
            loss = F.mse_loss(_sums_of_scores(correction(features[step]), table.runs[step]), rest[step])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    fold_scaling(correction, mean, spread)
    return correction


def _sums_of_scores(scores: Tensor, runs: Tensor) -> Tensor:
    """[N, K, P]: the scores [N, C] of the layers that run [N, K, P, C], less the mean of the paths at that budget."""
    of_chunks = zip(scores.split(TOKENS_A_STEP), runs.split(TOKENS_A_STEP), strict=True)
    sums = torch.cat([torch.einsum("nc,nkpc->nkp", of_tokens, ran.float()) for of_tokens, ran in of_chunks])
    return sums - sums.mean(-1, keepdim=True)
