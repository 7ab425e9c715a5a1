"""The GPU's way through the engine, on a CPU: steps that go on by themselves, launched before the last are read."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from buddy_kernels import RoutedOutput
from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.stepper import TorchStepper
from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import FinishEvent, GenerationRequest, TokenEvent
from buddy_server.engine.steppers import gpu_stepper
from tiny_engine import (
    NUM_LAYERS,
    ROUTE_BLOCK,
    TinySite,
    build_tiny_engine,
    make_request,
    run_engine,
    save_random_duo,
    save_random_exits,
)

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: kernels of the GPU path are not tested", allow_module_level=True)


from buddy_kernels.gpu import attention
from buddy_kernels.gpu.blocks import AttentionBlocks
from buddy_routing.gpu_stepper import Call, GpuStepper
from gpu_references import use_references
from quick_interpreter import patch_language_once

BUDGETS = (3, 4, 6)
EngineMaker = Callable[..., Engine]


def on_graphs(engine: Engine) -> Engine:
    """The same engine, stepped by GpuStepper."""
    stepper = engine.runner.stepper
    assert isinstance(stepper, TorchStepper)
    engine.runner.stepper = GpuStepper(stepper.model, stepper.cache, stepper.planner)
    engine.scheduler._multi_step = True
    return engine


@pytest.fixture
def gpu_engine(monkeypatch: pytest.MonkeyPatch) -> EngineMaker:
    """Makes engines whose kernels are replaced by their references."""

    def make(model: Path, router: Path, **options: Any) -> Engine:
        engine = build_tiny_engine(model, router, **options).engine
        use_references(monkeypatch, engine.scheduler.actions)
        return on_graphs(engine)

    return make


def mixed(count: int) -> list[GenerationRequest]:
    """Of several tenants, budgets and lengths; every third is drawn, some share a prompt."""
    return [
        make_request(
            f"r{i}",
            num_prompt=3 + 7 * (i % 12),
            num_run=BUDGETS[i % 3],
            seed=i % 60,
            tenant=f"t{i % 2}",
            max_tokens=4 + i % 17,
            temperature=0.8 if i % 3 == 0 else 0.0,
        )
        for i in range(count)
    ]


def check_same(ours: Engine, theirs: Engine, requests: list[GenerationRequest]) -> None:
    made, wanted = run_engine(ours, requests), run_engine(theirs, requests)
    for request in requests:
        one, other = made.answers[request.request_id], wanted.answers[request.request_id]
        assert (one.token_ids, one.finish) == (other.token_ids, other.finish), request
        assert [event.path for event in one.tokens] == [event.path for event in other.tokens], request


@pytest.mark.parametrize(("num_requests", "num_blocks"), [(200, None), (60, 90)], ids=["room", "preempted"])
def test_mixed_requests_get_the_reference_s_tokens_paths_and_costs(
    tiny: TinySite, gpu_engine: EngineMaker, num_requests: int, num_blocks: int | None
) -> None:
    check_same(
        gpu_engine(tiny.model, tiny.router, num_blocks=num_blocks),
        build_tiny_engine(tiny.model, tiny.router, num_blocks=num_blocks).engine,
        mixed(num_requests),
    )


@pytest.mark.parametrize("kind", ["exits", "duo"])
def test_exits_and_small_ffns_are_actions_as_any_other(
    tiny: TinySite, gpu_engine: EngineMaker, kind: str, tmp_path: Path
) -> None:
    if kind == "exits":
        save_random_exits(tiny.model, tmp_path, (1, 3))
    else:
        save_random_duo(tiny.model, tmp_path)
    requests = mixed(30)
    check_same(gpu_engine(tiny.model, tmp_path), build_tiny_engine(tiny.model, tmp_path).engine, requests)


def test_what_the_host_must_see_of_every_token_is_the_reference_s_too(tiny: TinySite, gpu_engine: EngineMaker) -> None:
    requests = [
        make_request("penalties", seed=1, presence_penalty=0.5, frequency_penalty=1.0),
        make_request("bias", seed=2, logit_bias={5: 4.0, 7: -100.0}, temperature=0.0),
        make_request("logprobs", seed=3, top_logprobs=3, temperature=0.0),
        make_request("scored", seed=4, prompt_logprobs=2, temperature=0.0),
        make_request("many ends", seed=5, stop_token_ids=tuple(range(20)), temperature=0.0, max_tokens=40),
        make_request("plain", seed=6),
    ]
    ours, theirs = gpu_engine(tiny.model, tiny.router), build_tiny_engine(tiny.model, tiny.router).engine
    made, wanted = run_engine(ours, requests), run_engine(theirs, requests)
    for request in requests:
        one, other = made.answers[request.request_id], wanted.answers[request.request_id]
        assert one.token_ids == other.token_ids, request.request_id
        assert one.finish == other.finish, request.request_id
    for one, other in zip(made.answers["logprobs"].tokens, wanted.answers["logprobs"].tokens, strict=True):
        assert one.logprob is not None
        assert other.logprob is not None
        assert abs(one.logprob.logprob - other.logprob.logprob) < 1e-4
        assert [token.token_id for token in one.top_logprobs] == [token.token_id for token in other.top_logprobs]


def test_calls_are_launched_before_the_last_one_is_read(
    tiny: TinySite, gpu_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = gpu_engine(tiny.model, tiny.router)
    order: list[tuple[str, Call]] = []
    launch, collect = GpuStepper.launch_after, Call.collect

    def launched(stepper: GpuStepper, *given: Any) -> Call:
        order.append(("launched", launch(stepper, *given)))
        return order[-1][1]

    def collected(call: Call) -> RoutedOutput:
        order.append(("collected", call))
        return collect(call)

    monkeypatch.setattr(GpuStepper, "launch_after", launched)
    monkeypatch.setattr(Call, "collect", collected)
    run_engine(engine, [make_request(max_tokens=40)])
    calls = [call for kind, call in order if kind == "launched"]
    # One for each token at most: rows go on in the calls that follow.
    assert 5 < len(calls) < 40
    for call in calls:
        # Between the two, the call before is collected.
        assert order.index(("collected", call)) - order.index(("launched", call)) >= 2


def test_stop_strings_cancels_and_limits_in_the_middle_of_calls_under_way(
    tiny: TinySite, gpu_engine: EngineMaker
) -> None:
    requests = [
        replace(
            make_request(f"r{i}", num_prompt=20, num_run=NUM_LAYERS, seed=i, max_tokens=40, temperature=0.0),
            tier=f"tier{i % 2}",
        )
        for i in range(12)
    ]
    plain = run_engine(build_tiny_engine(tiny.model, tiny.router).engine, requests).answers
    stopped = plain["r3"].text[10:12]
    requests[3] = replace(requests[3], sampling=replace(requests[3].sampling, stop=(stopped,)))
    engine = gpu_engine(tiny.model, tiny.router)
    events = engine.add(*requests)
    for step in range(200):
        if not engine.has_work:
            break
        events += engine.step().events
        if step == 6:
            events += engine.cancel("r5")
            engine.limit_depth({"tier0": 3 * MILLI_LAYERS})
    engine.scheduler.check_idle()
    assert engine.scheduler.pool.usage_ratio == 0
    tokens: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    ends: dict[str, FinishEvent] = {}
    for name, event in events:
        assert name not in ends, "nothing comes after the last event"
        if isinstance(event, TokenEvent):
            tokens[name].append(event)
        elif isinstance(event, FinishEvent):
            ends[name] = event
    assert Counter(end.reason for end in ends.values()) == {"length": 10, "stop": 1, "cancelled": 1}
    for index, request in enumerate(requests):
        name = request.request_id
        costs = [engine.scheduler.actions.cost(event.path) for event in tokens[name]]
        num_full = costs.count(NUM_LAYERS * MILLI_LAYERS)
        ids = [event.token_id for event in tokens[name]]
        assert ids[:num_full] == plain[name].token_ids[:num_full]
        if index % 2 == 0:
            assert 0 < num_full < len(costs)
            assert costs == sorted(costs, reverse=True)
            assert set(costs) == {6000, 3000}
        else:
            assert num_full == len(ids)
        charged = ends[name].usage
        # All tokens but the last have run; of a cancelled one more may have, which nobody is charged for.
        assert charged.output_cost in (sum(costs[1:]), sum(costs[1:]) + costs[-1] * (name in ("r3", "r5")))


def test_router_that_is_asked_on_the_host_runs_in_plain_torch_and_one_line_says_so(
    tiny: TinySite, caplog: pytest.LogCaptureFixture
) -> None:
    stepper = build_tiny_engine(tiny.model, tiny.router).engine.runner.stepper
    assert isinstance(stepper, TorchStepper)
    assert isinstance(gpu_stepper(stepper.model, stepper.cache, stepper.planner), GpuStepper)
    caplog.clear()
    stepper.planner.router = RandomRouter()
    assert isinstance(gpu_stepper(stepper.model, stepper.cache, stepper.planner), TorchStepper)
    (line,) = caplog.records
    assert line.getMessage() == "no graphs on the GPU, plain torch runs instead and is slower"
    assert line.__dict__["reason"] == "a router of type RandomRouter is asked on the host"


class RandomRouter:
    """Another one on every call."""

    router_id, reroute_every = "random", 1

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(features), NUM_LAYERS - 2)


def test_second_request_finds_the_prefix_that_the_first_has_cached(tiny: TinySite, gpu_engine: EngineMaker) -> None:
    engine, num_prompt = gpu_engine(tiny.model, tiny.router), 3 * ROUTE_BLOCK + 1
    first, second = (run_engine(engine, [make_request(num_prompt=num_prompt)]).answers["r"] for _ in range(2))
    assert (first.end.usage.cached_tokens, second.end.usage.cached_tokens) == (0, num_prompt - 1)
    assert first.token_ids == second.token_ids


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_requests_in_the_interpreter_make_the_reference_s_tokens(
    tiny: TinySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves: each of their programs is a millisecond of Python, so contexts are split into two."""
    monkeypatch.setattr(attention, "attention_blocks", lambda *_: AttentionBlocks(16, 16, 2, 1, 1, 1))
    patch_language_once(monkeypatch)
    requests = [
        make_request(f"r{i}", 1 + i % 15, BUDGETS[i % 3], i, max_tokens=2 + i % 5, temperature=0.8 * (i % 4 == 0))
        for i in range(200)
    ]
    engines = [build_tiny_engine(tiny.model, tiny.router, num_blocks=100, max_sequences=32).engine for _ in range(2)]
    check_same(on_graphs(engines[0]), engines[1], requests)
