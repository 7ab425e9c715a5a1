"""The ledger: each request once, and sums to the integer."""

from datetime import UTC, datetime, timedelta

import anyio
import pytest

from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.store import ledger_store
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.ledger_store import LedgerStore, UsageRow

pytestmark = pytest.mark.anyio


def entry(
    number: int,
    tenant: str = "acme",
    key_id: str | None = "0123456789ab",
    day: str = "2026-11-26",
    layers: int = 8,
    milli_layers: int = 4000,
) -> LedgerEntry:
    return LedgerEntry(
        id=f"chatcmpl-{number}",
        tenant=tenant,
        key_id=key_id,
        model="buddy-7m",
        layers=layers,
        day=day,
        started_ms=1,
        ended_ms=2,
        budget_requested=None,
        budget_granted=0.5,
        decided_by="tenant",
        prompt_tokens=7,
        completion_tokens=3,
        milli_layers=milli_layers,
        outcome="finished",
    )


@pytest.fixture
def ledger(database: Database) -> LedgerStore:
    return LedgerStore(database)


async def test_entry_written_again_counts_once(ledger: LedgerStore) -> None:
    assert await ledger.write([entry(1), entry(2)]) == 2
    assert await ledger.write([entry(2), entry(3), entry(3)]) == 1
    assert await ledger.write([entry(3)]) == 0
    assert await ledger.write([]) == 0
    assert await ledger.usage([]) == [UsageRow((), 3, 21, 9, 1.5)]


async def test_entry_written_by_many_at_once_counts_once(ledger: LedgerStore) -> None:
    written = []

    async def write(first: int) -> None:
        written.append(await ledger.write([entry(first + offset) for offset in range(10)]))

    async with anyio.create_task_group() as tasks:
        for first in range(10):
            tasks.start_soon(write, first)
    assert sum(written) == 19
    assert [row.requests for row in await ledger.usage([])] == [19]


async def test_a_batch_larger_than_a_statement_is_written_whole(ledger: LedgerStore) -> None:
    assert await ledger.write([entry(number) for number in range(5000)]) == 5000
    assert [row.requests for row in await ledger.usage([])] == [5000]


async def test_sums_are_exact_beyond_what_a_float_holds(ledger: LedgerStore) -> None:
    large = 2**53 + 1
    await ledger.write([entry(1, milli_layers=large), entry(2, milli_layers=1), entry(3, milli_layers=1)])
    assert await ledger.month_cost("2026-11", 8) == {"acme": large + 2}


async def test_layer_tokens_of_several_models_are_added_before_they_are_rounded(ledger: LedgerStore) -> None:
    thirds = [entry(number, layers=3, milli_layers=1) for number in range(3)]
    await ledger.write([*thirds, entry(9, layers=8, milli_layers=8000)])
    assert [row.layer_tokens for row in await ledger.usage([])] == [1.001]


async def test_usage_is_grouped_by_any_of_tenant_day_and_key(ledger: LedgerStore) -> None:
    await ledger.write(
        [
            entry(1),
            entry(2, day="2026-11-27"),
            entry(3, key_id=None),
            entry(4, tenant="hobby", key_id="ffffffffffff", milli_layers=600),
        ]
    )
    assert await ledger.usage(["tenant"]) == [
        UsageRow(("acme",), 3, 21, 9, 1.5),
        UsageRow(("hobby",), 1, 7, 3, 0.075),
    ]
    assert [(row.group, row.requests) for row in await ledger.usage(["day"])] == [
        (("2026-11-26",), 3),
        (("2026-11-27",), 1),
    ]
    assert [row.group for row in await ledger.usage(["tenant", "day", "key"])] == [
        ("acme", "2026-11-26", None),
        ("acme", "2026-11-26", "0123456789ab"),
        ("acme", "2026-11-27", "0123456789ab"),
        ("hobby", "2026-11-26", "ffffffffffff"),
    ]


async def test_usage_is_of_one_tenant_and_of_some_days(ledger: LedgerStore) -> None:
    await ledger.write([entry(day, day=f"2026-11-{day}") for day in range(10, 20)])
    await ledger.write([entry(1, tenant="hobby", day="2026-11-12")])
    rows = await ledger.usage(["tenant"], tenant="acme", first_day="2026-11-12", last_day="2026-11-14")
    assert [(row.group, row.requests) for row in rows] == [(("acme",), 3)]
    assert await ledger.usage(["tenant"], tenant="nobody") == []


async def test_cost_of_a_month_is_in_milli_layers_of_the_model(ledger: LedgerStore) -> None:
    await ledger.write(
        [
            entry(1, day="2026-10-31"),
            entry(2, day="2026-11-01"),
            entry(3, day="2026-11-30", layers=16),
            entry(4, day="2026-12-01"),
            entry(5, tenant="hobby"),
        ]
    )
    assert await ledger.month_cost("2026-11", 8) == {"acme": 6000, "hobby": 4000}
    assert await ledger.month_cost("2026-09", 8) == {}


async def test_old_rows_are_deleted_in_several_transactions(
    ledger: LedgerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_store, "_ROWS_A_DELETION", 4)
    await ledger.write([entry(number, day="2026-11-25") for number in range(10)])
    await ledger.write([entry(number) for number in range(10, 13)])
    assert await ledger.delete_before("2026-11-26") == 10
    assert await ledger.delete_before("2026-11-26") == 0
    assert [row.requests for row in await ledger.usage([])] == [3]


async def test_the_last_days_are_kept(ledger: LedgerStore) -> None:
    today = datetime.now(UTC).date()
    days = [(today - timedelta(days=age)).isoformat() for age in range(60)]
    await ledger.write([entry(number, day=day) for number, day in enumerate(days)])
    # One more where midnight has passed since.
    assert await ledger.keep_days(31) in (28, 29)
