"""Everything that decides who may use how much, put together from the configuration."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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
from buddy_server.tenancy.store.ledger_store import LedgerStore
from buddy_server.tenancy.store.tenant_store import TenantStore

log = logging.getLogger(__name__)

UPKEEP_EVERY_S = 60.0
CLOSE_TIMEOUT_S = 5.0
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
        directory = settings.journal or _journal_directory(self.database)
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
        self.bills = Bills(info, self._gate, None if self.store is None else self.store.ledger, self._is_ready)

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
        if self.book.has_file:
            # Without a file there is nothing to reload, and closing the terminal ends the server.
            loop.add_signal_handler(signal.SIGHUP, hang_up.set)
        works = [self.book.watch_file(hang_up), self.book.watch_store(), self._gate.run()]
        if self.store is not None:
            works += [self.store.ledger.run(), self._keep_up()]
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            await self.bills.close(CLOSE_TIMEOUT_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._gate.close()
            if self.store is not None:
                self.store.ledger.close()
                await self.store.database.close()

    def _is_ready(self) -> bool:
        """Whether requests may run, as far as the store is concerned."""
        if self.store is None or self.store.settings.when_unreachable == "allow":
            return True
        return self.book.is_reachable and self.store.ledger.is_reachable

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(UPKEEP_EVERY_S)
            await self._catch_up()

    async def _catch_up(self) -> None:
        """What is done at the start and now and then: rows of servers that were killed, the month's quotas, rows too
        old to keep."""
        if self.store is None:
            return
        await self.book.refresh()
        month = time.strftime("%Y-%m", time.gmtime())
        try:
            await self.store.ledger.recover()
            costs = await self.store.rows.month_cost(month, self._num_layers)
            await self._gate.follow_ledger(month, costs, self.book.tenants.values())
            if self.store.settings.ledger_days is not None:
                await self.store.rows.keep_days(self.store.settings.ledger_days)
        except StoreUnreachable as error:
            log.error("ledger not caught up", extra={"reason": error})


async def prepare_store(settings: StoreSettings) -> None:
    """Bring the store's tables up to date, before anything is served. Raises ConfigError if that is impossible."""
    database = Database(settings.url)
    try:
        await database.migrate()
    except StoreUnreachable as error:
        raise ConfigError(f"store.url: {error}") from error
    finally:
        await database.close()


def _journal_directory(database: Database) -> Path:
    if database.sqlite_file is not None:
        return database.sqlite_file.with_name(f"{database.sqlite_file.name}.journals")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "buddy-serve"
