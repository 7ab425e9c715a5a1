"""Trains a Budget Predictor by GRPO, with model and router frozen (arXiv 2606.09514, section 3.5).

Each example is tried at several depths drawn from the policy; a depth with a reward above the group's mean becomes
likelier. Two things differ from the paper. With model and router frozen, a reward never changes, so every depth is
measured once and the policy learns from the table. And the reward is the likelihood of the whole answer, not the mean
over its tokens: one wrong token makes a sum wrong, however certain the others are. The paper's weights (5.0 x mean
cross-entropy, 0.05 x depth) left its policy at the entropy of a uniform one.
"""

# E examples, B of them in a step, G depths a group, L layers, F width of one token's V

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.router import LearnedRouter
from buddy_routing.train.depth_rewards import DepthRewards, measure_depth_rewards
from buddy_routing.train.example import Example, packed_batches
from buddy_routing.train.predictor_plan import PredictorPlan
from buddy_routing.train.router_training import blank_decision_module, fold_scaling, mean_and_spread
from buddy_routing.train.training_state import run_name

EXAMPLES_A_STEP = 64
EPS = 1e-6
LOWEST_LOG_PI = -1e4
"""Replaces -inf, whose product with a probability of 0 is NaN."""


def train_predictor(
    model: RoutedDecoder,
    router: LearnedRouter,
    route_block: int,
    examples: Iterator[Example],
    plan: PredictorPlan,
    checkpoint: Path,
    data_name: str = "",
) -> BudgetPredictor:
    """Resumes from `checkpoint` if it exists. The same seed gives the same predictor; `data_name` identifies the
    examples. Raises OtherTrainingError for a checkpoint of another router, other data or other rewards."""
    num_layers = model.spec.num_layers
    actions = model.spec.actions
    lowest = actions.max_cost(max(plan.lowest_budget, actions.smallest_budget)) // MILLI_LAYERS
    predictor = BudgetPredictor(2 * model.spec.kv_dim, num_layers, plan.rank, lowest)
    levels = tuple(level for level in predictor.levels.tolist() if level >= lowest)
    # Excludes the settings of the policy's own training, so that it can be retried without measuring again.
    run = run_name(router.router_id, data_name, levels, route_block, plan.num_rows, plan.num_tokens, plan.seed)
    batches = packed_batches(examples, plan.num_rows, plan.num_tokens, plan.seed)
    rewards = measure_depth_rewards(model, router, route_block, batches, levels, plan.num_batches, checkpoint, run)
    mean, spread = mean_and_spread(rewards.features)
    predictor.policy = blank_decision_module(2 * model.spec.kv_dim, len(predictor.levels), plan.rank, plan.seed)
    predictor = predictor.to(mean.device)
    # Scaled outside the policy, so that its first layer learns as fast as its second.
    fit_policy(predictor, replace(rewards, features=(rewards.features - mean) / spread), plan)
    fold_scaling(predictor.policy, mean, spread)
    return predictor


def fit_policy(predictor: BudgetPredictor, rewards: DepthRewards, plan: PredictorPlan) -> None:
    """GRPO on measured rewards: log likelihood - cost_weight x depth."""
    features = rewards.features
    generator = torch.Generator(features.device).manual_seed(plan.seed)
    reward = _reward_table(predictor, rewards, plan.cost_weight)  # [E, L - 2]
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    bar = tqdm(range(plan.num_steps), desc="predictor", unit="step", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * (1 - step / plan.num_steps)
        shown = torch.randint(len(features), (EXAMPLES_A_STEP,), generator=generator, device=features.device)
        log_pi = predictor.log_probabilities(features[shown])  # [B, L - 2]
        actions = torch.multinomial(log_pi.detach().exp(), plan.group, replacement=True, generator=generator)  # [B, G]
        gained = reward[shown].gather(1, actions)
        advantage = (gained - gained.mean(1, keepdim=True)) / (gained.std(1, keepdim=True) + EPS)
        entropy = -(log_pi.exp() * log_pi.clamp_min(LOWEST_LOG_PI)).sum(-1).mean()
        loss = -(advantage * log_pi.gather(1, actions)).mean() - plan.entropy_weight * entropy
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        depth = predictor.levels[actions].float().mean().item() / predictor.num_layers
        bar.set_postfix(entropy=f"{entropy.item():.2f}", depth=f"{depth:.2f}", refresh=False)


def _reward_table(predictor: BudgetPredictor, rewards: DepthRewards, cost_weight: float) -> Tensor:
    """[E, C]: the reward of every choice; 0 for choices that are never taken."""
    table = rewards.log_likelihood.new_zeros(len(rewards.features), len(predictor.levels))
    levels = torch.tensor(rewards.levels, device=table.device)
    columns = levels - int(predictor.levels[0])
    table[:, columns] = rewards.log_likelihood - cost_weight * levels / predictor.num_layers
    return table
