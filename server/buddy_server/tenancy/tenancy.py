"""Everything that decides who may use how much, put together from the configuration."""

import asyncio
import datetime
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from buddy_server.config import ServerConfig, StoreSettings
from buddy_server.engine.messages import EngineInfo
from buddy_server.metrics import Metrics
from buddy_server.tenancy.bills import Bills
from buddy_server.tenancy.book import TenantBook
from buddy_server.tenancy.keys import KeySecret
from buddy_server.tenancy.ledger.ledger import Ledger
from buddy_server.tenancy.limits.gate import LimitGate
from buddy_server.tenancy.limits.make import make_limiter
from buddy_server.tenancy.store.database import Database, StoreUnreachable
from buddy_server.tenancy.store.ledger_store import LedgerStore
from buddy_server.tenancy.store.tenant_store import TenantStore

log = logging.getLogger(__name__)

UPKEEP_EVERY_S = 60.0
CLOSE_TIMEOUT_S = 5.0


class Tenancy:
    """`book` knows who may use the server, `bills` what they use. While `running`, both follow configuration and store.

    Raises ConfigError if the configuration cannot be used.
    """

    def __init__(self, config: ServerConfig, path: Path | None, info: EngineInfo, metrics: Metrics) -> None:
        self._full_cost_layers = info.num_layers
        self._database: Database | None = None
        self._ledger_store: LedgerStore | None = None
        self._ledger: Ledger | None = None
        tenant_store, secret = None, None
        if config.store is not None:
            self._database = Database(config.store.url)
            self._ledger_store = LedgerStore(self._database)
            self._ledger = Ledger(self._ledger_store, journal_directory(config.store), metrics)
            tenant_store, secret = TenantStore(self._database), KeySecret.load(self._database.sqlite_file)
        self.book = TenantBook(config, path, info.actions, metrics, tenant_store, secret)
        self._gate = LimitGate(make_limiter(config.limits), info.actions, config.limits, metrics)
        self.bills = Bills(info, self._gate, self._ledger, self._is_ready)
        self.admin = None
