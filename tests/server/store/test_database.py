"""Migrations, and a database that is away."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from buddy_server.errors import ConfigError, StoreUnreachable
from buddy_server.tenancy.store.database import TIMEOUT_S, Database
from buddy_server.tenancy.store.ledger_store import LedgerStore
from buddy_server.tenancy.store.tables import metadata
from buddy_server.tenancy.store.tenant_store import TenantStore
from postgres_process import PASSWORD, Postgres

pytestmark = pytest.mark.anyio

MIGRATE = """
import asyncio, sys
from buddy_server.tenancy.store.database import Database
sys.stdin.readline()
asyncio.run(Database(sys.argv[1]).migrate())
"""


async def test_migrations_make_the_tables_that_the_code_declares(database: Database) -> None:
    async with database.reading() as connection:
        differences = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync), metadata)
        )
    assert differences == []


async def test_migrating_again_changes_nothing(database: Database) -> None:
    await TenantStore(database).create_tenant("acme", "free", file_tiers={"free"}, actor="test")
    await database.migrate()
    assert await TenantStore(database).revision() == 1


async def test_database_of_a_newer_version_is_refused_as_such(database: Database) -> None:
    async with database.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match=r"store\.url: .* was made by a newer version of this server: .*'9999'"):
        await database.migrate()


async def test_missing_table_is_a_store_that_cannot_be_reached_until_it_is_there(url: str) -> None:
    database = Database(url)
    with pytest.raises(StoreUnreachable, match="revision"):
        await TenantStore(database).revision()
    await database.migrate()
    assert await TenantStore(database).revision() == 0
    await database.close()


async def test_missing_right_is_named_without_the_password(postgres_server: Postgres) -> None:
    own = Database(postgres_server.create_database("rights"))
    async with own.writing() as connection:
        await connection.execute(text("CREATE ROLE guest LOGIN PASSWORD 'guest-password'"))
    guest = Database(f"postgresql://guest:guest-password@127.0.0.1:{postgres_server.port}/rights")
    with pytest.raises(StoreUnreachable, match="permission denied for schema public") as refused:
        await guest.migrate()
    await own.migrate()
    with pytest.raises(StoreUnreachable, match="permission denied for table revision"):
        await TenantStore(guest).revision()
    assert "guest-password" not in str(refused.value)
    await guest.close()
    await own.close()


async def test_report_may_outlast_a_request_and_holds_up_no_writer(database: Database) -> None:
    store = TenantStore(database)
    async with database.reporting() as connection:
        if database.sqlite_file is None:
            await connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": TIMEOUT_S + 0.1})
        else:
            await connection.execute(text("SELECT value FROM revision"))
            await anyio.sleep(TIMEOUT_S + 0.1)
        await store.create_tenant("acme", "free", file_tiers={"free"}, actor="test")
        assert (await connection.execute(text("SELECT value FROM revision"))).scalar_one() == 0
    assert await store.revision() == 1


def test_processes_that_migrate_at_once_all_succeed(url: str) -> None:
    environment = {"PYTHONPATH": ":".join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", MIGRATE, url], stdin=subprocess.PIPE, env=environment) for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(timeout=60) for process in processes] == [0] * 4


async def test_changes_in_many_tasks_at_once_are_all_made(database: Database) -> None:
    store = TenantStore(database)

    async def create(name: str) -> None:
        await store.create_tenant(name, "free", file_tiers={"free"}, actor="test")

    async with anyio.create_task_group() as tasks:
        for index in range(20):
            tasks.start_soon(create, f"tenant-{index}")
    snapshot = await store.snapshot()
    assert (snapshot.revision, len(snapshot.tenants)) == (20, 20)


async def test_sqlite_keeps_a_write_ahead_log(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'buddy.db'}")
    async with database.reading() as connection:
        pragmas = [
            (await connection.execute(text(f"PRAGMA {name}"))).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert pragmas == ["wal", 1, 1]
    await database.close()


async def test_sqlite_files_are_for_this_user_alone(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'buddy.db'}")
    await database.migrate()
    async with database.reading() as connection:
        await connection.execute(text("SELECT value FROM revision"))
        assert modes(tmp_path) == dict.fromkeys(("buddy.db", "buddy.db-wal", "buddy.db-shm"), 0o600)
    await database.close()


async def test_mode_of_a_file_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "buddy.db").touch(mode=0o640)
    database = Database(f"sqlite:///{tmp_path / 'buddy.db'}")
    await database.migrate()
    assert modes(tmp_path) == {"buddy.db": 0o640}
    await database.close()


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@h/d", "sqlite://", "sqlite:///:memory:", "postgresql+psycopg://h/d", "x"]
)
def test_url_of_another_kind_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.url: .*allowed is sqlite:///PATH or postgresql://") as refused:
        Database(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["postgresql://u:a@secret@h/d", "postgresql://u@h/d?password=secret"])
def test_password_in_the_wrong_place_is_not_shown(url: str) -> None:
    try:
        shown = str(Database(url))
    except ConfigError as error:
        shown = str(error)
    assert "secret" not in shown


def test_sslmode_of_other_clients_is_understood() -> None:
    assert str(Database("postgresql://h/d?sslmode=require")) == "postgresql+asyncpg://h/d?ssl=require"


async def test_missing_folder_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnreachable, match=r"gone/buddy\.db: the folder does not exist"):
        await Database(f"sqlite:///{tmp_path}/gone/buddy.db").migrate()


async def test_locked_file_is_unreachable_in_time_and_then_recovers(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'buddy.db'}")
    await database.migrate()
    store = TenantStore(database)
    other = sqlite3.connect(tmp_path / "buddy.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with in_time(), pytest.raises(StoreUnreachable, match=r"buddy\.db: "):
        await store.create_tenant("acme", "free", file_tiers={"free"}, actor="test")
    assert await store.revision() == 0
    other.close()
    await store.create_tenant("acme", "free", file_tiers={"free"}, actor="test")
    assert await store.revision() == 1
    await database.close()


async def test_stopped_postgres_is_unreachable_in_time_and_then_recovers(postgres_server: Postgres) -> None:
    database = Database(postgres_server.create_database("stopped"))
    await database.migrate()
    store = TenantStore(database)
    await store.revision()
    postgres_server.stop()
    try:
        with in_time(), pytest.raises(StoreUnreachable) as refused:
            await store.revision()
    finally:
        postgres_server.start()
    assert f"127.0.0.1:{postgres_server.port}/stopped" in str(refused.value)
    assert PASSWORD not in str(refused.value)
    assert await store.revision() == 0
    await database.close()


async def test_frozen_postgres_is_unreachable_in_time_and_then_recovers(postgres_server: Postgres) -> None:
    database = Database(postgres_server.create_database("frozen"))
    await database.migrate()
    store = TenantStore(database)
    await store.revision()
    with frozen(postgres_server):
        with in_time(), pytest.raises(StoreUnreachable, match="no answer within 2 s"):
            await store.revision()
        with in_time(), pytest.raises(StoreUnreachable, match="no answer within 2 s"):
            await store.create_tenant("acme", "free", file_tiers={"free"}, actor="test")
        with in_time(), pytest.raises(StoreUnreachable, match="no answer within"):
            await LedgerStore(database).month_cost("2026-11", 8)
    assert await store.revision() == 0
    await database.close()


async def test_postgres_frozen_in_a_transaction_is_unreachable_in_time(postgres_server: Postgres) -> None:
    database = Database(postgres_server.create_database("frozen_within"))

    async def freeze_between_statements() -> None:
        async with database.writing() as connection:
            await connection.execute(text("SELECT 1"))
            with frozen(postgres_server):
                await connection.execute(text("SELECT 1"))

    with in_time(), pytest.raises(StoreUnreachable, match="no answer within 2 s"):
        await freeze_between_statements()
    await database.close()


async def test_wrong_password_is_not_repeated(postgres_server: Postgres) -> None:
    database = Database(postgres_server.url().replace(PASSWORD, "wrong-password"))
    with pytest.raises(StoreUnreachable, match="password authentication failed") as refused:
        await TenantStore(database).revision()
    assert "wrong-password" not in str(refused.value)
    await database.close()


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@contextmanager
def in_time() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 3


@contextmanager
def frozen(server: Postgres) -> Iterator[None]:
    pids = server.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
