"""`buddy tenants` and `buddy keys` as typed in a shell, without a server."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from buddy_server.cli import main
from buddy_server.tenancy.keys import KeySecret, parse_key_id
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.snapshot import AuditRow, StoreSnapshot
from buddy_server.tenancy.store.tenant_store import TenantStore

CONFIG = """
tiers: {{free: {{max_budget: 0.5}}, pro: {{}}}}
tenants: {{filed: {{tier: free}}}}
store: {{url: "sqlite:///{folder}/buddy.db"}}
"""
Buddy = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("BUDDY_KEY_SECRET", raising=False)
    monkeypatch.delenv("BUDDY_KEY_SECRET_FILE", raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return str(path)


@pytest.fixture
def buddy(config: str, capsys: pytest.CaptureFixture[str]) -> Buddy:
    """Runs `buddy` with the config and returns what it printed."""

    def run(*arguments: str) -> str:
        main([*arguments, "--config", config])
        return capsys.readouterr().out

    return run


def stored(config: str) -> tuple[StoreSnapshot, list[AuditRow]]:
    async def read() -> tuple[StoreSnapshot, list[AuditRow]]:
        database = Database(f"sqlite:///{Path(config).with_name('buddy.db')}")
        store = TenantStore(database)
        try:
            return await store.snapshot(), await store.audit(limit=100)
        finally:
            await database.close()

    return asyncio.run(read())


def test_tenant_is_created_moved_disabled_and_enabled(buddy: Buddy) -> None:
    buddy("tenants", "create", "acme", "--tier", "free")
    buddy("tenants", "change", "acme", "--tier", "pro")
    buddy("tenants", "disable", "acme")
    assert [line.split() for line in buddy("tenants", "list").splitlines()] == [
        ["TENANT", "TIER", "SOURCE", "STATE"],
        ["acme", "pro", "store", "disabled"],
        ["filed", "free", "file", "enabled"],
    ]
    buddy("tenants", "enable", "acme")
    assert "acme    pro   store   enabled" in buddy("tenants", "list")


def test_key_alone_is_printed_on_stdout(buddy: Buddy, config: str) -> None:
    key = buddy("keys", "create", "filed", "--expires", "30d").removesuffix("\n")
    snapshot, audit = stored(config)
    (row,) = snapshot.keys
    assert row.id == parse_key_id(key)
    assert KeySecret.load(Path(config).with_name("buddy.db")).matches(key, row.mac)
    assert row.expires_ms is not None
    assert round((row.expires_ms - row.created_ms) / 86_400_000) == 30
    assert audit[0].actor.startswith("command:")


def test_keys_are_listed_with_their_state(buddy: Buddy) -> None:
    buddy("tenants", "create", "acme", "--tier", "free")
    revoked = parse_key_id(buddy("keys", "create", "acme").strip())
    buddy("keys", "create", "filed", "--expires", "2050-01-01")
    assert revoked is not None
    buddy("keys", "revoke", revoked)
    assert [line.split()[-1] for line in buddy("keys", "list").splitlines()] == ["STATE", "revoked", "valid"]
    assert "2050-01-01 00:00" in buddy("keys", "list", "filed")
    assert len(buddy("keys", "list", "acme").splitlines()) == 2


def test_keys_of_a_disabled_tenant_are_listed_as_disabled(buddy: Buddy) -> None:
    buddy("tenants", "create", "acme", "--tier", "free")
    buddy("keys", "create", "acme")
    buddy("keys", "create", "filed")
    buddy("tenants", "disable", "acme")
    assert [line.split()[-1] for line in buddy("keys", "list").splitlines()] == ["STATE", "disabled", "valid"]


def test_only_new_keys_need_the_servers_secret(buddy: Buddy, config: str) -> None:
    secret = Path(config).with_name("buddy.db.secret")
    buddy("tenants", "list")
    buddy("keys", "list")
    assert not secret.exists()
    buddy("keys", "create", "filed")
    assert secret.exists()


def test_no_key_is_made_with_another_secret(
    buddy: Buddy, refused: Callable[..., str], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buddy("keys", "create", "filed")
    monkeypatch.setenv("BUDDY_KEY_SECRET", "another-secret" * 3)
    said = refused("keys", "create", "filed", "--config", config)
    assert "made with another secret: set BUDDY_KEY_SECRET to it" in said
    assert "another-secret" not in said
    assert len(stored(config)[0].keys) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tenants", "create", "filed", "--tier", "free"], "'filed' belongs to the configuration file"),
        (["tenants", "create", "new", "--tier", "gold"], "'gold' is not a tier, allowed: free, pro"),
        (["tenants", "create", "a b", "--tier", "free"], "'a b' is not allowed as a name"),
        (["tenants", "disable", "nobody"], "There is no tenant 'nobody'"),
        (["keys", "create", "nobody"], "There is no tenant 'nobody'"),
        (["keys", "create", "filed", "--expires", "2020-01-01"], "'2020-01-01' is not allowed: give days like 30d"),
        (["keys", "create", "filed", "--expires", "soon"], "'soon' is not allowed: give days like 30d"),
        (["keys", "revoke", "0123456789ab"], "There is no key with this id"),
    ],
)
def test_what_is_refused_says_why_in_one_line(
    refused: Callable[..., str], config: str, arguments: list[str], message: str
) -> None:
    assert message in refused(*arguments, "--config", config)


def test_config_without_a_store_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("tiers: {free: {}}")
    assert "has no store" in refused("tenants", "list", "--config", str(tmp_path / "c.yaml"))
