"""The store's database, SQLite or PostgreSQL: connections, transactions, and the errors of both."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, Executable, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from buddy_server.errors import ConfigError, StoreUnreachable

TIMEOUT_S = 2.0
"""The longest that a transaction takes before the store counts as unreachable."""
REPORT_TIMEOUT_S = 60.0
"""For sums over the ledger, which may have many millions of rows."""
MIGRATION_TIMEOUT_S = 60.0
_STATEMENT_SHARE = 0.5
"""Of a transaction's time, for each statement: the rest is left for closing a connection that does not answer."""
_NUM_REPORTS = 4
"""At once. Each has a connection, and a PostgreSQL has few of them."""
_MIGRATION_LOCK = 0x6275646479
"""The advisory lock, an arbitrary number, that lets one process at a time migrate a PostgreSQL database."""


class Database:
    """The database at `url`: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE. Nothing connects before the
    first transaction. A database belongs to one event loop.

    Raises ConfigError for another kind of URL.
    """

    def __init__(self, url: str) -> None:
        self._url = _checked(url)
        self._engine = _make_engine(self._url, TIMEOUT_S)
        # Kept connections would let a report wait for a server that no longer answers, where connecting fails soon.
        self._report_engine = _make_engine(self._url, REPORT_TIMEOUT_S, keep_connections=False)
        self._report_turns = asyncio.Semaphore(_NUM_REPORTS)
        self._blocking = None if self.sqlite_file is None else _make_blocking_engine(self._url)

    @property
    def sqlite_file(self) -> Path | None:
        """The file of an SQLite database."""
        return Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None

    @property
    def name(self) -> str:
        """A file name that only this database has, among all hosts."""
        where = f"{self._url.host}:{self._url.port or ''}/{self._url.database}"
        return hashlib.sha256(where.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self._url.difference_update_query(["password"]).render_as_string(hide_password=True)

    async def migrate(self) -> None:
        """Bring the tables to the newest version; several processes may do so at once. Raises StoreUnreachable, also if
        the user lacks a right, and ConfigError if the database was made by a newer version."""
        if self.sqlite_file is not None:
            self._create_file(self.sqlite_file)
        engine = _make_engine(self._url, MIGRATION_TIMEOUT_S, keep_connections=False)
        async with self._transaction(engine, MIGRATION_TIMEOUT_S, writes=True) as connection:
            if self.sqlite_file is None:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            try:
                await connection.run_sync(_upgrade)
            except CommandError as error:
                # The scripts of this version are whole, so they lack only what a later version has.
                raise ConfigError(f"store.url: {self} was made by a newer version of this server: {error}") from error

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one state of the database. Raises StoreUnreachable."""
        async with self._transaction(self._engine, TIMEOUT_S, writes=False) as connection:
            yield connection

    @asynccontextmanager
    async def reporting(self) -> AsyncIterator[AsyncConnection]:
        """As `reading`, for statements that read many rows. No writer waits for them."""
        async with (
            self._report_turns,
            self._transaction(self._report_engine, REPORT_TIMEOUT_S, writes=False) as connection,
        ):
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is committed at the end. Raises StoreUnreachable; whether the transaction was committed is
        then not known."""
        async with self._transaction(self._engine, TIMEOUT_S, writes=True) as connection:
            yield connection

    async def insert(self, statement: sqlite.Insert | postgresql.Insert, rows: Sequence[Mapping[str, Any]]) -> int:
        """Run an INSERT for all `rows` in one transaction, and return the number of rows inserted. Raises
        StoreUnreachable, as `writing`."""
        if self._blocking is None:
            # asyncpg does not count what it inserts.
            returning = statement.returning(*statement.table.primary_key)
            async with self.writing() as connection:
                return len((await connection.execute(returning, rows)).all())
        # Three times as fast as aiosqlite, which changes threads for every call of the driver.
        async with self._reached_within(TIMEOUT_S):
            return await asyncio.to_thread(_insert, self._blocking, statement, rows)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()
        if self._blocking is not None:
            self._blocking.dispose()

    def _create_file(self, path: Path) -> None:
        """An empty file that only this user may read, if there is none. SQLite gives its other files the same mode."""
        # SQLite would only say that it cannot open the file, and its driver leaves a thread behind for a moment.
        if not path.absolute().parent.is_dir():
            raise StoreUnreachable(f"{self}: the folder does not exist")
        try:
            path.touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            return
        except OSError as error:
            raise StoreUnreachable(f"{self}: {error.strerror}") from error

    @asynccontextmanager
    async def _transaction(
        self, engine: AsyncEngine, timeout_s: float, *, writes: bool
    ) -> AsyncIterator[AsyncConnection]:
        options: dict[str, Any] = {"writes": writes}
        if not writes and self.sqlite_file is None:
            options["isolation_level"] = "REPEATABLE READ"
        async with self._reached_within(timeout_s), engine.execution_options(**options).begin() as connection:
            yield connection

    @asynccontextmanager
    async def _reached_within(self, timeout_s: float) -> AsyncIterator[None]:
        """Turns the errors of a database that does not answer into StoreUnreachable."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except (IntegrityError, DataError):
            # These are our own mistakes. A ProgrammingError may not be: PostgreSQL has it for rights and tables that
            # are missing.
            raise
        except DBAPIError as error:
            raise StoreUnreachable(f"{self}: {_first_line(error.orig)}") from error
        except (PoolTimeout, TimeoutError):
            raise StoreUnreachable(f"{self}: no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise StoreUnreachable(f"{self}: {_first_line(error)}") from error


def _checked(url: str) -> URL:
    allowed = "allowed is sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The URL may hold a password, so it is not shown.
        raise ConfigError(f"store.url: {allowed}") from None
    if "@" in (parsed.host or ""):
        # The end of a password with an "@": shown as the host.
        raise ConfigError(f"store.url: {allowed}, with special characters of a password written as %XX")
    if parsed.drivername in ("sqlite", "sqlite+aiosqlite") and parsed.database not in (None, "", ":memory:"):
        return parsed.set(drivername="sqlite+aiosqlite")
    if parsed.drivername in ("postgresql", "postgresql+asyncpg"):
        # libpq's name for what asyncpg calls ssl.
        query = {"ssl" if name == "sslmode" else name: value for name, value in parsed.query.items()}
        return parsed.set(drivername="postgresql+asyncpg", query=query)
    raise ConfigError(f"store.url: {parsed.render_as_string(hide_password=True)!r} is not allowed: {allowed}")


def _make_engine(url: URL, timeout_s: float, *, keep_connections: bool = True) -> AsyncEngine:
    pool: dict[str, Any] = {"pool_timeout": timeout_s} if keep_connections else {"poolclass": NullPool}
    # Errors would otherwise show the parameters of statements.
    pool["hide_parameters"] = True
    statement_s = timeout_s * _STATEMENT_SHARE
    if url.get_backend_name() == "sqlite":
        engine = create_async_engine(url, connect_args={"timeout": statement_s}, **pool)
        _listen(engine.sync_engine)
        return engine
    timeouts = {"timeout": TIMEOUT_S, "command_timeout": statement_s}
    return create_async_engine(url, connect_args=timeouts, pool_pre_ping=True, **pool)


def _make_blocking_engine(url: URL) -> Engine:
    """For transactions of SQLite that run in a thread as a whole, all of which write."""
    engine = create_engine(
        url.set(drivername="sqlite"),
        connect_args={"timeout": TIMEOUT_S * _STATEMENT_SHARE},
        pool_timeout=TIMEOUT_S,
        hide_parameters=True,
        execution_options={"writes": True},
    )
    _listen(engine)
    return engine


def _insert(engine: Engine, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> int:
    with engine.begin() as connection:
        return connection.execute(statement, rows).rowcount


def _listen(engine: Engine) -> None:
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # `_begin_sqlite` begins transactions: the driver would do so only at the first change, when it may be too late to
    # wait for another process.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options()["writes"]
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "buddy_server.tenancy.store:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _first_line(error: BaseException | None) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
