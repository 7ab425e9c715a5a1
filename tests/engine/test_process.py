"""The engine in a real process: what it answers, and what becomes of everyone when a process ends."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buddy_routing.artifact import save_predictor
from buddy_routing.predictor import BudgetPredictor
from buddy_server.engine import process
from buddy_server.engine.build import build_engine
from buddy_server.engine.messages import (
    Account,
    DepthEvent,
    Event,
    FinishEvent,
    GenerationRequest,
    StartEvent,
    StepStats,
    TokenEvent,
)
from buddy_server.engine.process import HEARTBEAT_TIMEOUT_S, EngineProcess
from buddy_server.engine.settings import EnginePlan, EngineSettings
from buddy_server.engine.worker_process import WorkerProcess
from buddy_server.errors import EngineStartError
from child_processes import is_running
from fakes.serving import wait_until
from tiny_engine import ACTIONS, KV_DIM, NUM_LAYERS, TinySite, make_request, run_engine

TIMEOUT_S = 90.0
PROMPT_END_S = 5.0
"""Within which everyone hears of a process that was killed."""

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def plan(tiny: TinySite, tmp_path_factory: pytest.TempPathFactory) -> EnginePlan:
    """Of an engine with a Budget Predictor."""
    router = shutil.copytree(tiny.router, tmp_path_factory.mktemp("process") / "router")
    save_predictor(router, BudgetPredictor(2 * KV_DIM, ACTIONS.depths))
    return EnginePlan(str(tiny.model), str(router), EngineSettings(native=False), "cpu", "float32")


@pytest.fixture(scope="module")
def steps() -> list[StepStats]:
    """What the engine reported."""
    return []


@pytest.fixture(scope="module")
def restarts() -> list[float]:
    """When the engine was started again."""
    return []


@pytest.fixture(scope="module")
def accounts() -> list[Account]:
    """Of all requests that have ended."""
    return []


@pytest.fixture(scope="module")
def engine(
    plan: EnginePlan, steps: list[StepStats], restarts: list[float], accounts: list[Account]
) -> Iterator[EngineProcess]:
    worker = WorkerProcess(plan)
    ready = worker.wait_until_ready()
    engine = EngineProcess(
        plan, worker, ready, steps.append, lambda: restarts.append(time.monotonic()), accounts.append
    )
    engine.start()
    yield engine
    engine.stop()
    assert not engine.is_ready
    assert not is_running(worker.pid)


async def ask(engine: EngineProcess, request: GenerationRequest) -> list[Event]:
    """All events to the last, less the StartEvent, whose time is never the same."""
    async with asyncio.timeout(TIMEOUT_S):
        events = [event async for together in engine.submit(request) for event in together]
    return [event for event in events if not isinstance(event, StartEvent)]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        # The engine's thread has nothing to await.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def sixteen(**sampling: Any) -> list[GenerationRequest]:
    return [make_request(f"r{i}", 5 + 6 * i, (3, 4, 6)[i % 3], seed=i, **sampling) for i in range(16)]


async def test_sixteen_streams_are_those_of_the_engine_in_this_process(
    engine: EngineProcess, plan: EnginePlan, steps: list[StepStats]
) -> None:
    requests = [*sixteen()[:15], make_request("scored", top_logprobs=2, prompt_logprobs=1)]
    here = build_engine(plan.model, plan.router, plan.settings, plan.device, plan.dtype).engine
    expected = run_engine(here, requests).answers
    steps.clear()
    for request, events in zip(requests, await asyncio.gather(*(ask(engine, r) for r in requests)), strict=True):
        answer = expected[request.request_id]
        assert events == [*answer.prompts, *answer.tokens, answer.finish]
    num_tokens = sum(len(request.prompt_tokens) + 11 for request in requests)
    await until(lambda: sum(step.num_rows for step in steps) == num_tokens)
    assert sum(depth.executed + depth.skipped for step in steps for depth in step.depth.values()) == (
        num_tokens * NUM_LAYERS * 1000
    )


async def test_closing_the_iterator_stops_the_work(engine: EngineProcess) -> None:
    async with asyncio.timeout(TIMEOUT_S), aclosing(engine.submit(make_request(max_tokens=100))) as events:
        await anext(events)
        assert (engine.num_running, engine.num_waiting) == (1, 0)
        assert engine.kv_usage_ratio > 0
    await until(lambda: (engine.num_running, engine.num_waiting, engine.kv_usage_ratio) == (0, 0, 0.0))


async def test_depth_is_predicted_as_in_this_process(engine: EngineProcess, plan: EnginePlan) -> None:
    here = build_engine(plan.model, plan.router, plan.settings, plan.device, plan.dtype).engine.depth_predictor
    assert here is not None
    requests = [replace(request, min_cost=3000, max_cost=5000) for request in sixteen()]
    expected = here.costs([request.prompt_tokens for request in requests], [(3000, 5000)] * 16)
    for answer, cost in zip(await asyncio.gather(*map(partial(ask, engine), requests)), expected, strict=True):
        assert answer[0] == DepthEvent(cost)
        assert {1000 * sum(event.path) for event in answer if isinstance(event, TokenEvent)} == {cost}


async def test_request_whose_depth_cannot_be_predicted_gets_all_that_it_allows(plan: EnginePlan) -> None:
    engine = build_engine(plan.model, plan.router, plan.settings, plan.device, plan.dtype).engine
    unknown = replace(make_request("unknown"), prompt_tokens=(10**6,), min_cost=3000, max_cost=5000)
    assert engine.add(unknown) == []
    assert engine.add(replace(make_request("known"), min_cost=3000, max_cost=5000)) != []


async def test_killed_process_ends_every_request_and_another_takes_its_place(
    engine: EngineProcess, restarts: list[float], accounts: list[Account]
) -> None:
    accounts.clear()
    engine.limit_depth({"free": 3000})
    tasks = [asyncio.create_task(ask(engine, request)) for request in sixteen(max_tokens=120)]
    await until(lambda: engine.num_running == 16)
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(PROMPT_END_S):
        answers = await asyncio.gather(*tasks)
    for *tokens, end in answers:
        assert isinstance(end, FinishEvent)
        assert (end.reason, end.error) == ("lost", "the engine's process ended")
        assert end.usage.completion_tokens >= len(tokens)
    assert sorted(account.request_id for account in accounts) == sorted(request.request_id for request in sixteen())
    assert not engine.is_ready
    assert 1.0 <= engine.ready_in_s < TIMEOUT_S
    assert (engine.num_running, engine.num_waiting, engine.kv_usage_ratio, engine.queue_s) == (0, 0, 0.0, 0.0)
    (refused,) = await ask(engine, make_request("between"))
    assert isinstance(refused, FinishEvent)
    assert refused.reason == "lost"
    await until(lambda: engine.is_ready)
    assert len(restarts) == 1
    assert engine.pid != pid
    assert engine.ready_in_s == 0
    *tokens, end = await ask(engine, replace(make_request("after"), tier="free"))
    assert [sum(token.path) for token in tokens if isinstance(token, TokenEvent)] == [3] * 12
    assert isinstance(end, FinishEvent)
    assert end.max_cost == 3000
    engine.limit_depth({})


async def test_time_in_the_queue_is_reported_while_requests_wait(engine: EngineProcess) -> None:
    tasks = [asyncio.create_task(ask(engine, make_request(f"r{i}", seed=i, max_tokens=120))) for i in range(64)]
    await until(lambda: engine.queue_s > 0)
    await asyncio.gather(*tasks)
    await until(lambda: engine.queue_s == 0)


async def test_what_is_served_is_what_the_accounts_of_each_tenant_and_priority_add_up_to(
    engine: EngineProcess, accounts: list[Account]
) -> None:
    await until(lambda: engine.is_ready)
    accounts.clear()
    before, requests = dict(engine.served), {}
    for index, request in enumerate(sixteen()):
        requests[request.request_id] = replace(request, tenant=f"t{index % 3}", priority=index % 2)
    await asyncio.gather(*(ask(engine, request) for request in requests.values()))
    assert len(accounts) == 16
    expected: Counter[tuple[str, int]] = Counter(before)
    for account in accounts:
        expected[account.tenant, requests[account.request_id].priority] += account.usage.cost
    assert engine.served == expected
    assert len(expected) == len(before) + 6


async def test_no_more_is_remembered_of_what_is_served_than_of_those_served_last(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: engine.is_ready)
    monkeypatch.setattr(process, "MOST_SERVED", 2)
    for index, tenant in enumerate(("last0", "last1", "last0", "last2")):
        await ask(engine, make_request(f"r{index}", 9, 4, tenant=tenant, max_tokens=4))
    assert engine.served == {("last0", 0): 2 * 12 * 4000, ("last2", 0): 12 * 4000}


async def test_tenant_that_other_engines_serve_waits_behind_those_that_have_only_this_one(plan: EnginePlan) -> None:
    worker = WorkerProcess(replace(plan, settings=replace(plan.settings, max_sequences=1)))
    engine = EngineProcess(plan, worker, worker.wait_until_ready())
    engine.start()
    ended: list[str] = []

    async def run(name: str, tenant: str) -> None:
        await ask(engine, make_request(name, tenant=tenant, max_tokens=4))
        ended.append(tenant)

    async def order(served_elsewhere: dict[tuple[str, int], int]) -> str:
        """In which the tenants' requests end that wait for a while."""
        ended.clear()
        first = asyncio.create_task(ask(engine, make_request("first", tenant="z", max_tokens=200)))
        await until(lambda: engine.num_running == 1)
        tasks = [asyncio.create_task(run(f"r{index}", tenant)) for index, tenant in enumerate("ababab")]
        await until(lambda: engine.waiting_tenants == {("a", 0), ("b", 0)} and engine.num_waiting == 6)
        engine.charge_elsewhere(served_elsewhere, frozenset())
        await asyncio.gather(first, *tasks)
        return "".join(ended)

    try:
        assert await order({}) == "ababab"
        assert await order({("a", 0): 10**7, ("a", 1): 10**9, ("unknown", 0): 10**9}) == "bbbaaa"
    finally:
        await asyncio.to_thread(engine.stop)


