"""Everything that decides who may use how much, put together from the configuration."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from buddy_server.config import ServerConfig, StoreSettings
from buddy_server.engine.messages import EngineInfo
from buddy_server.errors import ConfigError, StoreUnreachable
from buddy_server.metrics import Metrics
from buddy_server.tenancy.administration import Administration
from buddy_server.tenancy.bills import Bills
from buddy_server.tenancy.book import TenantBook
from buddy_server.tenancy.keys import KeySecret
from buddy_server.tenancy.ledger.ledger import Ledger
from buddy_server.tenancy.limits.build import make_limiter
from buddy_server.tenancy.limits.gate import LimitGate
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.known_secret import check_secret
from buddy_server.tenancy.store.ledger_store import LedgerStore
from buddy_server.tenancy.store.tenant_store import TenantStore

log = logging.getLogger(__name__)

Loop = Callable[[], Coroutine[Any, Any, None]]

UPKEEP_EVERY_S = 60.0
CLOSE_TIMEOUT_S = 5.0
AGAIN_S = 1.0
"""Pause before a loop that failed starts again."""
ADMIN_ACTOR = "admin key"
"""Whom the audit names for changes through the admin API."""


class StoreParts:
    """What a configured store consists of. Raises ConfigError if it cannot be used, without connecting to it."""

    def __init__(self, settings: StoreSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.database = Database(settings.url)
        self.secret = KeySecret.load(self.database.sqlite_file)
        self.tenants = TenantStore(self.database)
        self.rows = LedgerStore(self.database)
        directory = _journal_directory(settings, self.database)
        try:
            self.ledger = Ledger(self.rows, directory, metrics)
        except OSError as error:
            raise ConfigError(f"store.journal: {directory} cannot be written: {error.strerror}") from error


class Tenancy:
    """`book` knows who may use the server, `bills` what they use. While `running`, both follow configuration and
    store."""

    def __init__(self, config: ServerConfig, path: Path | None, info: EngineInfo, metrics: Metrics) -> None:
        self.store = None if config.store is None else StoreParts(config.store, metrics)
        tenants, secret = (None, None) if self.store is None else (self.store.tenants, self.store.secret)
        self.book = TenantBook(config, path, info.actions, metrics, tenants, secret)
        self._num_layers = info.num_layers
        limiter = make_limiter(config.limits, info.actions.full_cost)
        self._gate = LimitGate(limiter, info.actions, config.limits, metrics)
        self.bills = Bills(info, self._gate, None if self.store is None else self.store.ledger, self._is_store_ready)

    def administration(self) -> Administration | None:
        """What the admin API may change; None without a store."""
        if self.store is None:
            return None
        return Administration(self.store.tenants, self.book, self.store.secret, ADMIN_ACTOR)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow file and store, renew leases, write the ledger. At the end, what requests used is settled."""
        await self._catch_up()
        hang_up = asyncio.Event()
        loop = asyncio.get_running_loop()
        # Without a file there is nothing to reload, and closing the terminal ends the server.
        hears_signals = self.book.has_file and threading.current_thread() is threading.main_thread()
        if hears_signals:
            loop.add_signal_handler(signal.SIGHUP, hang_up.set)
        loops: list[Loop] = [partial(self.book.watch_file, hang_up), self.book.watch_store, self._gate.run]
        if self.store is not None:
            loops += [self.store.ledger.run, self._keep_up]
        tasks = [asyncio.create_task(persistent(run)) for run in loops]
        try:
            yield
        finally:
            if hears_signals:
                loop.remove_signal_handler(signal.SIGHUP)
            await self.bills.close(CLOSE_TIMEOUT_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._gate.close()
            if self.store is not None:
                await self.store.ledger.flush()
                self.store.ledger.close()
                await self.store.database.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests may run, as far as store and limits are concerned."""
        return self._gate.is_ready and self._is_store_ready()

    def _is_store_ready(self) -> bool:
        if self.store is None or self.store.settings.when_unreachable == "allow":
            return True
        return self.book.is_reachable and self.store.ledger.is_reachable

    async def _keep_up(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._gate.returned.wait(), UPKEEP_EVERY_S)
            self._gate.returned.clear()
            await self._catch_up()

    async def _catch_up(self) -> None:
        """What is done at the start and now and then: rows of servers that were killed, the month's quotas, rows too
        old to keep."""
        if self.store is None:
            return
        await self.book.refresh()
        for work in (self.store.ledger.recover, self._follow_ledger, self._shorten_ledger):
            try:
                await work()
            except StoreUnreachable as error:
                log.error("ledger not caught up", extra={"work": work.__name__.strip("_"), "reason": error})

    async def _follow_ledger(self) -> None:
        assert self.store is not None
        month = time.strftime("%Y-%m", time.gmtime())
        costs = await self.store.rows.month_cost(month, self._num_layers)
        await self._gate.follow_ledger(month, costs, self.book.tenants.values())

    async def _shorten_ledger(self) -> None:
        assert self.store is not None
        if self.store.settings.ledger_days is not None:
            await self.store.rows.keep_days(self.store.settings.ledger_days)


async def persistent(run: Loop) -> None:
    """Run a loop, and again if it fails: what it follows must not be lost sight of without a word."""
    while True:
        try:
            await run()
            return
        except Exception:
            log.exception("a loop failed and starts again", extra={"loop": getattr(run, "__qualname__", run)})
            await asyncio.sleep(AGAIN_S)


async def prepare_store(settings: StoreSettings) -> None:
    """Bring the store's tables up to date, before anything is served. Raises ConfigError if that is impossible, or if
    the store's keys are made with another secret than this server's."""
    database = Database(settings.url)
    try:
        await database.migrate()
        await check_secret(database, KeySecret.load(database.sqlite_file), may_replace=True)
    except StoreUnreachable as error:
        raise ConfigError(f"store.url: {error}") from error
    finally:
        await database.close()


def _journal_directory(settings: StoreSettings, database: Database) -> Path:
    """One for each store: rows that a killed server has left must not go to another database."""
    if settings.journal is None and database.sqlite_file is not None:
        return database.sqlite_file.with_name(f"{database.sqlite_file.name}.journals")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "buddy-serve"
    return (settings.journal or state) / database.name
