"""Changes to tenants, tiers and keys, as the admin API and the commands make them.

What the configuration file names belongs to the file: it is shown, but changed only there, and where a name is in the
file and in the store, the file's definition counts. Keys can be made for tenants of either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from buddy_server.errors import Conflict, KeyNotFound, TenantNotFound, TierNotFound, shown
from buddy_server.tenancy.keys import KeySecret, NewKey, is_key_id, make_key
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tenancy.store.snapshot import AuditRow, StoredKey
from buddy_server.tenancy.store.tenant_store import TenantStore

Source = Literal["file", "store"]


class Book(Protocol):
    """The tenants and tiers that requests are checked against, as far as administration needs to know them."""

    @property
    def file_tenants(self) -> Mapping[str, Tenant]: ...

    @property
    def file_tiers(self) -> Mapping[str, Tier]: ...

    async def refresh(self) -> None:
        """Apply what has just changed in the store. Raises nothing: the change is made, and is found later too."""
        ...


@dataclass(frozen=True, slots=True)
class ListedTenant:
    """A tenant, and where it is defined."""

    name: str
    tier: str
    disabled: bool
    source: Source


@dataclass(frozen=True, slots=True)
class ListedTier:
    """A tier, and where it is defined."""

    tier: Tier
    source: Source


class Administration:
    """Reads and changes `store` on behalf of `actor`, whom the audit names. Without a `secret`, it can make no key. All
    methods raise StoreUnreachable; those that change what belongs to the file raise Conflict, and the others are as in
    TenantStore."""

    def __init__(self, store: TenantStore, book: Book, secret: KeySecret | None, actor: str) -> None:
        self._store = store
        self._book = book
        self._secret = secret
        self._actor = actor

    async def tenants(self) -> list[ListedTenant]:
        """All tenants, by name."""
        stored = (await self._store.snapshot()).tenants
        listed = {each.name: ListedTenant(each.name, each.tier, each.disabled, "store") for each in stored}
        for name, tenant in self._book.file_tenants.items():
            listed[name] = ListedTenant(name, tenant.tier.name, False, "file")
        return [listed[name] for name in sorted(listed)]

    async def tenant(self, name: str) -> ListedTenant:
        """Raises TenantNotFound."""
        for tenant in await self.tenants():
            if tenant.name == name:
                return tenant
        raise TenantNotFound(name)

    async def create_tenant(self, name: str, tier: str) -> None:
        self._refuse_tenant_of_file(name)
        await self._store.create_tenant(name, tier, file_tiers=self._book.file_tiers, actor=self._actor)
        await self._book.refresh()

    async def change_tenant(self, name: str, *, tier: str | None = None, disabled: bool | None = None) -> None:
        self._refuse_tenant_of_file(name)
        await self._store.change_tenant(
            name, tier=tier, disabled=disabled, file_tiers=self._book.file_tiers, actor=self._actor
        )
        await self._book.refresh()

    async def tiers(self) -> list[ListedTier]:
        """All tiers, by name."""
        listed = {tier.name: ListedTier(tier, "store") for tier in (await self._store.snapshot()).tiers}
        listed |= {name: ListedTier(tier, "file") for name, tier in self._book.file_tiers.items()}
        return [listed[name] for name in sorted(listed)]

    async def tier(self, name: str) -> ListedTier:
        """Raises TierNotFound."""
        for listed in await self.tiers():
            if listed.tier.name == name:
                return listed
        raise TierNotFound(name)

    async def put_tier(self, tier: Tier) -> None:
        self._refuse_tier_of_file(tier.name)
        await self._store.put_tier(tier, actor=self._actor)
        await self._book.refresh()

    async def delete_tier(self, name: str) -> None:
        self._refuse_tier_of_file(name)
        await self._store.delete_tier(name, actor=self._actor)
        await self._book.refresh()

    async def keys(self, tenant: str | None = None) -> list[StoredKey]:
        """The keys in the store, of one tenant or all, oldest first. Raises TenantNotFound."""
        if tenant is not None:
            await self.tenant(tenant)
        return [key for key in (await self._store.snapshot()).keys if tenant in (None, key.tenant)]

    async def create_key(self, tenant: str, expires_ms: int | None) -> tuple[NewKey, StoredKey]:
        """A new key for a tenant of the file or the store, and what the store keeps of it. Raises TenantNotFound."""
        assert self._secret is not None
        key = make_key()
        stored = await self._store.add_key(
            key.id,
            self._secret.mac(key.text),
            tenant,
            expires_ms,
            file_tenants=self._book.file_tenants,
            actor=self._actor,
        )
        await self._book.refresh()
        return key, stored

    async def revoke_key(self, key_id: str) -> None:
        if not is_key_id(key_id):
            raise KeyNotFound
        await self._store.revoke_key(key_id, actor=self._actor)
        await self._book.refresh()

    async def audit(self, limit: int, before: int | None = None) -> list[AuditRow]:
        return await self._store.audit(limit, before)

    def _refuse_tenant_of_file(self, name: str) -> None:
        if name in self._book.file_tenants:
            raise Conflict(f"The tenant {shown(name)} belongs to the configuration file; change or remove it there.")

    def _refuse_tier_of_file(self, name: str) -> None:
        if name in self._book.file_tiers:
            raise Conflict(f"The tier {shown(name)} belongs to the configuration file; change or remove it there.")