async def test_stopped_process_is_noticed_and_replaced_like_one_that_died(
    engine: EngineProcess, caplog: pytest.LogCaptureFixture
) -> None:
    await until(lambda: engine.is_ready)
    tasks = [asyncio.create_task(ask(engine, request)) for request in sixteen(max_tokens=120)]
    await until(lambda: engine.num_running == 16)
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(HEARTBEAT_TIMEOUT_S + PROMPT_END_S):
        answers = await asyncio.gather(*tasks)
    assert {answer[-1].reason for answer in answers if isinstance(answer[-1], FinishEvent)} == {"lost"}
    assert "engine process is silent" in caplog.messages
    await until(lambda: engine.is_ready)
    assert not is_running(pid)
    assert len(await ask(engine, make_request("after"))) == 13


async def test_stop_ends_every_request_and_the_process(plan: EnginePlan) -> None:
    worker = WorkerProcess(plan)
    engine = EngineProcess(plan, worker, worker.wait_until_ready())
    engine.start()
    tasks = [asyncio.create_task(ask(engine, request)) for request in sixteen(max_tokens=120)]
    await until(lambda: engine.num_running == 16)
    await asyncio.to_thread(engine.stop)
    engine.stop()
    assert not is_running(worker.pid)
    for *_, end in await asyncio.gather(*tasks):
        assert isinstance(end, FinishEvent)
        assert (end.reason, end.error) == ("cancelled", "the server is shutting down")
    (late,) = await ask(engine, make_request("late"))
    assert isinstance(late, FinishEvent)
    assert (late.reason, late.error) == ("lost", "there is no engine to take the request")


