"""The requests that an engine has not ended yet, seen from its clients' side.

A request is opened, receives events while its client listens, and is settled exactly once, however it ends and whether
or not its client still listens: its Account goes to `settle`.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from buddy_server.engine.messages import Account, Event, FinishEvent, FinishReason, GenerationRequest, Usage
from buddy_server.engine.wire import Cancel, Report, Submit

log = logging.getLogger(__name__)

SHUTTING_DOWN = "the server is shutting down"
NO_ENGINE = "there is no engine to take the request"

_Queue = asyncio.Queue[list[Event]]


@dataclass(slots=True)
class _OpenRequest:
    """`usage` is the last reported by the engine. `events` is None when the client has left."""

    request: GenerationRequest
    usage: Usage
    loop: asyncio.AbstractEventLoop
    events: _Queue | None


class OpenRequests:
    """`send` passes a command to the engine, from any thread, and returns whether the engine will answer it. `note` and
    `settle` are called on the thread that calls `deliver`, before the clients receive what it brings: `note` with the
    usage of open requests, `settle` with the account of one that has ended."""

    def __init__(
        self,
        send: Callable[[Submit | Cancel], bool],
        settle: Callable[[Account], None],
        note: Callable[[list[tuple[str, Usage]]], None] = lambda _: None,
    ) -> None:
        self._send = send
        self._settle = settle
        self._note = note
        self._open: dict[str, _OpenRequest] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def events(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """Submit `request` and yield its events up to the FinishEvent; events delivered together come as one list.
        Closing the iterator at any point cancels the request."""
        name, queue = request.request_id, _Queue()
        opened = _OpenRequest(request, Usage(len(request.prompt_tokens)), asyncio.get_running_loop(), queue)
        self._open[name] = opened
        ended = False
        try:
            if not self._send(Submit(request)):
                self._hand_over([(name, unused(request, "lost", NO_ENGINE))])
            while not ended:
                events = await queue.get()
                ended = isinstance(events[-1], FinishEvent)
                yield events
        finally:
            opened.events = None
            if not ended:
                self._send(Cancel(name))

    def deliver(self, report: Report) -> None:
        """Pass on what the engine reports, waking each event loop once. Call from one thread at a time."""
        for name, usage in report.usages:
            if name in self._open:
                self._open[name].usage = usage
        if report.usages:
            self._note(report.usages)
        self._hand_over(report.events)

    def end_all(self, reason: FinishReason, message: str) -> None:
        """End every request that the engine will report no more on, with its last reported usage."""
        waiting = list(self._open.items())
        self._hand_over(
            [
                (name, FinishEvent(reason, opened.usage, error=message, max_cost=opened.request.max_cost))
                for name, opened in waiting
            ]
        )

    def _hand_over(self, events: list[tuple[str, Event]]) -> None:
        by_request: defaultdict[str, list[Event]] = defaultdict(list)
        for name, event in events:
            by_request[name].append(event)
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Queue, list[Event]]]] = defaultdict(list)
        for name, together in by_request.items():
            last = together[-1]
            opened = self._open.pop(name, None) if isinstance(last, FinishEvent) else self._open.get(name)
            if opened is None:
                continue
            if isinstance(last, FinishEvent):
                self._settle_one(Account(name, opened.request.tenant, last.reason, last.usage, last.max_cost))
            if (queue := opened.events) is not None:
                if isinstance(last, FinishEvent) and last.error is not None and len(together) > 1:
                    # A failure comes alone: what came before it is not lost with it.
                    by_loop[opened.loop].append((queue, together[:-1]))
                    together = [last]
                by_loop[opened.loop].append((queue, together))
        for loop, groups in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, groups)
            except RuntimeError:
                self._forget(loop)

    def _settle_one(self, account: Account) -> None:
        try:
            self._settle(account)
        except Exception:
            # Whatever cannot be settled, clients still receive their events.
            log.exception("account not settled", extra={"account": account})

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drop the clients of an event loop that has closed."""
        for name, opened in list(self._open.items()):
            if opened.loop is loop and opened.events is not None:
                log.info("event loop closed", extra={"request_id": name})
                opened.events = None
                self._send(Cancel(name))


def unused(request: GenerationRequest, reason: FinishReason, message: str | None) -> FinishEvent:
    """The end of a request for which the engine has computed nothing."""
    return FinishEvent(reason, Usage(len(request.prompt_tokens)), error=message, max_cost=request.max_cost)


def _put_all(groups: list[tuple[_Queue, list[Event]]]) -> None:
    for queue, together in groups:
        queue.put_nowait(together)
