"""Messages about an answer, with a pause that no test would live to see the end of."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from buddy_server.engine.messages import Event, FinishEvent, StartEvent, TokenEvent, Usage
from buddy_server.replicas.gather import gathered

pytestmark = pytest.mark.anyio

NEVER_S = 3600.0
FIRST: list[Event] = [StartEvent(0.0), TokenEvent(1, "a", b"")]
LAST: list[Event] = [TokenEvent(2, "b", b""), FinishEvent("length", Usage(1))]


async def answer(*lists: list[Event]) -> AsyncIterator[list[Event]]:
    for events in lists:
        yield events


async def test_the_first_list_comes_at_once_and_the_second_after_the_pause() -> None:
    lists = gathered(answer(FIRST, LAST), asyncio.Event(), NEVER_S)
    assert await anext(lists) == FIRST
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(lists)


async def test_an_end_cuts_the_pause_short() -> None:
    ended = asyncio.Event()
    lists = gathered(answer(FIRST, LAST), ended, NEVER_S)
    assert await anext(lists) == FIRST
    asyncio.get_running_loop().call_soon(ended.set)
    async with asyncio.timeout(5):
        assert await anext(lists) == LAST


async def test_all_lists_come_in_order_without_a_pause_to_wait_for() -> None:
    assert [events async for events in gathered(answer(FIRST, FIRST, LAST), asyncio.Event(), 0.0)] == [
        FIRST,
        FIRST,
        LAST,
    ]
