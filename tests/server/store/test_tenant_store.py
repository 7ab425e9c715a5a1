"""Tenants, tiers and keys, with an audit row for every change."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from buddy_server.errors import Conflict, InvalidRequest, KeyNotFound, TenantNotFound, TierNotFound
from buddy_server.tenancy.policy import Tier
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.snapshot import StoredKey, StoredTenant
from buddy_server.tenancy.store.tenant_store import TenantStore

pytestmark = pytest.mark.anyio

PRO = Tier("pro", min_budget=0.25, elastic_floor=0.5, requests_per_minute=10, weight=2.5)


@pytest.fixture
def store(database: Database) -> TenantStore:
    return TenantStore(database)


async def create_tenant(store: TenantStore, name: str = "acme", tier: str = "free") -> None:
    await store.create_tenant(name, tier, file_tiers={"free"}, actor="test")


async def change_tenant(store: TenantStore, name: str, tier: str | None = None, disabled: bool | None = None) -> None:
    await store.change_tenant(name, tier=tier, disabled=disabled, file_tiers={"free"}, actor="test")


async def add_key(store: TenantStore, key_id: str, tenant: str = "acme", file_tenants: Sequence[str] = ()) -> StoredKey:
    return await store.add_key(key_id, b"mac", tenant, 2_000_000_000_000, file_tenants=file_tenants, actor="test")


async def test_snapshot_has_what_was_created(store: TenantStore) -> None:
    await store.put_tier(PRO, actor="test")
    await create_tenant(store, "hobby", "pro")
    await create_tenant(store, "acme", "free")
    key = await add_key(store, "0123456789ab")
    snapshot = await store.snapshot()
    assert snapshot.revision == await store.revision() == 4
    assert snapshot.tiers == (PRO,)
    assert snapshot.tenants == (StoredTenant("acme", "free", False), StoredTenant("hobby", "pro", False))
    assert snapshot.keys == (key,)
    assert "mac" not in repr(key)


async def test_tenant_is_moved_disabled_and_enabled(store: TenantStore) -> None:
    await store.put_tier(PRO, actor="test")
    await create_tenant(store)
    await change_tenant(store, "acme", tier="pro", disabled=True)
    assert (await store.snapshot()).tenants == (StoredTenant("acme", "pro", True),)
    await change_tenant(store, "acme", disabled=False)
    assert (await store.snapshot()).tenants == (StoredTenant("acme", "pro", False),)


async def test_tier_put_again_is_replaced(store: TenantStore) -> None:
    await store.put_tier(PRO, actor="test")
    await store.put_tier(replace(PRO, weight=1.0, elastic_floor=None), actor="test")
    assert (await store.snapshot()).tiers == (replace(PRO, weight=1.0, elastic_floor=None),)
    await store.delete_tier("pro", actor="test")
    assert (await store.snapshot()).tiers == ()


async def test_what_is_not_allowed_is_refused_and_changes_nothing(store: TenantStore) -> None:
    await store.put_tier(PRO, actor="test")
    await create_tenant(store, "acme", "pro")
    with pytest.raises(Conflict, match="'acme' exists already"):
        await create_tenant(store, "acme")
    with pytest.raises(InvalidRequest, match="'gold' is not a tier, allowed: free, pro"):
        await create_tenant(store, "new", "gold")
    with pytest.raises(InvalidRequest, match="'gold' is not a tier, allowed: free, pro"):
        await change_tenant(store, "acme", tier="gold")
    with pytest.raises(Conflict, match="'pro' is that of acme"):
        await store.delete_tier("pro", actor="test")
    with pytest.raises(TierNotFound, match="'gold'"):
        await store.delete_tier("gold", actor="test")
    with pytest.raises(TenantNotFound, match="'nobody'"):
        await change_tenant(store, "nobody", disabled=True)
    with pytest.raises(TenantNotFound, match="'nobody'"):
        await add_key(store, "0123456789ab", "nobody")
    with pytest.raises(KeyNotFound):
        await store.revoke_key("0123456789ab", actor="test")
    assert await store.revision() == 2
    assert len(await store.audit(limit=10)) == 2


async def test_a_tenant_of_the_file_can_have_keys(store: TenantStore) -> None:
    await add_key(store, "0123456789ab", "filed", file_tenants=["filed"])
    assert [key.tenant for key in (await store.snapshot()).keys] == ["filed"]


async def test_key_is_valid_until_it_expires_or_is_revoked(store: TenantStore) -> None:
    await create_tenant(store)
    key = await add_key(store, "0123456789ab")
    assert key.is_valid(now_ms=1_999_999_999_999)
    assert not key.is_valid(now_ms=2_000_000_000_000)
    await store.revoke_key(key.id, actor="test")
    (revoked,) = (await store.snapshot()).keys
    assert not revoked.is_valid(now_ms=0)
    before = await store.snapshot(), await store.audit(limit=10)
    await store.revoke_key(key.id, actor="test")
    assert (await store.snapshot(), await store.audit(limit=10)) == before


async def test_every_change_has_its_audit_row(store: TenantStore) -> None:
    await store.put_tier(PRO, actor="ann")
    await store.put_tier(Tier("pro"), actor="ben")
    await create_tenant(store)
    await change_tenant(store, "acme", disabled=True)
    await store.delete_tier("pro", actor="test")
    await add_key(store, "0123456789ab")
    await store.revoke_key("0123456789ab", actor="test")
    rows = await store.audit(limit=10)
    assert [(row.action, row.subject) for row in reversed(rows)] == [
        ("tier.create", "pro"),
        ("tier.change", "pro"),
        ("tenant.create", "acme"),
        ("tenant.change", "acme"),
        ("tier.delete", "pro"),
        ("key.create", "0123456789ab"),
        ("key.revoke", "0123456789ab"),
    ]
    assert [row.actor for row in reversed(rows)][:2] == ["ann", "ben"]
    assert rows[3].details == {"disabled": True}
    assert rows[1].details == {"tenant": "acme", "expires_ms": 2_000_000_000_000}
    assert [row.id for row in await store.audit(limit=2, before=rows[1].id)] == [rows[2].id, rows[3].id]
