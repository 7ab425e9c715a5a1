"""Corrections of a router: what its paths are measured by, that better ones are found, and that they are served."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buddy_routing.action_space import ActionSpace
from buddy_routing.artifact import load_router, save_router
from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.router_config import RouterConfig
from buddy_routing.selection import select_path
from buddy_routing.train.correction_plan import CorrectionPlan
from buddy_routing.train.correction_training import fit_correction, train_correction
from buddy_routing.train.example import Example, packed_batches
from buddy_routing.train.path_table import PathTable, measure_path_table
from buddy_routing.train.router_training import RouterLoss, blank_decision_module
from buddy_routing.train.training_state import OtherTrainingError
from sparse_decode import SparseDecode, segment_bounds
from tiny_models import SHAPE, save_random_model

CPU = torch.device("cpu")
NUM_LAYERS: int = SHAPE["num_hidden_layers"]
NUM_FREE = NUM_LAYERS - 2
ACTIONS = ActionSpace.skip_or_run(NUM_LAYERS)
ROUTE_BLOCK = 16
EXAMPLES = [Example(tuple(range(n, n + 14)), 7) for n in range(1, 60)]
PLAN = CorrectionPlan((2 / 3, 0.5), num_batches=6, num_rows=2, num_tokens=64, num_variations=8, rank=4)
MAX_COSTS = (4000, 3000)


@pytest.fixture
def model(tmp_path: Path) -> RoutedDecoder:
    save_random_model("llama", tmp_path)
    return load_model(tmp_path, torch.float32, CPU).model


def random_router(num_features: int) -> LearnedRouter:
    torch.manual_seed(0)
    prior = torch.rand(NUM_FREE)
    return LearnedRouter(DecisionModule(num_features, NUM_FREE, 4).requires_grad_(False), prior, 0.1, "test")


def static_router(num_features: int, scores: Tensor) -> LearnedRouter:
    """One that has learnt nothing: its scores are its prior."""
    decision = blank_decision_module(num_features, NUM_FREE, 4, seed=0).requires_grad_(False)
    return LearnedRouter(decision, scores, 1.0, "test")


def corrected(model: RoutedDecoder, plan: CorrectionPlan, checkpoint: Path, data_name: str = "") -> LearnedRouter:
    router = random_router(2 * model.spec.kv_dim)
    return train_correction(model, router, ROUTE_BLOCK, iter(EXAMPLES), plan, checkpoint, data_name)


def scores(router: LearnedRouter) -> Tensor:
    features = torch.randn(20, router.decision.down.in_features, generator=torch.Generator().manual_seed(1))
    return router.scores(features).detach()


def test_paths_cost_what_they_may_and_the_first_is_the_routers_own(model: RoutedDecoder, tmp_path: Path) -> None:
    router = random_router(2 * model.spec.kv_dim)

    def batches() -> Iterator:
        return packed_batches(iter(EXAMPLES), 2, 64, seed=0)

    plan, checkpoint = replace(PLAN, num_batches=1), tmp_path / "state.safetensors"
    table = measure_path_table(model, router, ROUTE_BLOCK, batches(), MAX_COSTS, plan, checkpoint, "run")
    batch = next(batches())
    assert len(table.features) == batch.counted.sum()
    assert table.is_last.sum() == (batch.counted & ~batch.in_answer).sum()
    loss = RouterLoss(model, router, [], "distill", ROUTE_BLOCK)
    for budget, max_cost in enumerate(MAX_COSTS):
        runs = table.runs[:, budget]
        assert set(runs.sum(-1).flatten().tolist()) == {max_cost // 1000 - 2}
        own = select_path(router.scores(table.features), torch.tensor(max_cost), ACTIONS)
        assert torch.equal(runs[:, 0], own[:, ACTIONS.free])
        assert (runs[:, 1:] != runs[:, :1]).any(-1).float().mean() > 0.1
        served = loss(batch, torch.full_like(batch.tokens, max_cost))
        torch.testing.assert_close(table.nats[:, budget, 0].mean(), served)


def test_a_router_that_scores_all_layers_equally_has_variations_too(model: RoutedDecoder, tmp_path: Path) -> None:
    router = static_router(2 * model.spec.kv_dim, torch.zeros(NUM_FREE))
    plan, batches = replace(PLAN, num_batches=1), packed_batches(iter(EXAMPLES), 2, 64, seed=0)
    path = tmp_path / "state.safetensors"
    table = measure_path_table(model, router, ROUTE_BLOCK, batches, MAX_COSTS, plan, path, "run")
    assert (table.runs[:, :, 1:] != table.runs[:, :, :1]).any(-1).float().mean() > 0.5


def planted(num_tokens: int) -> tuple[PathTable, Tensor]:
    """Paths of two layers. The first feature says whether the first two free layers lose nothing or the last two."""
    torch.manual_seed(3)
    features = torch.randn(num_tokens, 12)
    best = torch.where(features[:, :1] > 0, torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 1]))
    drawn = torch.rand(num_tokens, 1, 9, NUM_FREE)
    runs = torch.zeros_like(drawn).scatter(-1, drawn.topk(2).indices, 1.0)
    missed = (runs * (1 - best[:, None, None])).sum(-1)
    return PathTable(features, torch.ones(num_tokens, dtype=torch.bool), runs.to(torch.int8), 0.1 * missed), best


def test_better_paths_are_found_where_there_are_any() -> None:
    router = random_router(12)
    table, _ = planted(6000)
    found = fit_correction(router, table, replace(PLAN, rank=16, learning_rate=1e-2))
    unseen, best = planted(7000)
    unseen_features, best = unseen.features[6000:], best[6000:]

    def share_of_best(by: LearnedRouter) -> float:
        paths = select_path(by.scores(unseen_features), torch.tensor(4000), ACTIONS)[:, ACTIONS.free]
        return float((paths == best).all(-1).float().mean())

    assert share_of_best(router) < 0.5
    assert share_of_best(found) > 0.9


def test_too_few_examples_are_refused() -> None:
    table, _ = planted(5)
    with pytest.raises(ValueError, match="there are 5 examples to learn from, allowed are 6 or more"):
        fit_correction(random_router(12), table, PLAN)


def test_a_router_that_knows_all_that_can_be_known_is_not_made_worse() -> None:
    values = torch.tensor([0.9, 0.1, 0.6, 0.3])
    router = static_router(12, values)
    table, _ = planted(60)
    lost = 2 - (table.runs * values).sum(-1) + 0.3 * torch.randn(60, 1, 9)
    known = PathTable(table.features, table.is_last, table.runs, (0.3 * lost).square())
    with pytest.raises(ValueError, match=r"from 0\.\d+ to 0\.\d+: too few examples or variations were measured"):
        fit_correction(router, known, replace(PLAN, rank=16, learning_rate=0.1))


def test_interrupted_measuring_goes_on_and_gives_the_same_router(model: RoutedDecoder, tmp_path: Path) -> None:
    whole = corrected(model, PLAN, tmp_path / "whole.safetensors")
    parts = tmp_path / "parts.safetensors"
    # Every batch is saved; the sixth was under way when the process ended.
    five = corrected(model, replace(PLAN, num_batches=5), parts)
    resumed = corrected(model, PLAN, parts)
    assert torch.equal(scores(resumed), scores(whole))
    assert not torch.equal(scores(resumed), scores(five))
    for other in (replace(PLAN, num_variations=4), replace(PLAN, budgets=(0.5,)), replace(PLAN, seed=1)):
        with pytest.raises(OtherTrainingError, match="other settings"):
            corrected(model, other, parts)
    with pytest.raises(OtherTrainingError, match="other data"):
        corrected(model, PLAN, parts, "other data")


@pytest.mark.parametrize("budget", [0.34, 1.0])
def test_budgets_without_a_choice_are_refused(budget: float, model: RoutedDecoder, tmp_path: Path) -> None:
    told = rf"budget {budget:g} pays for \d of 6 layers, where there is nothing to choose; .* pay for 3 to 5"
    with pytest.raises(ValueError, match=told):
        corrected(model, replace(PLAN, budgets=(0.5, budget)), tmp_path / "state.safetensors")


def test_the_result_is_served_like_any_router(model: RoutedDecoder, tmp_path: Path) -> None:
    router = corrected(model, PLAN, tmp_path / "state.safetensors")
    config = RouterConfig("abc", NUM_LAYERS, model.spec.kv_dim, 8, "ppl", router.prior_weight, ROUTE_BLOCK)
    save_router(tmp_path / "router", router, config)
    loaded, _ = load_router(tmp_path / "router", "abc", CPU)
    torch.testing.assert_close(scores(loaded), scores(router))
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 60), generator=torch.Generator().manual_seed(4))
    in_torch, native = (SparseDecode(model, loaded, tokens, [5], kind) for kind in (None, "float32"))
    taken = set()
    for start, end in segment_bounds(20, 59, ROUTE_BLOCK):
        paths, native_paths = (decode.step([(0, start, end)])[1] for decode in (in_torch, native))
        assert paths.tolist() == native_paths.tolist()
        taken.add(tuple(paths[0].tolist()))
    assert len(taken) > 1
