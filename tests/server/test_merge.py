"""Several streams of events as one."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from buddy_server.api.merge import merge
from buddy_server.engine.messages import Event, StartEvent

pytestmark = pytest.mark.anyio


async def test_one_who_leaves_closes_all_streams_also_those_that_wait() -> None:
    closed: list[str] = []

    async def stream(name: str, pause_s: float) -> AsyncGenerator[list[Event], None]:
        try:
            while True:
                await asyncio.sleep(pause_s)
                yield [StartEvent(0.0)]
        finally:
            closed.append(name)

    async with aclosing(merge([stream("quick", 0.0), stream("slow", 60.0)])) as merged:
        assert await anext(merged) == (0, [StartEvent(0.0)])
    assert sorted(closed) == ["quick", "slow"]
