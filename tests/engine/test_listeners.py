"""Who waits for events gets them in order, those of one report together."""

import asyncio

import pytest

from buddy_server.engine.listeners import Listeners
from buddy_server.engine.messages import Event, FinishEvent, TokenEvent
from buddy_server.engine.wire import Cancel, Submit
from tiny_engine import make_request

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_events_of_a_report_come_as_one_list_for_each_request() -> None:
    commands: list[Submit | Cancel] = []
    listeners = Listeners(lambda command: commands.append(command) is None)
    tokens = [TokenEvent(index, f"{index}", (0,)) for index in range(4)]
    end = FinishEvent("length", 1, 2, 0, 0)

    async def heard(name: str) -> list[list[Event]]:
        return [together async for together in listeners.events(make_request(name))]

    first, second = asyncio.create_task(heard("a")), asyncio.create_task(heard("b"))
    await asyncio.sleep(0)
    listeners.deliver([("a", tokens[0]), ("b", tokens[1]), ("a", tokens[2]), ("a", end), ("nobody", tokens[0])])
    assert len(listeners) == 1
    assert await first == [[tokens[0], tokens[2], end]]
    listeners.deliver([("b", tokens[3])])
    listeners.end_all("error", "gone")
    *said, [ended] = await second
    assert said == [[tokens[1]], [tokens[3]]]
    assert isinstance(ended, FinishEvent)
    assert (ended.reason, ended.error) == ("error", "gone")
    assert not any(isinstance(command, Cancel) for command in commands)
