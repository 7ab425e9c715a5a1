"""The engine on its thread, seen from asyncio: every request ends once, and nothing is left behind."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import Event, FinishEvent, GenerationRequest, StartEvent, StepStats, TokenEvent
from buddy_server.engine.scheduler import StepOutput
from engine_service import EngineService
from tiny_engine import NUM_LAYERS, Answer, TinySite, build_tiny_engine, make_request, run_engine

TIMEOUT_S = 60.0

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass(slots=True)
class FaultyEngine(Engine):
    """Raises in the steps and additions it is told to; `fail_after` the step's work, when its events are lost.

    The first step waits for `gate`.
    """

    fail_steps: set[int] = field(default_factory=set)
    fail_after: bool = False
    refuse: str = ""
    num_steps: int = 0
    gate: threading.Event | None = None

    def step(self) -> StepOutput:
        if self.gate is not None:
            self.gate.wait(TIMEOUT_S)
        self.num_steps += 1
        fails = self.num_steps in self.fail_steps
        if fails and not self.fail_after:
            raise RuntimeError("secret inside of the engine")
        output = Engine.step(self)
        if fails:
            raise RuntimeError("secret inside of the engine")
        return output

    def add(self, *requests: GenerationRequest) -> list[tuple[str, Event]]:
        if self.refuse in [request.request_id for request in requests]:
            raise RuntimeError("secret inside of the engine")
        return Engine.add(self, *requests)


@asynccontextmanager
async def serving(
    tiny: TinySite, on_step: Callable[[StepStats], None] = lambda _: None, faults: Any = None, **sizes: Any
) -> AsyncIterator[EngineService]:
    built = build_tiny_engine(tiny.model, tiny.router, **sizes)
    engine = built.engine
    if faults is not None:
        engine = FaultyEngine(
            engine.scheduler, engine.runner, engine.tokenizer, engine.end_token_ids, engine.grammars, **faults
        )
    service = EngineService(engine, built.info, on_step)
    service.start()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield service
    finally:
        await asyncio.to_thread(service.stop)
        engine.scheduler.check_idle()
        assert not engine.has_work
        assert service.kv_usage_ratio == 0


async def ask(service: EngineService, request: GenerationRequest) -> Answer:
    """All events to the last."""
    answer = Answer()
    async with aclosing(service.submit(request)) as events:
        async for together in events:
            for event in together:
                assert answer.finish is None
                if isinstance(event, FinishEvent):
                    answer.finish = event
                elif isinstance(event, TokenEvent):
                    answer.tokens.append(event)
    return answer


async def take(service: EngineService, request: GenerationRequest, num_events: int, delay_s: float = 0) -> list[Event]:
    """The first events, then the client goes away."""
    seen: list[Event] = []
    async with aclosing(service.submit(request)) as events:
        async for together in events:
            seen += together
            if len(seen) >= num_events:
                break
        await asyncio.sleep(delay_s)
    return seen


def sixteen(**sampling: Any) -> list[GenerationRequest]:
    return [make_request(f"r{i}", 5 + 6 * i, (3, 4, 6)[i % 3], seed=i, **sampling) for i in range(16)]


async def test_sixteen_streams_with_mixed_budgets_finish_as_they_would_alone(tiny: TinySite) -> None:
    requests = sixteen()
    expected = run_engine(build_tiny_engine(tiny.model, tiny.router).engine, requests).answers
    async with serving(tiny, num_blocks=90) as service:
        answers = await asyncio.gather(*(ask(service, request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            assert answer.end.reason == "length"
            assert all(1000 * len(path) == request.max_cost for path in answer.paths)
            assert answer.tokens == expected[request.request_id].tokens
            assert answer.finish == expected[request.request_id].finish


async def test_two_hundred_cancels_at_random_moments_leave_everything_free(tiny: TinySite) -> None:
    rng = random.Random(0)
    async with serving(tiny, num_blocks=60, max_sequences=8, max_step_tokens=48) as service:

        async def come_and_go(index: int) -> None:
            request = make_request(f"r{index}", rng.randint(1, 120), rng.choice((3, 4, 6)), seed=index, max_tokens=100)
            await asyncio.sleep(rng.random() * 2)
            task = asyncio.create_task(take(service, request, rng.randint(1, 20)))
            await asyncio.wait([task], timeout=rng.choice((0.0, 0.01, 0.1, 0.5)))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(*(come_and_go(index) for index in range(200)))
        # One more answer: the engine has then seen every cancel, and goes on.
        assert (await ask(service, make_request("last"))).end.reason == "length"
        await idle(service)
        assert (service.kv_usage_ratio, service.num_running, service.num_waiting) == (0, 0, 0)


async def until(condition: Callable[[], bool]) -> None:
    # The engine's thread has nothing to await.
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def idle(service: EngineService) -> None:
    await until(lambda: not service.num_running and not service.num_waiting)


async def test_closing_the_iterator_stops_the_work(tiny: TinySite) -> None:
    async with serving(tiny) as service:
        seen = await take(service, make_request(num_prompt=5, max_tokens=500), 3)
        assert isinstance(seen[0], StartEvent)
        assert all(isinstance(event, TokenEvent) for event in seen[1:])
        await idle(service)
        assert service.kv_usage_ratio == 0


async def test_iterator_that_was_never_started_asks_for_nothing(tiny: TinySite) -> None:
    async with serving(tiny) as service:
        async with aclosing(service.submit(make_request("never"))):
            pass
        assert (service.num_waiting, service.num_running) == (0, 0)


@pytest.mark.parametrize("fail_after", [False, True])
async def test_step_that_raises_ends_every_request_and_the_next_one_works(tiny: TinySite, fail_after: bool) -> None:
    """`fail_after`: the step had finished one request when it failed, and that one ends too."""
    requests = [make_request("short", max_tokens=6), *sixteen(max_tokens=40)[1:]]
    # All join the short request at its second step; its last token comes with the sixth.
    gate = threading.Event()
    faults = {"fail_steps": {6}, "fail_after": fail_after, "gate": gate}
    async with serving(tiny, faults=faults, max_step_tokens=2000) as service:
        tasks = [asyncio.create_task(ask(service, request)) for request in requests]
        await asyncio.sleep(0)
        gate.set()
        for answer in await asyncio.gather(*tasks):
            assert (answer.end.reason, answer.end.error) == ("error", "the engine failed while generating")
            assert len(answer.tokens) in (4, 5)
        again = await ask(service, make_request("next"))
        assert (again.end.reason, len(again.tokens)) == ("length", 12)


async def test_request_the_engine_cannot_take_fails_alone(tiny: TinySite) -> None:
    async with serving(tiny, faults={"refuse": "bad"}) as service:
        names = ("one", "bad", "two")
        one, bad, two = await asyncio.gather(*(ask(service, make_request(name)) for name in names))
        assert (one.end.reason, two.end.reason) == ("length", "length")
        assert (bad.end.reason, bad.tokens) == ("error", [])
        assert bad.end.error is not None
        assert "secret" not in bad.end.error
        assert (await ask(service, make_request("next"))).end.reason == "length"


async def test_failing_observer_of_steps_leaves_nobody_hanging(tiny: TinySite) -> None:
    def explode(_: StepStats) -> None:
        raise RuntimeError("secret inside of the metrics")

    async with serving(tiny, on_step=explode) as service:
        answers = [await ask(service, make_request("one")), await ask(service, make_request("two"))]
        assert all(answer.finish is not None for answer in answers)
        assert service.is_ready


async def test_stop_ends_every_request_and_those_that_come_too_late(tiny: TinySite) -> None:
    async with serving(tiny, max_sequences=4) as service:
        tasks = [asyncio.create_task(ask(service, request)) for request in sixteen(max_tokens=300)]
        await until(lambda: service.num_running == 4)
        stopping = asyncio.create_task(asyncio.to_thread(service.stop))
        behind = [asyncio.create_task(ask(service, make_request(f"behind{i}", max_tokens=300))) for i in range(3)]
        answers, last = await asyncio.gather(*tasks), await asyncio.gather(*behind)
        await stopping
        assert not service.is_ready
        late = await ask(service, make_request("late"))
        for answer in answers:
            assert (answer.end.reason, answer.end.error) == ("cancelled", "the server is shutting down")
        assert {answer.end.reason for answer in last} <= {"cancelled", "lost"}, (
            "as they came before the end or behind it"
        )
        assert (late.end.reason, late.end.error) == ("lost", "there is no engine to take the request")
        assert late.end.usage.cost == 0


async def test_service_is_ready_between_start_and_stop(tiny: TinySite) -> None:
    built = build_tiny_engine(tiny.model, tiny.router)
    service = EngineService(built.engine, built.info)
    assert not service.is_ready
    service.start()
    assert service.is_ready
    assert service.info.num_layers == NUM_LAYERS
    await asyncio.to_thread(service.stop)
    assert not service.is_ready


async def test_steps_are_reported_with_their_figures(tiny: TinySite) -> None:
    stats: list[StepStats] = []
    async with serving(tiny, on_step=stats.append) as service:
        await ask(service, make_request(num_prompt=9, num_run=4, tenant="t"))
    assert [step.num_rows for step in stats] == [9, *[1] * 11]
    assert sum(step.depth["t"].executed for step in stats) == 20 * 4000
    assert sum(step.depth["t"].skipped for step in stats) == 20 * 1000 * (NUM_LAYERS - 4)
