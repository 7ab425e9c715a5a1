"""The ledger and a store that comes and goes."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from buddy_server.errors import StoreUnreachable
from buddy_server.metrics import Metrics
from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.ledger.ledger import Ledger
from fakes.engine import INFO

pytestmark = pytest.mark.anyio


class FakeStore:
    """It keeps the ids it is given, while it `answers`."""

    def __init__(self) -> None:
        self.answers = True
        self.ids: list[str] = []

    async def write(self, entries: Sequence[LedgerEntry]) -> int:
        if not self.answers:
            raise StoreUnreachable("away")
        self.ids += [entry.id for entry in entries]
        return len(entries)


def entry(name: str) -> LedgerEntry:
    return LedgerEntry(name, "acme", None, "model", 8, "2026-11-26", 0, 1, 1.0, 1.0, "client", 3, outcome="finished")


async def test_nobody_waits_for_a_store_that_is_away_and_it_gets_every_row_later(tmp_path: Path) -> None:
    store = FakeStore()
    ledger = Ledger(store, tmp_path, Metrics(INFO, []))
    running = asyncio.create_task(ledger.run())
    await asyncio.wait_for(ledger.end(entry("before")), 1)
    store.answers = False
    await asyncio.wait_for(ledger.end(entry("first")), 1)
    assert not ledger.is_reachable
    assert ledger.end(entry("second")).done()
    assert store.ids == ["before"]
    store.answers = True
    async with asyncio.timeout(5):
        while not ledger.is_reachable:
            await asyncio.sleep(0.01)
    assert store.ids == ["before", "first", "second"]
    running.cancel()
    ledger.close()
    assert list(tmp_path.iterdir()) == []
