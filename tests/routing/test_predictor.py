"""The Budget Predictor: what it may choose, what it learns from, and that it learns it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch

from buddy_routing.action_space import ActionSpace
from buddy_routing.artifact import load_predictor, save_predictor
from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import Exit, RoutedDecoder
from buddy_routing.duo import DuoRouter, new_small_ffns
from buddy_routing.exits import ExitRouter, new_exits
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.router_config import ArtifactError
from buddy_routing.train.answer_loss import answer_loss, fixed_paths
from buddy_routing.train.depth_table import DepthTable, measure_depth_table
from buddy_routing.train.example import Example, packed_in_order
from buddy_routing.train.predictor_plan import PredictorPlan
from buddy_routing.train.predictor_training import fit_predictor, train_predictor
from buddy_routing.train.router_training import mean_and_spread
from buddy_routing.train.training_state import OtherTrainingError
from tiny_models import SHAPE, save_random_model

CPU = torch.device("cpu")
NUM_LAYERS: int = SHAPE["num_hidden_layers"]
ACTIONS = ActionSpace.skip_or_run(NUM_LAYERS)
EXITS = (1, 3)
EXAMPLES = [Example(tuple(range(n, n + 14)), 7) for n in range(1, 60)]
PLAN = PredictorPlan(num_batches=6, num_rows=2, num_tokens=64, rank=4)


def predictor(num_features: int = 10, depths: Sequence[int] = ACTIONS.depths) -> BudgetPredictor:
    torch.manual_seed(0)
    return BudgetPredictor(num_features, depths, 4)


@pytest.mark.parametrize(("lowest", "highest"), [(2000, 6000), (3000, 3000), (3500, 5999), (6000, 6000)])
def test_choice_is_a_depth_within_the_bounds(lowest: int, highest: int) -> None:
    chosen = predictor().choose(torch.randn(50, 10), lowest, highest)
    assert {lowest <= depth <= highest and depth in ACTIONS.depths for depth in chosen.tolist()} == {True}


def test_highest_is_taken_when_no_depth_is_allowed() -> None:
    assert predictor(depths=(4000, 6000)).choose(torch.randn(3, 10), 2000, 3500).tolist() == [3500] * 3


def test_thrift_makes_it_cheaper_until_it_is_as_cheap_as_can_be() -> None:
    features = torch.randn(200, 10)
    chosen = [predictor().choose(features, 2000, 6000, weight).float().mean() for weight in (0, 0.2, 1, 100)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] == 2000
    thrifty = predictor()
    thrifty.cost_weight.fill_(0.2)
    assert thrifty.choose(features, 2000, 6000).float().mean() == chosen[1]


@pytest.fixture
def model(tmp_path: Path) -> RoutedDecoder:
    save_random_model("llama", tmp_path)
    return load_model(tmp_path, torch.float32, CPU).model


def random_router(model: RoutedDecoder) -> LearnedRouter:
    torch.manual_seed(0)
    decision = DecisionModule(2 * model.spec.kv_dim, NUM_LAYERS - 2, 4)
    return LearnedRouter(decision, torch.zeros(NUM_LAYERS - 2), 0.0, "test")


def random_exits(model: RoutedDecoder) -> dict[int, Exit]:
    return {exit_: module.requires_grad_(False) for exit_, module in new_exits(model, EXITS).items()}


def answered_by(model: RoutedDecoder, example: Example) -> Example:
    """The example with the answer that the model gives at full depth."""
    ids = list(example.ids[: example.num_prompt])
    while len(ids) < len(example.ids):
        ids.append(int(model.lm_head(model.dense(torch.tensor([ids])))[0, -1].argmax()))
    return Example(tuple(ids), example.num_prompt)


def test_quality_is_whether_an_answer_is_right_or_else_how_much_of_it_is(model: RoutedDecoder, tmp_path: Path) -> None:
    examples = [*(answered_by(model, example) for example in EXAMPLES[:5]), *EXAMPLES[5:8]]
    batches = packed_in_order(examples, 8, 64)
    path = tmp_path / "state.safetensors"
    table = measure_depth_table(model, random_router(model), 16, batches, ACTIONS.depths, 1, path, "run")
    assert table.quality.shape == (8, len(ACTIONS.depths))
    assert table.quality[:5, -1].tolist() == [1] * 5
    assert set(table.quality[:5].flatten().tolist()) <= {0, 1}
    never_right = table.quality[5:]
    assert never_right.max() < 1
    torch.testing.assert_close(never_right * 7, (never_right * 7).round())


def test_exits_are_measured_in_one_pass_as_the_model_leaves_there(model: RoutedDecoder, tmp_path: Path) -> None:
    exits = random_exits(model)
    with_exits = model.with_exits(exits)
    examples = [answered_by(model, example) for example in EXAMPLES[:6]]
    (batch,) = packed_in_order(examples, 8, 64)
    depths = with_exits.spec.actions.depths
    assert depths == (2000, 4000, 6000)
    path = tmp_path / "state.safetensors"
    table = measure_depth_table(with_exits, ExitRouter(exits, "test"), 16, iter([batch]), depths, 1, path, "run")
    assert table.quality[:, -1].tolist() == [1] * 6
    # An untrained exit after one layer is the last layer.
    path_of_exit = torch.tensor([True, *[False] * (NUM_LAYERS - 2), True]).expand(6, -1)
    exits[1].norm.load_state_dict(model.norm.state_dict())
    path.unlink()
    again = measure_depth_table(with_exits, ExitRouter(exits, "test"), 16, iter([batch]), depths, 1, path, "run")
    assert again.quality[:, 0].tolist() == answer_loss(model, batch, fixed_paths(batch, path_of_exit)).is_right.tolist()


def trained(model: RoutedDecoder, plan: PredictorPlan, directory: Path, examples: Iterator[Example]) -> BudgetPredictor:
    return train_predictor(model, random_router(model), 16, examples, plan, directory / "state.safetensors")


def test_predictor_spends_depth_where_answers_need_it_and_pays() -> None:
    torch.manual_seed(0)
    kind = torch.arange(600) % 3
    features = torch.randn(600, 12) + 3 * torch.nn.functional.one_hot(kind, 3).repeat(1, 4)
    needs_all = torch.tensor([0, 0, 0, 0, 1.0])
    quality = torch.stack([torch.ones(5), torch.zeros(5), needs_all])[kind]
    learnt = fit_predictor(DepthTable(features, quality), ACTIONS.depths, replace(PLAN, rank=16, cost_weight=0.4))
    chosen = learnt.choose(features, 2000, 6000).float()
    for number, depth in enumerate((2000, 2000, 6000)):
        assert (chosen[kind == number] == depth).float().mean() > 0.95
    assert set(learnt.choose(features, 2000, 6000, cost_weight=2.0).tolist()) == {2000}
    assert (learnt.quality(features) - quality).abs().mean() < 0.1


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
    assert torch.equal(resumed.quality(features), whole.quality(features))
    fewer = trained(model, replace(PLAN, num_batches=5), tmp_path / "parts", cycle(EXAMPLES))
    assert torch.equal(fewer.quality(features), five.quality(features))
    with pytest.raises(OtherTrainingError, match="other data"):
        trained(model, replace(PLAN, num_tokens=32), tmp_path / "parts", cycle(EXAMPLES))


def test_small_ffns_are_chosen_for_in_whole_layers(model: RoutedDecoder, tmp_path: Path) -> None:
    small_ffns = new_small_ffns(model, 4)
    with_small = model.with_small_ffns(small_ffns)
    torch.manual_seed(0)
    decision = DecisionModule(2 * model.spec.kv_dim, with_small.spec.actions.num_scores, 4)
    router = DuoRouter(decision, small_ffns, "test")
    plan = replace(PLAN, num_batches=1)
    learnt = train_predictor(with_small, router, 16, iter(EXAMPLES), plan, tmp_path / "state.safetensors")
    assert learnt.depths.tolist() == [3000, 4000, 5000, 6000]
    save_predictor(tmp_path, learnt)
    assert load_predictor(tmp_path, with_small.spec.actions, model.spec.kv_dim, CPU) is not None


def test_smallest_budget_of_a_training_is_the_smallest_that_is_chosen(model: RoutedDecoder, tmp_path: Path) -> None:
    learnt = trained(model, replace(PLAN, num_batches=1, lowest_budget=0.7), tmp_path, iter(EXAMPLES))
    assert learnt.depths.tolist() == [4000, 5000, 6000]
    assert float(learnt.cost_weight) == pytest.approx(PLAN.cost_weight)


def test_it_is_saved_beside_what_it_chooses_for_and_loaded_again(model: RoutedDecoder, tmp_path: Path) -> None:
    kv_dim = model.spec.kv_dim
    assert load_predictor(tmp_path, ACTIONS, kv_dim, CPU) is None
    saved = predictor(2 * kv_dim)
    saved.cost_weight.fill_(0.3)
    save_predictor(tmp_path, saved)
    loaded = load_predictor(tmp_path, ACTIONS, kv_dim, CPU)
    features = torch.randn(5, 2 * kv_dim)
    assert loaded is not None
    torch.testing.assert_close(loaded.quality(features), saved.quality(features).detach())
    assert (loaded.depths.tolist(), float(loaded.cost_weight)) == (list(ACTIONS.depths), pytest.approx(0.3))
    with pytest.raises(ArtifactError, match="features"):
        load_predictor(tmp_path, ACTIONS, kv_dim + 1, CPU)
    with pytest.raises(ArtifactError, match=r"chooses among .*allows \(2000, 4000, 6000\)"):
        load_predictor(tmp_path, ActionSpace.of_exits(NUM_LAYERS, EXITS), kv_dim, CPU)
