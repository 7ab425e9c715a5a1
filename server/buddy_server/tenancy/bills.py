"""What every admitted request owes: gathered from the accounts of its answers, and settled when the last has come.

The engine reports usage and accounts on a thread of its own; here everything happens on the event loop, in the order of
the reports and before the client receives what a report brought.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from buddy_routing.action_space import MILLI_LAYERS
from buddy_server.clock import now_ms
from buddy_server.engine.messages import Account, EngineInfo, Usage
from buddy_server.errors import Outcome, StoreAway
from buddy_server.tenancy.depth import DecidedBy, DepthDecision
from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.ledger.ledger import Ledger
from buddy_server.tenancy.limits.gate import LimitGate
from buddy_server.tenancy.limits.limiter import Claim, Limits
from buddy_server.tenancy.tenants import Caller

log = logging.getLogger(__name__)

T = TypeVar("T")

SETTLE_TIMEOUT_S = 5.0
"""A response does not wait longer than this for limits whose store is away."""
_MODEL_CHARS = 256


@dataclass(frozen=True, slots=True)
class Order:
    """What a request wants. `id` is the response's, `cost` the most that all of its `num_answers` may use, in
    milli-layers. If it only scores a prompt, the token generated on the way does not count as an answer."""

    id: str
    caller: Caller
    depth: DepthDecision
    num_answers: int
    num_prompt_tokens: int
    cost: int
    scores_only: bool = False


class Bill:
    """The bill of one request. `submitted` announces each of its engine requests before it starts; `close` says that
    none will follow. When every one of them has its account, the bill is settled."""

    def __init__(self, bills: "Bills", order: Order, entry: LedgerEntry, claim: Claim | None) -> None:
        self.entry = entry
        self.claim = claim
        self.headers: Mapping[str, str] = {}
        self._bills = bills
        self._order = order
        self._predicted: dict[str, int] = {}
        self._usages: dict[str, Usage] = {}
        self._running: set[str] = set()
        self._num_left = order.num_answers
        self._outcome: Outcome = "finished"
        self._is_complete = False
        self._settled = asyncio.Event()

    def submitted(self, request_id: str) -> None:
        self._num_left -= 1
        self._running.add(request_id)
        self._bills.expect(request_id, self)

    def close(self, outcome: Outcome) -> None:
        """The request has ended, with `outcome` if some of it was never submitted."""
        if self._num_left:
            self._num_left = 0
            self._outcome = outcome
            self._settle_if_complete()

    def predicted(self, request_id: str, max_cost: int) -> None:
        """The Budget Predictor's choice for an engine request. The deepest counts as the request's."""
        self._predicted[request_id] = max_cost
        self._grant(max(self._predicted.values()), "predictor")

    def note(self, request_id: str, usage: Usage) -> None:
        """What one engine request has used so far."""
        self._usages[request_id] = usage
        usages = self._usages.values()
        num_completion = 0 if self._order.scores_only else sum(used.completion_tokens for used in usages)
        self.entry = replace(
            self.entry,
            cached_tokens=sum(used.cached_tokens for used in usages),
            completion_tokens=num_completion,
            milli_layers=sum(used.cost for used in usages),
        )

    def account(self, account: Account) -> None:
        """The last word on one engine request."""
        name = account.request_id
        self.note(name, account.usage)
        if self._order.depth.min_cost is not None and name not in self._predicted:
            self.predicted(name, account.max_cost)
        if account.max_cost < self._predicted.get(name, self._order.depth.max_cost):
            self._grant(account.max_cost, "elastic")
        if account.reason in ("error", "lost"):
            self._outcome = "error"
        elif account.reason == "cancelled" and self._outcome == "finished":
            self._outcome = "cancelled"
        self._running.discard(name)
        self._settle_if_complete()

    async def settled(self) -> None:
        """Wait until limits and journal know what the request used, as far as either is kept."""
        if self._bills.keep(self):
            with suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_TIMEOUT_S):
                    await self._settled.wait()

    def _grant(self, max_cost: int, decided_by: DecidedBy) -> None:
        budget = max_cost / (MILLI_LAYERS * self.entry.layers)
        if decided_by == "elastic" == self.entry.decided_by:
            budget = min(budget, self.entry.budget_granted)
        self.entry = replace(self.entry, budget_granted=budget, decided_by=decided_by)

    def _settle_if_complete(self) -> None:
        if not self._num_left and not self._running and not self._is_complete:
            self._is_complete = True
            self.entry = replace(self.entry, outcome=self._outcome, ended_ms=now_ms())
            self._bills.settle(self).add_done_callback(lambda _: self._settled.set())


class Bills:
    """The bills that are open. Without a `ledger`, only limits are kept. `is_ready` returns whether the store answers,
    or need not."""

    def __init__(self, info: EngineInfo, gate: LimitGate, ledger: Ledger | None, is_ready: Callable[[], bool]) -> None:
        self._info = info
        self._gate = gate
        self._ledger = ledger
        self._is_ready = is_ready
        self._open: dict[str, Bill] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._reports: deque[Callable[[], None]] = deque()
        self._is_woken = False

    async def open(self, order: Order) -> Bill:
        """Reserve what `order` may use, and begin its row of the ledger.

        Raises RateLimited, InsufficientQuota, and StoreAway if limits or ledger are required and cannot be reached.
        """
        self._loop = asyncio.get_running_loop()
        tenant = order.caller.tenant
        if not self._is_ready():
            raise StoreAway
        limits = self._gate.limits(tenant.tier)
        entry = self._entry(order)
        claim = Claim(order.id, tenant.name, order.cost, entry.day[:7], limits) if limits != Limits() else None
        bill = Bill(self, order, entry, claim)
        if claim is not None:
            bill.headers = await self._gate.reserve(claim, tenant)
        if self._ledger is not None:
            try:
                self._ledger.begin(entry)
            except OSError as error:
                log.exception("journal not written")
                if claim is not None:
                    await self._gate.withdraw(claim)
                raise StoreAway("The ledger") from error
        return bill

    def keep(self, bill: Bill) -> bool:
        """Whether anything is to be settled in the end."""
        return bill.claim is not None or self._ledger is not None

    def expect(self, request_id: str, bill: Bill) -> None:
        """The accounts of an engine request go to `bill`."""
        if self.keep(bill):
            self._open[request_id] = bill

    def note(self, usages: Sequence[tuple[str, Usage]]) -> None:
        """What open engine requests have used so far. May be called from any thread, as `account`."""
        if self._ledger is not None:
            self._call(self._note, usages)

    def account(self, account: Account) -> None:
        """The last word on an engine request."""
        self._call(self._account, account)

    def settle(self, bill: Bill) -> asyncio.Task[None]:
        """Settle a bill that is complete; the task ends when limits have it and the ledger will."""
        settling = asyncio.create_task(self._settle(bill))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        return settling

    async def close(self, timeout_s: float) -> None:
        """Wait until all is settled, as long as that takes no longer than `timeout_s`."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=timeout_s)

    async def _settle(self, bill: Bill) -> None:
        """Tell the limits, then the ledger. In this order: what the ledger knows, the limits have counted."""
        entry = bill.entry
        if bill.claim is not None:
            await self._gate.settle(bill.claim, entry.milli_layers)
        if self._ledger is not None:
            self._ledger.end(entry)

    def _call(self, take: Callable[[T], None], what: T) -> None:
        """Have the event loop take what the engine reports."""
        if not self._open or self._loop is None:
            return
        self._reports.append(partial(take, what))
        # Waking the loop costs more than all it then does, so it is woken once for what comes together.
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._take_reports)
            except RuntimeError:
                log.warning("event loop closed")

    def _take_reports(self) -> None:
        # First of all: a report that comes now wakes the loop again.
        self._is_woken = False
        while self._reports:
            try:
                self._reports.popleft()()
            except Exception:
                # A bug must not hold up the reports on other requests.
                log.exception("report not taken")

    def _note(self, usages: Sequence[tuple[str, Usage]]) -> None:
        for name, usage in usages:
            if (bill := self._open.get(name)) is not None:
                bill.note(name, usage)
                self._keep(bill)

    def _account(self, account: Account) -> None:
        if (bill := self._open.pop(account.request_id, None)) is not None:
            # Settling begins with the next turn of the loop, when the journal has the row.
            bill.account(account)
            self._keep(bill)

    def _keep(self, bill: Bill) -> None:
        if self._ledger is not None:
            self._ledger.update(bill.entry)

    def _entry(self, order: Order) -> LedgerEntry:
        requested = order.depth.requested
        started_ms = now_ms()
        return LedgerEntry(
            id=order.id,
            tenant=order.caller.tenant.name,
            key_id=order.caller.key_id,
            model=self._info.model_id[:_MODEL_CHARS],
            layers=self._info.num_layers,
            day=time.strftime("%Y-%m-%d", time.gmtime(started_ms / 1000)),
            started_ms=started_ms,
            ended_ms=started_ms,
            budget_requested=None if requested == "auto" else requested,
            budget_granted=order.depth.granted,
            decided_by=order.depth.decided_by,
            prompt_tokens=order.num_prompt_tokens,
        )
