"""Who may use the server now, as file and store say it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from buddy_server.config import load_config
from buddy_server.errors import InvalidApiKey, StoreUnreachable, TenantDisabled
from buddy_server.metrics import Metrics
from buddy_server.tenancy.book import TenantBook
from buddy_server.tenancy.keys import KeySecret, make_key
from buddy_server.tenancy.policy import Tier
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.tenant_store import TenantStore
from fakes.engine import INFO

FILE = """
tiers:
  free: {{max_budget: {budget}}}
tenants:
  acme: {{tier: free, key_sha256: [{digest}]}}
store: {{url: "sqlite:///{folder}/store.db"}}
"""
# Of "sk-acme".
DIGEST = "ce2a7d0f2a9c93b4f6a1e7d5a8a2d3c1b2f40e1f0f7a0d0c5a9e6b3d4c2f1a0b"
pytestmark = pytest.mark.anyio


def file_text(file: Path) -> str:
    return file.read_text()


def rewrite(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "buddy.yaml"
    path.write_text(FILE.format(budget=0.5, digest=DIGEST, folder=tmp_path))
    return path


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[TenantStore]:
    database = Database(f"sqlite:///{tmp_path}/store.db")
    await database.migrate()
    yield TenantStore(database)
    await database.close()


@pytest.fixture
def book(file: Path, store: TenantStore) -> TenantBook:
    config = load_config(file)
    return TenantBook(config, file, INFO.actions, Metrics(INFO, config.tenants), store, KeySecret(b"s" * 32))


async def add_key(store: TenantStore, tenant: str, expires_ms: int | None = None) -> tuple[str, str]:
    """The id of a new key, and its header."""
    key = make_key()
    mac = KeySecret(b"s" * 32).mac(key.text)
    await store.add_key(key.id, mac, tenant, expires_ms, file_tenants=("acme",), actor="test")
    return key.id, f"Bearer {key.text}"


async def test_tenants_and_keys_of_the_store_count_once_it_is_followed(book: TenantBook, store: TenantStore) -> None:
    await store.create_tenant("umbrella", "free", file_tiers=("free",), actor="test")
    key_id, header = await add_key(store, "umbrella")
    with pytest.raises(InvalidApiKey):
        book.authenticate(header)
    await book.refresh()
    caller = book.authenticate(header)
    assert (caller.tenant.name, caller.tenant.tier.max_budget, caller.key_id) == ("umbrella", 0.5, key_id)


async def test_revoked_expired_and_changed_keys_are_refused(book: TenantBook, store: TenantStore) -> None:
    revoked, header = await add_key(store, "acme")
    await book.refresh()
    assert book.authenticate(header).tenant.name == "acme"
    await store.revoke_key(revoked, actor="test")
    _, expired = await add_key(store, "acme", expires_ms=time.time_ns() // 1_000_000 - 1)
    await book.refresh()
    for bad in (header, expired, header[:-1] + ("a" if header[-1] != "a" else "b")):
        with pytest.raises(InvalidApiKey) as refused:
            book.authenticate(bad)
        assert bad.removeprefix("Bearer ") not in str(refused.value)


async def test_disabled_tenant_is_told_so(book: TenantBook, store: TenantStore) -> None:
    await store.create_tenant("umbrella", "free", file_tiers=("free",), actor="test")
    _, header = await add_key(store, "umbrella")
    await store.change_tenant("umbrella", disabled=True, file_tiers=("free",), actor="test")
    await book.refresh()
    with pytest.raises(TenantDisabled, match="umbrella"):
        book.authenticate(header)


async def test_definition_in_the_file_counts_over_the_store(book: TenantBook, store: TenantStore) -> None:
    await store.put_tier(Tier("free", max_budget=1.0), actor="test")
    await store.put_tier(Tier("pro"), actor="test")
    await store.create_tenant("acme", "pro", file_tiers=(), actor="test")
    await store.create_tenant("umbrella", "free", file_tiers=(), actor="test")
    await store.change_tenant("acme", disabled=True, file_tiers=(), actor="test")
    _, header = await add_key(store, "acme")
    await book.refresh()
    assert book.authenticate(header).tenant.tier.name == "free"
    assert {name: tenant.tier.max_budget for name, tenant in book.tenants.items()} == {"acme": 0.5, "umbrella": 0.5}


async def test_changed_file_is_followed_whole(book: TenantBook, file: Path) -> None:
    rewrite(file, "0.5", "0.75")
    await book.reload()
    assert book.tenants["acme"].tier.max_budget == 0.75


@pytest.mark.parametrize("wrong", ["2.5", "0.01", "{"])
async def test_bad_file_changes_nothing_and_the_log_names_the_line(
    book: TenantBook, file: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(file, "0.5", wrong)
    with caplog.at_level(logging.ERROR):
        await book.reload()
    assert book.tenants["acme"].tier.max_budget == 0.5
    [record] = caplog.records
    assert record.message == "configuration refused"
    reason = str(record.__dict__["reason"])
    assert "buddy.yaml:3: tiers.free.max_budget" in reason or "line 3" in reason


async def test_server_with_keys_does_not_become_an_open_one(book: TenantBook, file: Path) -> None:
    rewrite(file, FILE.format(budget=0.5, digest=DIGEST, folder=file.parent), "tiers: {}")
    await book.reload()
    assert set(book.tenants) == {"acme"}


@pytest.mark.parametrize(
    "new",
    [
        "tiers: {free: {}}\ntenants: {acme: {tier: free}}\nstore: {url: 'sqlite:///x.db'}",
        "store: {url: 'sqlite:///x.db'}",
        "max_waiting: 2026-13-45",
    ],
)
async def test_reload_never_opens_a_server_without_a_store(file: Path, new: str) -> None:
    rewrite(file, file_text(file).partition("store:")[2], "")
    rewrite(file, "store:", "")
    config = load_config(file)
    book = TenantBook(config, file, INFO.actions, Metrics(INFO, config.tenants))
    rewrite(file, file_text(file), new)
    await book.reload()
    with pytest.raises(InvalidApiKey):
        book.authenticate(None)


async def test_file_changed_while_the_server_starts_is_noticed(book: TenantBook, file: Path) -> None:
    rewrite(file, "0.5", "0.75")
    watching = asyncio.create_task(book.watch_file(asyncio.Event()))
    async with asyncio.timeout(5):
        while book.tenants["acme"].tier.max_budget == 0.5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    watching.cancel()


@pytest.mark.parametrize("error", [StoreUnreachable("away"), ZeroDivisionError()])
async def test_store_that_fails_counts_as_away_and_leaves_everyone_as_they_were(
    book: TenantBook, store: TenantStore, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> int:
        raise error

    _, header = await add_key(store, "acme")
    await book.refresh()
    with monkeypatch.context() as failing:
        failing.setattr(store, "revision", fail)
        await book.refresh()
    assert not book.is_reachable
    assert book.authenticate(header).tenant.name == "acme"
    await book.refresh()
    assert book.is_reachable


async def test_tier_that_a_tenant_of_the_store_is_in_cannot_leave_the_file(
    book: TenantBook, store: TenantStore, file: Path
) -> None:
    await store.create_tenant("umbrella", "free", file_tiers=("free",), actor="test")
    await book.refresh()
    rewrite(file, "free", "basic")
    await book.reload()
    assert book.tenants["umbrella"].tier.name == "free"


async def test_what_needs_a_restart_stays_as_it_is(
    book: TenantBook, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(file, "store:", "engine: {max_sequences: 3}\nmax_waiting: 7\nstore:")
    with caplog.at_level(logging.WARNING):
        await book.reload()
    assert book.config.engine.max_sequences == 32
    assert book.config.max_waiting == 7
    assert any("restart" in record.message for record in caplog.records)
