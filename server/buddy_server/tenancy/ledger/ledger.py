"""Keeps the account of every request: in the journal until the store has it, which is soon after its response."""

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from buddy_server.metrics import Metrics
from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.ledger.journal import Journal, abandoned

log = logging.getLogger(__name__)

GATHER_S = 0.05
"""How long ended rows wait for others that share their transaction."""
RETRY_S = 0.5
"""Pause after the store could not be reached."""
MOST_ROWS = 500
"""Rows in one transaction: many, and far from what a store writes in the time it has for one."""


class LedgerWriter(Protocol):
    async def write(self, entries: Sequence[LedgerEntry]) -> int:
        """Add the rows whose id is new, all or none; returns how many were. Raises StoreUnreachable."""
        ...


class Ledger:
    """`begin`, `update` and `end` follow one request and are called on the event loop's thread. No response waits for
    the store: `run` writes there what has ended, many rows in one transaction, and tries again while it is away."""

    def __init__(self, store: LedgerWriter, directory: Path, metrics: Metrics) -> None:
        self._store = store
        self._directory = directory
        self._journal = Journal(directory)
        self._metrics = metrics
        self._pending: dict[str, LedgerEntry] = {}
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self.is_reachable = True

    def begin(self, entry: LedgerEntry) -> None:
        """A request is about to run. Raises OSError if its row cannot be kept."""
        self._journal.write(entry)

    def update(self, entry: LedgerEntry) -> None:
        """What the request has used so far, or in all."""
        try:
            self._journal.write(entry)
        except OSError:
            # The answer goes on: what it used is still in memory, and goes to the store.
            log.exception("journal not written", extra={"request_id": entry.id})

    def end(self, entry: LedgerEntry) -> None:
        """The final row of a request, which `update` has seen. It stays in the journal until the store has it."""
        self._pending[entry.id] = entry
        self._metrics.ledger_pending(len(self._pending))
        self._wake.set()

    async def recover(self) -> None:
        """Write the rows of servers that were killed; requests that ran then were lost. Raises StoreUnreachable."""
        with abandoned(self._directory) as entries:
            ended = [entry if entry.outcome else msgspec.structs.replace(entry, outcome="error") for entry in entries]
            num_new = sum([await self._store.write(rows) for rows in _batches(ended)])
        if ended:
            self._metrics.ledger_recovered(num_new)
            log.info("ledger recovered", extra={"rows": len(ended), "new": num_new})

    async def run(self) -> None:
        """Write ended rows until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            self._wake.clear()
            if not await self.flush():
                self._wake.set()
                await asyncio.sleep(RETRY_S)

    async def flush(self) -> bool:
        """Write what has ended until now; returns whether the store took it."""
        async with self._turn:
            # Not until nothing is left: under load, more has ended whenever some is written.
            for _ in range(0, len(self._pending), MOST_ROWS):
                if not await self._write_pending():
                    return False
        return True

    def close(self) -> None:
        """What the store does not have stays in the journal, for the next server."""
        self._journal.close()

    async def _write_pending(self) -> bool:
        """Write rows that have ended; returns whether the store took them."""
        batch = dict(itertools.islice(self._pending.items(), MOST_ROWS))
        started = time.perf_counter()
        try:
            await self._store.write(list(batch.values()))
        except Exception as error:
            # Whatever it is, the rows are kept and tried again.
            if self.is_reachable:
                log.error("ledger not written", extra={"rows": len(batch), "error": error})
            self.is_reachable = False
            return False
        self.is_reachable = True
        for entry_id in batch:
            del self._pending[entry_id]
            try:
                self._journal.erase(entry_id)
            except OSError:
                # The next server finds it, and that the store has it.
                log.exception("journal not written", extra={"request_id": entry_id})
        self._metrics.ledger_written(len(batch), time.perf_counter() - started)
        self._metrics.ledger_pending(len(self._pending))
        return True


def _batches(entries: list[LedgerEntry]) -> Iterator[list[LedgerEntry]]:
    for start in range(0, len(entries), MOST_ROWS):
        yield entries[start : start + MOST_ROWS]
