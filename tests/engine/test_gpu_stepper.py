"""The GPU's way through the engine, on a CPU: steps that go on by themselves, launched before the last are read."""

import json
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
from buddy_routing.router import NEVER
from buddy_routing.stepper import TorchStepper
from buddy_server.engine.engine import Engine
from buddy_server.engine.loop import EngineLoop
from buddy_server.engine.messages import FinishEvent, GenerationRequest, TokenEvent
from buddy_server.engine.scheduler import StepOutput
from buddy_server.engine.steppers import gpu_stepper
from buddy_server.engine.wire import Submit
from tiny_engine import (
    NUM_LAYERS,
    ROUTE_BLOCK,
    TinySite,
    build_tiny_engine,
    make_request,
    run_engine,
    save_random_duo,
    save_random_exits,
    save_random_router,
)

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: kernels of the GPU path are not tested", allow_module_level=True)


from buddy_kernels.gpu import attention
from buddy_kernels.gpu.blocks import AttentionBlocks
from buddy_routing.gpu_stepper import Call, GpuStepper
from gpu_references import use_references
from quick_interpreter import patch_language_once

BUDGETS = (3, 4, 6)
STEPS_OF_A_CALL = 5
GRAMMAR = json.dumps({"grammars": [{"lark_grammar": "start: /[a-f]{3}-[0-9]{4}/"}]})
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

    def make(model: Path, router: Path | str, **options: Any) -> Engine:
        engine = build_tiny_engine(model, router, **options).engine
        use_references(monkeypatch, engine.scheduler.actions)
        # A step here takes longer than a call should.
        monkeypatch.setattr(GpuStepper, "_num_steps", lambda _, rows: min(STEPS_OF_A_CALL, rows.most_steps))
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
    # Rows go on in the calls that follow: 5 tokens in each of all but the first.
    assert len(calls) == 40 // STEPS_OF_A_CALL - 1
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
        # All tokens but the last have run; after a stop or a cancel more may have, which nobody is charged for.
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
    assert line.__dict__["reason"] == "UnsupportedByGpuError: a router of type RandomRouter is asked on the host"


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


@pytest.mark.parametrize("num_blocks", [None, 30], ids=["room", "preempted"])
def test_aligned_answers_share_paths_also_after_some_were_preempted(
    tiny: TinySite, gpu_engine: EngineMaker, num_blocks: int | None
) -> None:
    requests = [
        replace(make_request(f"r{i}", num_prompt=12, num_run=3, seed=i, max_tokens=20), align_paths=True)
        for i in range(8)
    ]
    ours = gpu_engine(tiny.model, tiny.router, num_blocks=num_blocks)
    theirs = build_tiny_engine(tiny.model, tiny.router, num_blocks=num_blocks).engine
    made, wanted = run_engine(ours, requests), run_engine(theirs, requests)
    assert (made.num_preemptions > 0) == (num_blocks is not None)
    if num_blocks is None:
        assert {name: a.token_ids for name, a in made.answers.items()} == {
            name: a.token_ids for name, a in wanted.answers.items()
        }
    assert {answer.end.reason for answer in made.answers.values()} == {"length"}


@pytest.mark.parametrize("num_prompt", [1, 9, ROUTE_BLOCK + 1])
def test_router_that_never_chooses_again_keeps_the_prompt_s_path_and_the_seed_its_text(
    tiny: TinySite, gpu_engine: EngineMaker, num_prompt: int, tmp_path: Path
) -> None:
    save_random_router(tiny.model, tmp_path, reroute_every=NEVER)
    requests = [
        replace(make_request(f"r{i}", num_prompt, NUM_LAYERS, i, max_tokens=30, temperature=0.8), tier="free")
        for i in range(3)
    ]
    check_same(gpu_engine(tiny.model, tmp_path), build_tiny_engine(tiny.model, tmp_path).engine, requests)
    engine = gpu_engine(tiny.model, tmp_path)
    events = engine.add(*requests)
    for step in range(100):
        events += engine.step().events if engine.has_work else []
        if step == 1:
            engine.limit_depth({"free": 3 * MILLI_LAYERS})
    for request in requests:
        paths = [event.path for name, event in events if name == request.request_id and isinstance(event, TokenEvent)]
        # The first path, and one more since the budget is another.
        assert len(paths) == 30
        assert len(set(paths)) == 2


def test_answer_with_a_grammar_is_the_reference_s(tiny: TinySite, gpu_engine: EngineMaker) -> None:
    requests = [
        replace(make_request("r", max_tokens=30, temperature=0.8), grammar=GRAMMAR),
        make_request("plain", seed=1),
    ]
    engines = gpu_engine(tiny.model, tiny.router), build_tiny_engine(tiny.model, tiny.router).engine
    for engine in engines:
        engine.grammars.compiled(GRAMMAR)
    check_same(*engines, requests)


def test_more_answers_than_a_graph_holds_run_in_plain_torch(
    tiny: TinySite, gpu_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buddy_routing.gpu_stepper.MAX_ROWS", 4)
    check_same(gpu_engine(tiny.model, tiny.router), build_tiny_engine(tiny.model, tiny.router).engine, mixed(12))


def test_step_that_fails_in_the_middle_of_a_chain_leaves_a_clean_engine(
    tiny: TinySite, gpu_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, request = gpu_engine(tiny.model, tiny.router), make_request(max_tokens=30)
    wanted = run_engine(engine, [request]).answers["r"].token_ids
    engine.add(request)
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(Call, "collect", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert [event.reason for _, event in engine.end_all("error", "broken")] == ["error"]  # type: ignore[union-attr]
    assert not engine.has_work
    engine.scheduler.check_idle()
    assert run_engine(engine, [request]).answers["r"].token_ids == wanted


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, kernels do not run on CPU tensors")
@pytest.mark.timeout(1500)
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


def test_device_that_has_failed_ends_the_engine_s_loop_after_all_its_requests(
    tiny: TinySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would work in that process either; another takes its place."""
    engine, reports = build_tiny_engine(tiny.model, tiny.router).engine, []

    def fails(_: Engine) -> StepOutput:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "step", fails)
    loop = EngineLoop(engine, reports.append)
    loop.inbox.put(Submit(make_request()))
    with pytest.raises(torch.AcceleratorError):
        loop.run()
    (ended,) = [event for report in reports for _, event in report.events]
    assert (ended.reason, loop.closed) == ("error", True)
