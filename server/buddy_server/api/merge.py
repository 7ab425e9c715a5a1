"""Merges several engine requests into one stream of events."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import anyio

from buddy_server.engine.messages import Event

EventStream = AsyncGenerator[list[Event], None]


async def merge(streams: Sequence[EventStream]) -> AsyncGenerator[tuple[int, list[Event]], None]:
    """The events of all `streams` as they arrive, each with the index of its stream.

    However this ends, every stream is closed, which cancels its work. The first exception in any stream ends all.
    """
    try:
        if len(streams) == 1:
            # The usual case avoids a task and a queue, which would cost time at every burst.
            async for events in streams[0]:
                yield 0, events
        else:
            async with aclosing(_merge_many(streams)) as pairs:
                async for pair in pairs:
                    yield pair
    finally:
        # A disconnect cancels again at every await, but the engine must still receive the cancellation.
        with anyio.CancelScope(shield=True):
            for stream in streams:
                await stream.aclose()


async def _merge_many(streams: Sequence[EventStream]) -> AsyncGenerator[tuple[int, list[Event]], None]:
    queue: asyncio.Queue[tuple[int, list[Event]] | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        with anyio.CancelScope(shield=True):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int, stream: EventStream, queue: asyncio.Queue[tuple[int, list[Event]] | Exception | None]
) -> None:
    try:
        async for events in stream:
            queue.put_nowait((index, events))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
