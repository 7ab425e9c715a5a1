"""The store notices another secret than that of its keys."""

import pytest

from buddy_server.clock import now_ms
from buddy_server.errors import ConfigError
from buddy_server.tenancy.keys import KeySecret
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.known_secret import check_secret
from buddy_server.tenancy.store.tenant_store import TenantStore

pytestmark = pytest.mark.anyio

OLD = KeySecret(b"old-secret" * 4)
NEW = KeySecret(b"new-secret" * 4)


async def add_key(database: Database, expires_ms: int | None = None) -> None:
    store = TenantStore(database)
    await store.add_key("0123456789ab", b"mac", "acme", expires_ms, file_tenants=["acme"], actor="test")


@pytest.mark.parametrize("may_replace", [True, False])
async def test_other_secret_than_that_of_the_keys_is_refused(database: Database, may_replace: bool) -> None:
    await check_secret(database, OLD, may_replace=False)
    await add_key(database)
    with pytest.raises(ConfigError, match="set BUDDY_KEY_SECRET to it, or BUDDY_KEY_SECRET_FILE to a file") as refused:
        await check_secret(database, NEW, may_replace=may_replace)
    assert ("buddy.db.secret must have it" in str(refused.value)) == (database.sqlite_file is not None)
    assert "new-secret" not in str(refused.value)
    await check_secret(database, OLD, may_replace=may_replace)


@pytest.mark.parametrize("key", ["none", "revoked", "expired"])
async def test_server_takes_up_another_secret_while_no_key_is_valid(database: Database, key: str) -> None:
    await check_secret(database, OLD, may_replace=True)
    if key != "none":
        await add_key(database, now_ms() - 1 if key == "expired" else None)
    if key == "revoked":
        await TenantStore(database).revoke_key("0123456789ab", actor="test")
    with pytest.raises(ConfigError):
        await check_secret(database, NEW, may_replace=False)
    await check_secret(database, NEW, may_replace=True)
    with pytest.raises(ConfigError):
        await check_secret(database, OLD, may_replace=False)
