"""Messages about answers, with a pause that no test would live to see the end of."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from buddy_server.engine.messages import Event, FinishEvent, StartEvent, TokenEvent, Usage
from buddy_server.replicas import gather
from buddy_server.replicas.gather import Gathering, pause_s

pytestmark = pytest.mark.anyio

NEVER_S = 3600.0
FIRST: list[Event] = [StartEvent(0.0), TokenEvent(1, "a", b"")]
LAST: list[Event] = [TokenEvent(2, "b", b""), FinishEvent("length", Usage(1))]


@pytest.fixture
def endless_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "PAUSE_S", NEVER_S)
    monkeypatch.setattr(gather, "LONGEST_PAUSE_S", NEVER_S)


async def answer(*lists: list[Event]) -> AsyncIterator[list[Event]]:
    for events in lists:
        yield events


@pytest.mark.usefixtures("endless_pause")
async def test_the_first_list_comes_at_once_and_the_second_after_the_pause() -> None:
    lists = Gathering().gathered(answer(FIRST, LAST), asyncio.Event())
    assert await anext(lists) == FIRST
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(lists)


@pytest.mark.usefixtures("endless_pause")
async def test_an_end_cuts_the_pause_short() -> None:
    ended = asyncio.Event()
    lists = Gathering().gathered(answer(FIRST, LAST), ended)
    assert await anext(lists) == FIRST
    asyncio.get_running_loop().call_soon(ended.set)
    async with asyncio.timeout(5):
        assert await anext(lists) == LAST


async def test_all_lists_come_in_order() -> None:
    lists = Gathering().gathered(answer(FIRST, FIRST, LAST), asyncio.Event())
    assert [events async for events in lists] == [FIRST, FIRST, LAST]


async def test_answers_count_from_their_first_list_to_their_end() -> None:
    gathering = Gathering()
    first, second = (gathering.gathered(answer(FIRST, LAST), asyncio.Event()) for _ in range(2))
    assert gathering.num_begun == 0
    await anext(first)
    await anext(second)
    assert gathering.num_begun == 2
    third = gathering.gathered(answer(FIRST, LAST), asyncio.Event())
    await third.aclose()
    await first.aclose()
    assert gathering.num_begun == 1
    assert [events async for events in second] == [LAST]
    assert gathering.num_begun == 0


def test_all_answers_have_at_most_a_hundred_messages_a_second_unless_each_would_have_fewer_than_four() -> None:
    assert [pause_s(num) for num in (0, 1, 5, 8, 16, 25, 26, 1000)] == [0.05, 0.05, 0.05, 0.08, 0.16, 0.25, 0.25, 0.25]
