"""The requests that an engine has not ended yet, seen from its clients' side.

A request is opened, receives events while its client listens, and is settled exactly once, however it ends and whether
or not its client still listens: its Account goes to `settle`.
"""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass

from buddy_server.engine.messages import Account, Event, FinishEvent, FinishReason, GenerationRequest, Usage
from buddy_server.engine.wire import Cancel, Submit

log = logging.getLogger(__name__)

SHUTTING_DOWN = "the server is shutting down"
NO_ENGINE = "there is no engine to take the request"


class _Mailbox:
    """Lists of events until the client takes them, joined: a client that is slow wakes once for many. A failure stays
    alone, so that what came before it is not lost with it."""

    def __init__(self) -> None:
        self._lists: deque[list[Event]] = deque()
        self._filled = asyncio.Event()

    def put(self, events: list[Event]) -> None:
        """From the event loop that takes."""
        if self._lists and not _is_failure(events):
            self._lists[-1].extend(events)
        else:
            self._lists.append(events)
        self._filled.set()

    async def take(self) -> list[Event]:
        await self._filled.wait()
        events = self._lists.popleft()
        if not self._lists:
            self._filled.clear()
        return events


@dataclass(slots=True)
class _OpenRequest:
    """`usage` is the last reported by the engine. `events` is None when the client has left."""

    request: GenerationRequest
    usage: Usage
    loop: asyncio.AbstractEventLoop
    events: _Mailbox | None


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

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._open))

    def __len__(self) -> int:
        return len(self._open)

    async def events(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """Submit `request` and yield its events up to the FinishEvent; those that wait together come as one list.
        Closing the iterator at any point cancels the request."""
        name, mailbox = request.request_id, _Mailbox()
        opened = _OpenRequest(request, Usage(len(request.prompt_tokens)), asyncio.get_running_loop(), mailbox)
        self._open[name] = opened
        ended = False
        try:
            if not self._send(Submit(request)):
                self._hand_over([(name, unused(request, "lost", NO_ENGINE))])
            while not ended:
                events = await mailbox.take()
                ended = isinstance(events[-1], FinishEvent)
                yield events
        finally:
            opened.events = None
            if not ended:
                self._send(Cancel(name))

    def deliver(self, events: list[tuple[str, Event]], usages: list[tuple[str, Usage]]) -> None:
        """Pass on what the engine reports: events by request id, in order, and the usage so far of requests that have
        not ended. Wakes each event loop once. Call from one thread at a time."""
        for name, usage in usages:
            if name in self._open:
                self._open[name].usage = usage
        if usages:
            self._note(usages)
        self._hand_over(events)

    def end_all(self, reason: FinishReason, message: str) -> None:
        """End every request, as `end`."""
        self.end(list(self._open), reason, message)

    def end(self, names: Iterable[str], reason: FinishReason, message: str) -> None:
        """End requests that the engine will report no more on, with their last reported usage. Those that have ended
        already stay as they are."""
        opened = [(name, self._open[name]) for name in names if name in self._open]
        self._hand_over(
            [
                (name, FinishEvent(reason, ended.usage, error=message, max_cost=ended.request.max_cost))
                for name, ended in opened
            ]
        )

    def _hand_over(self, events: list[tuple[str, Event]]) -> None:
        by_request: defaultdict[str, list[Event]] = defaultdict(list)
        for name, event in events:
            by_request[name].append(event)
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, list[Event]]]] = defaultdict(list)
        for name, together in by_request.items():
            last = together[-1]
            opened = self._open.pop(name, None) if isinstance(last, FinishEvent) else self._open.get(name)
            if opened is None:
                continue
            if isinstance(last, FinishEvent):
                self._settle_one(Account(name, opened.request.tenant, last.reason, last.usage, last.max_cost))
            if (mailbox := opened.events) is not None:
                if _is_failure(together[-1:]) and len(together) > 1:
                    by_loop[opened.loop].append((mailbox, together[:-1]))
                    together = [last]
                by_loop[opened.loop].append((mailbox, together))
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


def _is_failure(events: list[Event]) -> bool:
    return isinstance(events[0], FinishEvent) and events[0].error is not None


def _put_all(groups: list[tuple[_Mailbox, list[Event]]]) -> None:
    for mailbox, together in groups:
        mailbox.put(together)
