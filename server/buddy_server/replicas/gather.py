"""Fewer messages about answers, with more in each."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

from buddy_server.engine.messages import Event

PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.25
MOST_PER_S = 100
"""Messages about all answers, unless pauses would be longer than LONGEST_PAUSE_S. Each costs more than a millisecond of
CPU time on its way, with one token or with fifty."""


def pause_s(num_answers: float) -> float:
    """Between two messages about one answer, of so many at once."""
    return min(max(PAUSE_S, num_answers / MOST_PER_S), LONGEST_PAUSE_S)


class Gathering:
    """The answers of one process, which share its messages."""

    def __init__(self) -> None:
        self.num_begun = 0
        """Answers of which the first message was sent, and the last one was not."""

    async def gathered(
        self, answer: AsyncIterator[list[Event]], ended: asyncio.Event
    ) -> AsyncGenerator[list[Event], None]:
        """The lists of `answer`, with a pause between two. The first comes at once, as does the last: `ended` is set
        when that is about to come. An answer joins what comes during a pause (OpenRequests.events)."""
        begun = False
        try:
            async for events in answer:
                if not begun:
                    begun = True
                    self.num_begun += 1
                yield events
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s(self.num_begun)):
                        await ended.wait()
        finally:
            if begun:
                self.num_begun -= 1
