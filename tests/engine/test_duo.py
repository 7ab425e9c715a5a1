"""An engine whose layers may run with small FFNs."""

from dataclasses import replace
from pathlib import Path

import pytest

from buddy_routing.action_space import MILLI_LAYERS, RUN, SMALL
from tiny_engine import (
    NUM_LAYERS,
    ROUTE_BLOCK,
    build_tiny_engine,
    make_request,
    run_engine,
    save_random_duo,
    save_tiny_model,
)

NUM_RUN = (2.3, 3.65, 4.8, NUM_LAYERS)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a model and of small FFNs for it."""
    directory = tmp_path_factory.mktemp("duo")
    model, duo = directory / "model", directory / "duo"
    save_tiny_model("llama", model)
    save_random_duo(model, duo)
    return model, duo


@pytest.mark.parametrize("native", [False, True])
def test_mixed_actions_in_one_batch_answer_as_alone_and_cost_exactly_what_they_ran(
    site: tuple[Path, Path], native: bool
) -> None:
    requests = [
        make_request(f"{seed}", num_prompt=5 + 7 * seed, num_run=NUM_RUN[seed % 4], seed=seed) for seed in range(9)
    ]
    built = build_tiny_engine(*site, native=native)
    actions = built.info.actions
    assert (built.info.num_layers, built.info.router_id[:4]) == (NUM_LAYERS, "duo:")
    together = run_engine(built.engine, requests)
    alone = build_tiny_engine(*site, native=native).engine
    seen = set()
    for request in requests:
        answer = together.answers[request.request_id]
        costs = [actions.path_costs[event.path] for event in answer.tokens]
        assert max(costs) <= request.max_cost
        usage = answer.end.usage
        assert usage.output_cost == sum(costs[1:]), "the first token is of the prompt's last row"
        assert usage.prompt_cost <= request.max_cost * len(request.prompt_tokens)
        if request.max_cost == actions.full_cost:
            assert set(costs) == {actions.full_cost}
        seen.update(action for event in answer.tokens for action in event.path[1:-1])
        assert run_engine(alone, [request]).answers[request.request_id].token_ids == answer.token_ids
    assert seen == {0, RUN, SMALL}


def test_cached_prefixes_are_those_of_the_same_cost(site: tuple[Path, Path]) -> None:
    engine = build_tiny_engine(*site, native=True).engine
    num_prompt = 3 * ROUTE_BLOCK + 1
    ends = [
        run_engine(engine, [make_request(num_prompt=num_prompt, num_run=cost)]).answers["r"]
        for cost in (3.65, 3.651, 3.65, 3.651)
    ]
    assert [answer.end.usage.cached_tokens for answer in ends] == [0, 0, num_prompt - 1, num_prompt - 1]
    assert [answer.text for answer in ends[2:]] == [answer.text for answer in ends[:2]]


@pytest.mark.parametrize("native", [False, True])
def test_a_preempted_answer_goes_on_as_if_it_had_not_been(site: tuple[Path, Path], native: bool) -> None:
    requests = [
        make_request(f"{seed}", num_prompt=15, num_run=NUM_RUN[seed % 4], seed=seed, max_tokens=40) for seed in range(4)
    ]
    num_blocks = 8 if native else 30
    cramped = run_engine(build_tiny_engine(*site, native=native, num_blocks=num_blocks).engine, requests)
    roomy = run_engine(build_tiny_engine(*site, native=native).engine, requests)
    assert cramped.num_preemptions
    for request in requests:
        name = request.request_id
        assert cramped.answers[name].token_ids == roomy.answers[name].token_ids
        assert cramped.answers[name].end.usage.cost == roomy.answers[name].end.usage.cost


def test_depth_changes_in_mid_answer(site: tuple[Path, Path]) -> None:
    engine = build_tiny_engine(*site).engine
    engine.add(replace(make_request(num_run=NUM_LAYERS, max_tokens=8), tier="free"))
    events = engine.step().events
    engine.limit_depth({"free": 2300})
    while engine.has_work:
        events += engine.step().events
    costs = [engine.scheduler.actions.path_costs[event.path] for _, event in events if hasattr(event, "path")]
    assert costs[0] == NUM_LAYERS * MILLI_LAYERS
    assert max(costs[2:]) <= 2300
