"""Fewer messages about an answer, with more in each."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

from buddy_server.engine.messages import Event


async def gathered(
    answer: AsyncIterator[list[Event]], ended: asyncio.Event, pause_s: float
) -> AsyncGenerator[list[Event], None]:
    """The lists of `answer`, each `pause_s` after the one before it, the first and the last at once. An answer joins
    what comes in between (OpenRequests.events). `ended` is set when its last list is about to come."""
    async for events in answer:
        yield events
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await ended.wait()
