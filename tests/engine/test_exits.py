"""An engine whose answers leave the model at exits."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.artifact import save_predictor
from buddy_routing.predictor import BudgetPredictor
from buddy_server.engine.messages import FinishEvent, TokenEvent
from tiny_engine import (
    KV_DIM,
    NUM_LAYERS,
    ROUTE_BLOCK,
    build_tiny_engine,
    make_request,
    run_engine,
    save_random_exits,
    save_tiny_model,
)

EXITS = (1, 3)
COSTS = (2, 4, NUM_LAYERS)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a model and of exits for it."""
    directory = tmp_path_factory.mktemp("exits")
    model, exits = directory / "model", directory / "exits"
    save_tiny_model("llama", model)
    save_random_exits(model, exits, EXITS)
    return model, exits


@pytest.mark.parametrize("native", [False, True])
def test_mixed_exits_in_one_batch_answer_as_alone_and_cost_exactly_what_they_ran(
    site: tuple[Path, Path], native: bool
) -> None:
    requests = [
        make_request(f"{seed}", num_prompt=5 + 7 * seed, num_run=COSTS[seed % 3], seed=seed) for seed in range(9)
    ]
    built = build_tiny_engine(*site, native=native)
    assert (built.info.num_layers, built.info.router_id[:6]) == (NUM_LAYERS, "exits:")
    together = run_engine(built.engine, requests)
    assert sum(step.stats.num_preemptions for step in together.steps) == 0
    alone = build_tiny_engine(*site, native=native).engine
    texts = set()
    for request in requests:
        answer = together.answers[request.request_id]
        num_run = request.max_cost // MILLI_LAYERS
        exit_ = COSTS.index(num_run)
        ran = (*range(num_run - 1), NUM_LAYERS + exit_) if exit_ < len(EXITS) else tuple(range(NUM_LAYERS))
        assert [built.info.actions.layers_run(event.path) for event in answer.tokens] == [ran] * 12
        usage = answer.end.usage
        assert usage.prompt_cost == request.max_cost * len(request.prompt_tokens)
        assert usage.output_cost == request.max_cost * 11
        assert run_engine(alone, [request]).answers[request.request_id].token_ids == answer.token_ids
        texts.add(answer.text)
    assert len(texts) == len(requests)


def test_a_cost_between_two_exits_takes_the_lower_one(site: tuple[Path, Path]) -> None:
    engine = build_tiny_engine(*site).engine
    between, exact = (
        run_engine(engine, [make_request(num_run=num_run)]).answers["r"] for num_run in (NUM_LAYERS - 1, 4)
    )
    assert between.token_ids == exact.token_ids
    assert between.end.usage == exact.end.usage


def test_cached_prefixes_are_those_of_the_same_exit(site: tuple[Path, Path]) -> None:
    engine = build_tiny_engine(*site, native=True).engine
    num_prompt = 3 * ROUTE_BLOCK + 1
    ends = [
        run_engine(engine, [make_request(num_prompt=num_prompt, num_run=num_run)]).answers["r"]
        for num_run in (4, 2, 4, 2)
    ]
    assert [answer.end.usage.cached_tokens for answer in ends] == [0, 0, num_prompt - 1, num_prompt - 1]
    assert [answer.text for answer in ends[2:]] == [answer.text for answer in ends[:2]]


@pytest.mark.parametrize("native", [False, True])
def test_a_preempted_answer_goes_on_at_its_exit(site: tuple[Path, Path], native: bool) -> None:
    requests = [
        make_request(f"{seed}", num_prompt=15, num_run=COSTS[seed % 3], seed=seed, max_tokens=40) for seed in range(4)
    ]
    num_blocks = 8 if native else 30
    cramped = run_engine(build_tiny_engine(*site, native=native, num_blocks=num_blocks).engine, requests)
    roomy = run_engine(build_tiny_engine(*site, native=native).engine, requests)
    assert cramped.num_preemptions
    for request in requests:
        name = request.request_id
        assert cramped.answers[name].token_ids == roomy.answers[name].token_ids
        assert cramped.answers[name].end.usage.cost == roomy.answers[name].end.usage.cost


def test_predictor_chooses_among_the_exits_within_the_bounds_of_a_request(
    site: tuple[Path, Path], tmp_path: Path
) -> None:
    model, exits = site[0], shutil.copytree(site[1], tmp_path / "exits")
    torch.manual_seed(0)
    depths = [MILLI_LAYERS * num_run for num_run in COSTS]
    save_predictor(exits, BudgetPredictor(2 * KV_DIM, depths))
    engine = build_tiny_engine(model, exits).engine
    bounds = [(depths[0], depths[-1])] * 20 + [(depths[0], depths[1]), (depths[1], depths[1])]
    requests = [
        replace(make_request(f"{seed}", seed=seed), min_cost=lowest, max_cost=highest)
        for seed, (lowest, highest) in enumerate(bounds)
    ]
    run = run_engine(engine, requests)
    assert len(set(run.depths.values())) > 1
    for request, (lowest, highest) in zip(requests, bounds, strict=True):
        depth = run.depths[request.request_id]
        assert depth in depths
        assert lowest <= depth <= highest
        (path,) = {event.path for event in run.answers[request.request_id].tokens}
        assert engine.scheduler.actions.cost(path) == depth


def test_lowered_budgets_change_the_exit_of_those_that_have_not_begun(site: tuple[Path, Path]) -> None:
    engine = build_tiny_engine(*site, max_sequences=1).engine
    begun, waiting = (
        replace(make_request(name, num_run=NUM_LAYERS, seed=seed), tier="free")
        for seed, name in enumerate(("begun", "waiting"))
    )
    engine.add(begun, waiting)
    events = engine.step().events
    engine.limit_depth({"free": 5 * MILLI_LAYERS})
    while engine.has_work:
        events += engine.step().events
    paths: dict[str, set[bytes]] = {"begun": set(), "waiting": set()}
    ends = {}
    for name, event in events:
        if isinstance(event, TokenEvent):
            paths[name].add(event.path)
        elif isinstance(event, FinishEvent):
            ends[name] = event
    actions = engine.scheduler.actions
    assert paths == {"begun": {actions.exit_paths[-1]}, "waiting": {actions.exit_paths[1]}}
    assert (ends["begun"].max_cost, ends["waiting"].max_cost) == (NUM_LAYERS * MILLI_LAYERS, 5 * MILLI_LAYERS)
