"""What keeps tenancy up to date, and what ends with it."""

import asyncio
import logging
from pathlib import Path

import pytest

from buddy_server.config import StoreSettings
from buddy_server.errors import ConfigError
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.tenant_store import TenantStore
from buddy_server.tenancy.tenancy import persistent, prepare_store

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_server_whose_secret_is_lost_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUDDY_KEY_SECRET", raising=False)
    monkeypatch.delenv("BUDDY_KEY_SECRET_FILE", raising=False)
    settings = StoreSettings(f"sqlite:///{tmp_path / 'buddy.db'}")
    await prepare_store(settings)
    database = Database(settings.url)
    await TenantStore(database).add_key("0123456789ab", b"mac", "acme", None, file_tenants=["acme"], actor="test")
    await database.close()
    secret = tmp_path / "buddy.db.secret"
    moved = secret.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"made with another secret: .*buddy\.db\.secret"):
        await prepare_store(settings)
    moved.replace(secret)
    await prepare_store(settings)


async def test_loop_that_fails_is_logged_and_starts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("buddy_server.tenancy.tenancy.AGAIN_S", 0.01)
    starts = 0

    async def run() -> None:
        nonlocal starts
        starts += 1
        if starts < 3:
            raise ZeroDivisionError

    with caplog.at_level(logging.ERROR):
        await asyncio.wait_for(persistent(run), 5)
    assert starts == 3
    assert [record.message for record in caplog.records] == ["a loop failed and starts again"] * 2
