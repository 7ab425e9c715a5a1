"""The Budget Predictor: what it may choose, and that its training follows the reward."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch

from buddy_routing.artifact import load_predictor, save_predictor
from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.router_config import ArtifactError, RouterConfig
from buddy_routing.train.answer_loss import prompt_features
from buddy_routing.train.depth_rewards import DepthRewards
from buddy_routing.train.example import Example, packed_in_order
from buddy_routing.train.predictor_plan import PredictorPlan
from buddy_routing.train.predictor_training import fit_policy, train_predictor
from buddy_routing.train.router_training import mean_and_spread
from buddy_routing.train.training_state import OtherTrainingError
from tiny_models import SHAPE, save_random_model

NUM_LAYERS: int = SHAPE["num_hidden_layers"]
EXAMPLES = [Example(tuple(range(n, n + 14)), 7) for n in range(1, 60)]
PLAN = PredictorPlan(num_batches=6, num_steps=60, num_rows=2, num_tokens=64, rank=4)


def predictor(num_features: int = 10) -> BudgetPredictor:
    torch.manual_seed(0)
    return BudgetPredictor(num_features, NUM_LAYERS, 4)


@pytest.mark.parametrize(("lowest", "highest"), [(2, 6), (3, 3), (4, 5), (6, 6)])
def test_choice_stays_within_the_bounds(lowest: int, highest: int) -> None:
    chosen = predictor().choose(torch.randn(50, 10), lowest, highest)
    assert chosen.min() >= lowest
    assert chosen.max() <= highest


def test_two_layers_are_taken_when_nothing_else_is_allowed() -> None:
    assert predictor().choose(torch.randn(3, 10), 2, 2).tolist() == [2, 2, 2]


def test_thrift_makes_it_cheaper_until_it_is_as_cheap_as_can_be() -> None:
    features = torch.randn(200, 10)
    depths = [
        predictor().choose(features, 2, NUM_LAYERS, cost_weight).float().mean() for cost_weight in (0, 0.2, 1, 100)
    ]
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] == 3


@pytest.fixture
def model(tmp_path: Path) -> RoutedDecoder:
    save_random_model("llama", tmp_path)
    return load_model(tmp_path, torch.float32, torch.device("cpu")).model


def trained(model: RoutedDecoder, plan: PredictorPlan, directory: Path, examples: Iterator[Example]) -> BudgetPredictor:
    torch.manual_seed(0)
    decision = DecisionModule(2 * model.spec.kv_dim, NUM_LAYERS - 2, 4)
    router = LearnedRouter(decision, torch.zeros(NUM_LAYERS - 2), 0.0, "test")
    return train_predictor(model, router, 16, examples, plan, directory / "state.safetensors")


@pytest.mark.parametrize(("cost_weight", "depth"), [(1e4, 3), (-1e4, NUM_LAYERS)])
def test_training_goes_where_the_reward_is(
    model: RoutedDecoder, cost_weight: float, depth: int, tmp_path: Path
) -> None:
    plan = replace(PLAN, cost_weight=cost_weight, num_steps=400, learning_rate=0.01)
    learnt = trained(model, plan, tmp_path, cycle(EXAMPLES))
    (batch,) = packed_in_order(EXAMPLES, 30, 64)
    assert set(learnt.choose(prompt_features(model, batch), 2, NUM_LAYERS).tolist()) == {depth}


def test_policy_spends_depth_where_answers_need_it() -> None:
    torch.manual_seed(0)
    is_hard = torch.arange(200) % 2 == 0
    features = torch.randn(200, 10) + 3 * is_hard[:, None]
    levels = tuple(range(3, NUM_LAYERS + 1))
    gain = torch.linspace(-9, 0, len(levels))
    rewards = DepthRewards(features, torch.where(is_hard[:, None], gain, 0.01 * gain), levels)
    learnt = predictor()
    fit_policy(learnt, rewards, replace(PLAN, num_steps=300, learning_rate=0.02))
    chosen = learnt.choose(features, 2, NUM_LAYERS)
    assert chosen[is_hard].float().mean() > NUM_LAYERS - 0.5
    assert chosen[~is_hard].float().mean() < 3.5


def test_a_feature_that_never_varied_in_training_is_not_made_of_rounding() -> None:
    # All prompts end with the same token, whose V the server computes in another precision than training.
    features = torch.cat((torch.randn(200, 4), torch.full((200, 4), 0.3)), 1)
    mean, spread = mean_and_spread(features)
    rounded = features.bfloat16().float()
    assert ((rounded - features) / spread).abs().max() < 0.05
    torch.testing.assert_close(((features - mean) / spread)[:, :4].std(0), torch.ones(4))


def test_interrupted_measuring_goes_on_and_gives_the_same_predictor(model: RoutedDecoder, tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = trained(model, PLAN, tmp_path / "whole", cycle(EXAMPLES))
    # Every batch is saved; the sixth was under way when the process ended.
    five = trained(model, replace(PLAN, num_batches=5), tmp_path / "parts", cycle(EXAMPLES))
    resumed = trained(model, PLAN, tmp_path / "parts", cycle(EXAMPLES))
    features = torch.randn(20, 2 * model.spec.kv_dim)
    assert torch.equal(resumed.log_probabilities(features), whole.log_probabilities(features))
    fewer = trained(model, replace(PLAN, num_batches=5), tmp_path / "parts", cycle(EXAMPLES))
    assert torch.equal(fewer.log_probabilities(features), five.log_probabilities(features))
    with pytest.raises(OtherTrainingError, match="other data"):
        trained(model, replace(PLAN, num_tokens=32), tmp_path / "parts", cycle(EXAMPLES))


def test_it_is_saved_beside_its_router_and_loaded_again(model: RoutedDecoder, tmp_path: Path) -> None:
    config = RouterConfig("abc", NUM_LAYERS, model.spec.kv_dim, 4, "ppl", 0.1)
    assert load_predictor(tmp_path, config, torch.device("cpu")) is None
    saved = predictor(2 * model.spec.kv_dim)
    save_predictor(tmp_path, saved)
    loaded = load_predictor(tmp_path, config, torch.device("cpu"))
    features = torch.randn(5, 2 * model.spec.kv_dim)
    assert loaded is not None
    assert torch.equal(loaded.log_probabilities(features), saved.log_probabilities(features))
    with pytest.raises(ArtifactError, match="features"):
        load_predictor(tmp_path, replace(config, kv_dim=5), torch.device("cpu"))
