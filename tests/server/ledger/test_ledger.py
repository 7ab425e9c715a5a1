"""From the end of a request to its row in the store."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from buddy_server.errors import StoreUnreachable
from buddy_server.metrics import Metrics
from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.ledger.journal import Journal, abandoned
from buddy_server.tenancy.ledger.ledger import Ledger
from fakes.engine import INFO
from fakes.entries import entry

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class FakeStore:
    """Takes rows unless it is away, one transaction after the other."""

    rows: dict[str, LedgerEntry] = field(default_factory=dict)
    num_transactions: int = 0
    sizes: list[int] = field(default_factory=list)
    is_away: bool = False
    delay_s: float = 0.0

    async def write(self, entries: Sequence[LedgerEntry]) -> int:
        await asyncio.sleep(self.delay_s)
        if self.is_away:
            raise StoreUnreachable("away")
        self.num_transactions += 1
        self.sizes.append(len(entries))
        new = {one.id: one for one in entries if one.id not in self.rows}
        self.rows |= new
        return len(new)


@dataclass
class Site:
    store: FakeStore
    ledger: Ledger
    metrics: Metrics

    def end(self, name: str) -> None:
        """A request begins and ends."""
        self.ledger.begin(entry(name))
        self.ledger.update(entry(name, outcome="finished"))
        self.ledger.end(entry(name, outcome="finished"))

    async def has_rows(self, number: int) -> None:
        """Wait until the store has so many rows."""
        async with asyncio.timeout(5):
            while len(self.store.rows) < number:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    store, metrics = FakeStore(), Metrics(INFO, [])
    ledger = Ledger(store, tmp_path, metrics)
    writing = asyncio.create_task(ledger.run())
    yield Site(store, ledger, metrics)
    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing
    ledger.close()


async def test_row_comes_to_the_store_soon_and_leaves_the_journal(site: Site, tmp_path: Path) -> None:
    site.end("a")
    await site.has_rows(1)
    assert site.store.rows["a"].outcome == "finished"
    site.ledger.close()
    assert files(tmp_path) == []
    site.ledger = Ledger(site.store, tmp_path, site.metrics)


async def test_rows_are_in_the_store_after_flush(site: Site) -> None:
    site.end("a")
    assert await site.ledger.flush()
    assert set(site.store.rows) == {"a"}


async def test_flush_does_not_wait_for_rows_that_end_meanwhile(site: Site) -> None:
    site.store.delay_s = 0.01

    async def end_many() -> None:
        for index in itertools.count():
            site.end(f"later{index}")
            await asyncio.sleep(0.002)

    site.end("a")
    ending = asyncio.create_task(end_many())
    try:
        for _ in range(5):
            await asyncio.wait_for(site.ledger.flush(), 1)
    finally:
        ending.cancel()
    assert "a" in site.store.rows


async def test_row_that_is_not_in_the_store_is_in_the_journal(site: Site, tmp_path: Path) -> None:
    site.store.is_away = True
    site.end("a")
    assert not await site.ledger.flush()
    site.ledger.close()
    with abandoned(tmp_path) as left:
        assert [(row.id, row.outcome) for row in left] == [("a", "finished")]
    site.ledger = Ledger(site.store, tmp_path, site.metrics)


async def test_rows_that_end_soon_after_each_other_share_a_transaction(site: Site) -> None:
    for index in range(20):
        site.end(f"r{index}")
        await asyncio.sleep(0.001)
    await site.has_rows(20)
    assert site.store.num_transactions <= 3


async def test_rows_of_a_store_that_is_away_come_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buddy_server.tenancy.ledger.ledger.RETRY_S", 0.01)
    site.store.is_away = True
    site.end("a")
    assert not await site.ledger.flush()
    assert not site.ledger.is_reachable
    assert site.store.rows == {}
    site.store.is_away = False
    await site.has_rows(1)
    assert site.ledger.is_reachable


async def test_many_rows_are_written_in_transactions_of_bounded_size(site: Site) -> None:
    site.store.is_away = True
    for index in range(1200):
        site.end(f"r{index}")
    site.store.is_away = False
    await site.has_rows(1200)
    assert max(site.store.sizes) == 500


async def test_rows_of_a_killed_server_are_written_once_and_what_ran_then_was_lost(site: Site, tmp_path: Path) -> None:
    killed = Journal(tmp_path)
    killed.write(entry("ended", outcome="finished", milli_layers=5))
    killed.write(entry("running", milli_layers=7))
    killed.close()
    await site.ledger.recover()
    await site.ledger.recover()
    assert {name: (row.outcome, row.milli_layers) for name, row in site.store.rows.items()} == {
        "ended": ("finished", 5),
        "running": ("error", 7),
    }
    assert site.metrics.registry.get_sample_value("buddy_ledger_rows_total", {"result": "recovered"}) == 2


async def test_rows_of_a_killed_server_wait_while_the_store_is_away(site: Site, tmp_path: Path) -> None:
    killed = Journal(tmp_path)
    killed.write(entry("ended", outcome="finished"))
    killed.close()
    site.store.is_away = True
    with pytest.raises(StoreUnreachable):
        await site.ledger.recover()
    site.store.is_away = False
    await site.ledger.recover()
    assert set(site.store.rows) == {"ended"}
