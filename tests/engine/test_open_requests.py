"""Who waits for events gets them in order, and every request is settled once, whoever listens."""

import asyncio

import pytest

from buddy_server.engine.messages import Account, Event, FinishEvent, TokenEvent, Usage
from buddy_server.engine.open_requests import OpenRequests
from buddy_server.engine.wire import Cancel, Submit
from tiny_engine import make_request

pytestmark = pytest.mark.anyio
TOKENS = [TokenEvent(index, f"{index}", bytes([1])) for index in range(4)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_events_of_a_report_come_as_one_list_for_each_request() -> None:
    commands: list[Submit | Cancel] = []
    settled: list[Account] = []
    requests = OpenRequests(lambda command: commands.append(command) is None, settled.append)
    end = FinishEvent("length", Usage(9, 0, 2, 36000, 4000), max_cost=2000)

    async def heard(name: str) -> list[list[Event]]:
        return [together async for together in requests.events(make_request(name, tenant="acme"))]

    first, second = asyncio.create_task(heard("a")), asyncio.create_task(heard("b"))
    await asyncio.sleep(0)
    events: list[tuple[str, Event]] = [("a", TOKENS[0]), ("b", TOKENS[1]), ("a", TOKENS[2]), ("a", end)]
    requests.deliver([*events, ("nobody", TOKENS[0])], [])
    assert len(requests) == 1
    assert await first == [[TOKENS[0], TOKENS[2], end]]
    requests.deliver([("b", TOKENS[3])], [("b", Usage(9, 0, 2, 36000, 3000))])
    requests.end_all("lost", "gone")
    *said, [ended] = await second
    assert said == [[TOKENS[1]], [TOKENS[3]]]
    assert isinstance(ended, FinishEvent)
    assert (ended.reason, ended.error) == ("lost", "gone")
    assert not any(isinstance(command, Cancel) for command in commands)
    assert settled == [
        Account("a", "acme", "length", Usage(9, 0, 2, 36000, 4000), 2000),
        Account("b", "acme", "lost", Usage(9, 0, 2, 36000, 3000), 4000),
    ]


async def test_events_that_wait_come_as_one_list_and_a_failure_alone() -> None:
    requests = OpenRequests(lambda _: True, lambda _: None)
    stream = requests.events(make_request("a"))
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    requests.deliver([("a", TOKENS[0])], [])
    assert await first == [TOKENS[0]]
    failure = FinishEvent("error", Usage(9), error="broken")
    for event in (TOKENS[1], TOKENS[2], failure):
        requests.deliver([("a", event)], [])
    await asyncio.sleep(0)
    assert [together async for together in stream] == [[TOKENS[1], TOKENS[2]], [failure]]


async def test_a_request_whose_client_has_gone_is_settled_when_the_engine_has_ended_it() -> None:
    commands: list[Submit | Cancel] = []
    settled: list[Account] = []
    requests = OpenRequests(lambda command: commands.append(command) is None, settled.append)
    stream = requests.events(make_request("a"))
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    requests.deliver([("a", TOKENS[0])], [])
    await first
    await stream.aclose()
    assert commands[-1] == Cancel("a")
    assert (settled, len(requests)) == ([], 1)
    requests.deliver([("a", TOKENS[1])], [("a", Usage(9, 0, 2, 36000, 4000))])
    requests.deliver([("a", FinishEvent("cancelled", Usage(9, 0, 3, 36000, 8000)))], [])
    requests.end_all("lost", "gone")
    assert settled == [Account("a", "default", "cancelled", Usage(9, 0, 3, 36000, 8000))]


async def test_a_request_that_no_engine_takes_is_settled_with_nothing() -> None:
    settled: list[Account] = []
    requests = OpenRequests(lambda _: False, settled.append)
    ((ended,),) = [together async for together in requests.events(make_request("a"))]
    assert isinstance(ended, FinishEvent)
    assert (ended.reason, len(requests)) == ("lost", 0)
    assert settled == [Account("a", "default", "lost", Usage(9), 4000)]


async def test_an_account_that_cannot_be_settled_keeps_no_event_from_anyone() -> None:
    def fail(_: Account) -> None:
        raise RuntimeError("no ledger today")

    requests = OpenRequests(lambda _: True, fail)

    async def heard(name: str) -> list[Event]:
        return [event async for together in requests.events(make_request(name)) for event in together]

    asked = [asyncio.create_task(heard(name)) for name in ("a", "b")]
    await asyncio.sleep(0)
    end = FinishEvent("length", Usage(9))
    requests.deliver([("a", end), ("b", TOKENS[0]), ("b", end)], [])
    assert await asyncio.gather(*asked) == [[end], [TOKENS[0], end]]