async def test_another_model_is_not_served_in_place_of_the_first(
    plan: EnginePlan, caplog: pytest.LogCaptureFixture
) -> None:
    worker = WorkerProcess(plan)
    first = msgspec.structs.replace(worker.wait_until_ready(), directory="another")
    engine = EngineProcess(plan, worker, first)
    engine.start()
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: "engine does not start again" in caplog.messages)
    assert not engine.is_ready
    await asyncio.to_thread(engine.stop)


def test_directory_that_holds_no_sockets_is_named(
    plan: EnginePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(EngineStartError, match=r"cannot be started: .*xxx"):
        WorkerProcess(plan)
    assert not list(long.iterdir())


def test_engine_that_cannot_be_built_says_why(plan: EnginePlan) -> None:
    worker = WorkerProcess(EnginePlan(plan.model, "prior:best", plan.settings, "cpu", "float32"))
    with pytest.raises(EngineStartError, match="router 'prior:best' is unknown; allowed: a directory, prior:cosine"):
        worker.wait_until_ready()
    assert not is_running(worker.pid)


def test_process_that_ends_before_it_is_ready_is_an_error(plan: EnginePlan) -> None:
    worker = WorkerProcess(plan)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(EngineStartError, match="ended with status -9 before it was ready"):
        worker.wait_until_ready()


PARENT = """
import sys, time
from buddy_server.engine.settings import EnginePlan, EngineSettings
from buddy_server.engine.worker_process import WorkerProcess

worker = WorkerProcess(EnginePlan(sys.argv[1], None, EngineSettings(native=False), "cpu", "float32"))
if sys.argv[2] == "ready":
    worker.wait_until_ready()
print(worker.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("moment", ["building", "ready"])
def test_process_ends_with_its_parent(tiny: TinySite, moment: str) -> None:
    command = [sys.executable, "-c", PARENT, str(tiny.model), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid))


def test_process_ends_with_its_input(tmp_path: Path) -> None:
    """Where the kernel does not end it with its parent; and no signal does that reaches a whole group."""
    command = [sys.executable, "-m", "buddy_server.engine.worker", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as worker:
        wait_until((tmp_path / "commands").exists, TIMEOUT_S)
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.3)
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(TIMEOUT_S) == 1
