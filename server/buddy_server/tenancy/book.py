"""Who may use the server now: what the configuration file names, and what the store has.

What the file names belongs to the file: if the store has a tenant or a tier of the same name, the file's counts.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from buddy_routing.action_space import ActionSpace
from buddy_server.clock import now_ms
from buddy_server.config import ServerConfig, file_stamp, load_config
from buddy_server.errors import ConfigError
from buddy_server.metrics import Metrics
from buddy_server.tenancy.depth import check_tier
from buddy_server.tenancy.keys import KeySecret
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tenancy.store.snapshot import StoreSnapshot
from buddy_server.tenancy.store.tenant_store import TenantStore
from buddy_server.tenancy.tenants import Caller, TenantDirectory

log = logging.getLogger(__name__)

FILE_EVERY_S = 1.0
STORE_EVERY_S = 0.5
"""A revoked key is refused after this time, by every server that shares the store."""
_AT_START = ("engine", "store", "limits", "allow_open")
"""What a reload does not change."""
_EMPTY = StoreSnapshot(0, (), (), ())


class TenantBook:
    """Keeps a TenantDirectory up to date. `reload` follows the configuration file at `path`, `refresh` the store.

    Raises ConfigError if the engine's model cannot honour the budgets of a tier in the file.
    """

    def __init__(
        self,
        config: ServerConfig,
        path: Path | None,
        actions: ActionSpace,
        metrics: Metrics,
        store: TenantStore | None = None,
        secret: KeySecret | None = None,
    ) -> None:
        self._actions = actions
        self._check(config)
        self.config = config
        self.is_reachable = True
        self._path = path
        self._metrics = metrics
        self._store = store
        self._secret = secret
        self._snapshot = _EMPTY
        self._refreshing = asyncio.Lock()
        self._directory = self._combined()

    def authenticate(self, authorization: str | None) -> Caller:
        """As TenantDirectory.authenticate, by the directory of now."""
        return self._directory.authenticate(authorization, now_ms())

    @property
    def has_file(self) -> bool:
        return self._path is not None

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        return self._directory.tenants

    @property
    def tiers(self) -> Mapping[str, Tier]:
        """The tiers of the file and the store."""
        named = (*self._snapshot.tiers, *self.config.tiers, *(tenant.tier for tenant in self.config.tenants))
        return {tier.name: tier for tier in named}

    @property
    def file_tenants(self) -> Mapping[str, Tenant]:
        return {tenant.name: tenant for tenant in self.config.tenants}

    @property
    def file_tiers(self) -> Mapping[str, Tier]:
        return {tier.name: tier for tier in self.config.tiers}

    async def refresh(self) -> None:
        """Follow the store, if it has changed and answers."""
        if self._store is None:
            return
        try:
            # One after the other: an older snapshot must not replace a newer one.
            async with self._refreshing:
                if await self._store.revision() != self._snapshot.revision:
                    self._snapshot = await self._store.snapshot()
                    self._apply()
        except Exception as error:
            # Whatever it is, keys that have been revoked may go unnoticed.
            if self.is_reachable:
                log.error("store unreachable", extra={"reason": error})
            self.is_reachable = False
        else:
            if not self.is_reachable:
                log.info("store reachable again")
            self.is_reachable = True
        self._metrics.store_up(self.is_reachable)

    async def reload(self) -> None:
        """Follow the file, whole or not at all: a file with an error changes nothing but the log and a metric."""
        assert self._path is not None
        try:
            config = await asyncio.to_thread(load_config, self._path, self._check)
            now = self.config
            if (config.store is None, config.is_open) != (now.store is None, now.is_open):
                reason = "whether there is a store and whether keys are needed cannot change while the server runs"
                raise ConfigError(f"{self._path}: {reason}")
            self._check_tiers_in_use(config)
        except ConfigError as error:
            log.error("configuration refused", extra={"reason": error})
            self._metrics.reloaded(False)
            return
        kept = replace(config, engine=now.engine, store=now.store, limits=now.limits, allow_open=now.allow_open)
        waiting = [name for name in _AT_START if getattr(config, name) != getattr(now, name)]
        if waiting:
            log.warning("configuration needs a restart", extra={"fields": ", ".join(waiting)})
        before = self.file_tenants.keys()
        self.config = kept
        self._apply()
        self._metrics.reloaded(True)
        after = self.file_tenants.keys()
        log.info(
            "configuration applied",
            extra={"tenants": len(after), "added": sorted(after - before), "removed": sorted(before - after)},
        )

    async def watch_file(self, hang_up: asyncio.Event) -> None:
        """Reload the file when it changes, or when `hang_up` is set, until cancelled."""
        seen = self.config.stamp
        while self._path is not None:
            try:
                await asyncio.wait_for(hang_up.wait(), FILE_EVERY_S)
            except TimeoutError:
                if file_stamp(self._path) == seen:
                    continue
            hang_up.clear()
            seen = file_stamp(self._path)
            await self.reload()

    async def watch_store(self) -> None:
        """Refresh from the store when it changes, until cancelled."""
        while self._store is not None:
            await asyncio.sleep(STORE_EVERY_S)
            await self.refresh()

    def _apply(self) -> None:
        self._directory = self._combined()
        self._metrics.follow(self._directory.tenants.values())

    def _combined(self) -> TenantDirectory:
        return TenantDirectory(
            [*self.config.tenants, *self._stored_tenants()],
            is_open=self.config.is_open,
            keys=self._snapshot.keys,
            disabled={stored.name for stored in self._snapshot.tenants if stored.disabled} - self.file_tenants.keys(),
            secret=self._secret,
        )

    def _stored_tenants(self) -> Iterator[Tenant]:
        tiers, of_file = self.tiers, self.file_tenants
        for stored in self._snapshot.tenants:
            if stored.name in of_file:
                continue
            try:
                tier = tiers[stored.tier]
                check_tier(tier, self._actions)
            except KeyError:
                log.error("tenant without a tier", extra={"tenant": stored.name, "tier": stored.tier})
                continue
            except ConfigError as error:
                log.error("tier not usable", extra={"tenant": stored.name, "reason": error})
                continue
            yield Tenant(stored.name, tier)

    def _check_tiers_in_use(self, config: ServerConfig) -> None:
        """Raise ConfigError if tenants of the store would lose their tier with this file."""
        tiers = {tier.name for tier in (*config.tiers, *self._snapshot.tiers)}
        names = {tenant.name for tenant in config.tenants}
        for stored in self._snapshot.tenants:
            if stored.name not in names and stored.tier in self.file_tiers.keys() - tiers:
                raise ConfigError(f"{self._path}: tiers: {stored.tier!r} is missing, the tier of {stored.name!r}")

    def _check(self, config: ServerConfig) -> None:
        for tier in (*config.tiers, *(tenant.tier for tenant in config.tenants)):
            check_tier(tier, self._actions)
