"""Trains a Budget Predictor by GRPO, model and router frozen (arXiv 2606.09514, section 3.5).

Each example is answered at several budgets drawn from the policy; a budget whose reward is above the group's mean
becomes likelier. The paper's weights (5.0 and 0.05) left its policy at the entropy of a uniform one.
"""

# B rows of examples, T tokens, E examples in a batch, G budgets a group, L layers

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from buddy_routing.budget import num_run_layers, smallest_budget
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.router import LearnedRouter
from buddy_routing.train.answer_loss import answer_loss, example_of_token, prompt_features
from buddy_routing.train.example import Example, ExampleBatch, packed_batches
from buddy_routing.train.predictor_plan import PredictorPlan
from buddy_routing.train.routed_paths import routed_paths
from buddy_routing.train.router_training import new_decision_module
from buddy_routing.train.training_state import load_training_state, run_name, save_training_state

CHECKPOINT_EVERY = 50
EPS = 1e-6
LOWEST_LOG_PI = -1e4
"""For -inf, whose product with a probability of 0 is no number."""


def train_predictor(
    model: RoutedDecoder,
    router: LearnedRouter,
    route_block: int,
    examples: Iterator[Example],
    plan: PredictorPlan,
    checkpoint: Path,
    data_name: str = "",
) -> BudgetPredictor:
    """Resumes from `checkpoint` when it exists. The same seed gives the same predictor; `data_name` tells examples from
    others. Raises OtherTrainingError for a checkpoint of another router, other data or another plan."""
    device = model.inv_freq.device
    torch.manual_seed(plan.seed)
    batches = packed_batches(examples, plan.num_rows, plan.num_tokens, plan.seed)
    first = next(batches).to(device)
    features, num_layers = prompt_features(model, first), model.spec.num_layers
    lowest = num_run_layers(max(plan.lowest_budget, smallest_budget(num_layers)), num_layers)
    predictor = BudgetPredictor(features.shape[1], num_layers, plan.rank, lowest).to(device)
    predictor.policy = new_decision_module(model, features, "mean_v+newest_v", plan.rank, plan.seed)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    run = run_name(router.router_id, data_name, plan)
    start = load_training_state(checkpoint, predictor, [optimizer], run)
    todo = islice(batches, start, plan.num_steps)
    bar = tqdm(todo, initial=start, total=plan.num_steps, desc="predictor", unit="step", mininterval=5)
    for step, host_batch in enumerate(bar, start + 1):
        batch = host_batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * (1 - (step - 1) / plan.num_steps)
        generator = torch.Generator(device).manual_seed(plan.seed * 1_000_003 + step)
        log_pi = predictor.log_probabilities(prompt_features(model, batch))  # [E, L - 2]
        actions = torch.multinomial(log_pi.detach().exp(), plan.group, replacement=True, generator=generator)  # [E, G]
        rewards = reward(model, router, route_block, batch, predictor.levels[actions], plan)
        advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + EPS)
        entropy = -(log_pi.exp() * log_pi.clamp_min(LOWEST_LOG_PI)).sum(-1).mean()
        loss = -(advantage * log_pi.gather(1, actions)).mean() - plan.entropy_weight * entropy
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        depth = predictor.levels[actions].float().mean().item() / num_layers
        bar.set_postfix(entropy=f"{entropy.item():.2f}", depth=f"{depth:.2f}", refresh=False)
        if step % CHECKPOINT_EVERY == 0:
            save_training_state(checkpoint, predictor, [optimizer], step, run)
    return predictor


def reward(
    model: RoutedDecoder,
    router: LearnedRouter,
    route_block: int,
    batch: ExampleBatch,
    num_run: Tensor,
    plan: PredictorPlan,
) -> Tensor:
    """[E, G]: -quality_weight x cross-entropy - cost_weight x depth of every example at budgets num_run [E, G]."""
    example = example_of_token(batch)  # [B, T]
    nats = []
    for tried in num_run.T:
        # Padding belongs to no example; what it runs does not matter.
        layers = torch.cat((tried, tried[:1]))[example]
        choose = routed_paths(router, batch.begins, batch.in_answer, layers, route_block)
        nats.append(answer_loss(model, batch, choose).nats)
    return -plan.quality_weight * torch.stack(nats, 1) - plan.cost_weight * num_run / model.spec.num_layers
