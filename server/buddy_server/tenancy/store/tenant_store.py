"""Tenants, tiers and keys in the store. Every change has its audit row in the same transaction."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from sqlalchemy import Column, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from buddy_server.clock import now_ms
from buddy_server.errors import Conflict, InvalidRequest, KeyNotFound, TenantNotFound, TierNotFound, shown
from buddy_server.tenancy.policy import Tier
from buddy_server.tenancy.store import tables
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.snapshot import AuditRow, StoredKey, StoredTenant, StoreSnapshot

_MAX_NAMED = 8
"""Names that a message lists."""


class TenantStore:
    """The tables of tenants in `database`. All methods raise StoreUnreachable; those that change something take the
    `actor` whom the audit names."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def revision(self) -> int:
        """A number that grows with every change. Cheap enough to be read twice a second."""
        async with self._database.reading() as connection:
            return int((await connection.execute(select(tables.revision.c.value))).scalar_one())

    async def snapshot(self) -> StoreSnapshot:
        """All tiers, tenants and keys of one moment."""
        async with self._database.reading() as connection:
            revision = (await connection.execute(select(tables.revision.c.value))).scalar_one()
            tiers = await connection.execute(select(tables.tiers).order_by(tables.tiers.c.name))
            tenants = await connection.execute(select(tables.tenants).order_by(tables.tenants.c.name))
            keys = await connection.execute(select(tables.keys).order_by(tables.keys.c.created_ms, tables.keys.c.id))
            return StoreSnapshot(
                revision=int(revision),
                tiers=tuple(msgspec.convert({"name": row.name, **row.definition}, Tier) for row in tiers),
                tenants=tuple(StoredTenant(*row) for row in tenants),
                keys=tuple(StoredKey(*row) for row in keys),
            )

    async def create_tenant(self, name: str, tier: str, *, file_tiers: Collection[str], actor: str) -> None:
        """Raises Conflict if the name is taken, InvalidRequest if `tier` is neither in the store nor in
        `file_tiers`."""
        async with self._change(actor) as change:
            if await change.has(tables.tenants.c.name, name):
                raise Conflict(f"The tenant {shown(name)} exists already.")
            await change.check_tier(tier, file_tiers)
            await change.run(insert(tables.tenants).values(name=name, tier=tier, disabled=False))
            await change.note("tenant.create", name, {"tier": tier})

    async def change_tenant(
        self,
        name: str,
        *,
        tier: str | None = None,
        disabled: bool | None = None,
        file_tiers: Collection[str],
        actor: str,
    ) -> None:
        """Change what is not None. Raises TenantNotFound, and InvalidRequest as `create_tenant`."""
        changed = {key: value for key, value in (("tier", tier), ("disabled", disabled)) if value is not None}
        async with self._change(actor) as change:
            if not await change.has(tables.tenants.c.name, name):
                raise TenantNotFound(name)
            if tier is not None:
                await change.check_tier(tier, file_tiers)
            await change.run(update(tables.tenants).where(tables.tenants.c.name == name).values(changed))
            await change.note("tenant.change", name, changed)

    async def put_tier(self, tier: Tier, *, actor: str) -> None:
        """Create the tier, or replace the one of that name."""
        definition = asdict(tier)
        del definition["name"]
        async with self._change(actor) as change:
            exists = await change.has(tables.tiers.c.name, tier.name)
            if exists:
                await change.run(
                    update(tables.tiers).where(tables.tiers.c.name == tier.name).values(definition=definition)
                )
            else:
                await change.run(insert(tables.tiers).values(name=tier.name, definition=definition))
            await change.note("tier.change" if exists else "tier.create", tier.name, definition)

    async def delete_tier(self, name: str, *, actor: str) -> None:
        """Raises TierNotFound; Conflict while tenants of the store are in the tier."""
        async with self._change(actor) as change:
            if not await change.has(tables.tiers.c.name, name):
                raise TierNotFound(name)
            users = await change.names(tables.tenants.c.name, tables.tenants.c.tier == name)
            if users:
                raise Conflict(f"The tier {shown(name)} is that of {_some(users)}; allowed once no tenant is in it.")
            await change.run(delete(tables.tiers).where(tables.tiers.c.name == name))
            await change.note("tier.delete", name, {})

    async def add_key(
        self, key_id: str, mac: bytes, tenant: str, expires_ms: int | None, *, file_tenants: Collection[str], actor: str
    ) -> StoredKey:
        """Raises TenantNotFound if `tenant` is neither in the store nor in `file_tenants`."""
        key = StoredKey(key_id, tenant, mac, now_ms(), expires_ms, revoked_ms=None)
        async with self._change(actor) as change:
            if tenant not in file_tenants and not await change.has(tables.tenants.c.name, tenant):
                raise TenantNotFound(tenant)
            await change.run(insert(tables.keys).values(asdict(key)))
            await change.note("key.create", key_id, {"tenant": tenant, "expires_ms": expires_ms})
        return key

    async def revoke_key(self, key_id: str, *, actor: str) -> None:
        """From now on the key is invalid. Revoking it again changes nothing. Raises KeyNotFound."""
        table = tables.keys
        async with self._change(actor) as change:
            owners = await change.names(table.c.tenant, table.c.id == key_id)
            if not owners:
                raise KeyNotFound
            if not await change.names(table.c.tenant, (table.c.id == key_id) & table.c.revoked_ms.is_(None)):
                await change.undo()
                return
            await change.run(update(table).where(table.c.id == key_id).values(revoked_ms=now_ms()))
            await change.note("key.revoke", key_id, {"tenant": owners[0]})

    async def audit(self, limit: int, before: int | None = None) -> list[AuditRow]:
        """The newest rows first, at most `limit`, and only those older than the row with the id `before`."""
        table = tables.audit
        query = select(table).order_by(table.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(table.c.id < before)
        async with self._database.reading() as connection:
            return [AuditRow(*row) for row in await connection.execute(query)]

    @asynccontextmanager
    async def _change(self, actor: str) -> AsyncIterator["_Change"]:
        async with self._database.writing() as connection:
            # First, as it locks the row: changes come one after the other, each sees what the ones before have done.
            await connection.execute(update(tables.revision).values(value=tables.revision.c.value + 1))
            yield _Change(connection, actor)


@dataclass(frozen=True, slots=True)
class _Change:
    """A transaction that changes something."""

    connection: AsyncConnection
    actor: str

    async def run(self, statement: Any) -> None:
        await self.connection.execute(statement)

    async def undo(self) -> None:
        """Nothing is changed after all."""
        await self.connection.rollback()

    async def names(self, column: Column[str], condition: Any) -> list[str]:
        return [row[0] for row in await self.connection.execute(select(column).where(condition).order_by(column))]

    async def has(self, column: Column[str], name: str) -> bool:
        return bool(await self.names(column, column == name))

    async def check_tier(self, tier: str, file_tiers: Collection[str]) -> None:
        known = {*file_tiers, *await self.names(tables.tiers.c.name, True)}
        if tier not in known:
            raise InvalidRequest(f"tier: {shown(tier)} is not a tier, allowed: {_some(sorted(known))}", param="tier")

    async def note(self, action: str, subject: str, details: Mapping[str, object]) -> None:
        row = {"at_ms": now_ms(), "actor": self.actor, "action": action, "subject": subject, "details": dict(details)}
        await self.run(insert(tables.audit).values(row))


def _some(names: Sequence[str]) -> str:
    shortened = [*names[:_MAX_NAMED], f"{len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else names
    return ", ".join(shortened) or "none"
