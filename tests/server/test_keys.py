"""API keys and the secret that they are compared with."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from buddy_server.errors import ConfigError
from buddy_server.tenancy.keys import KeySecret, make_key, parse_key_id, secret_from_environment

SECRET = "s3cret" * 6


@pytest.fixture(autouse=True)
def no_secret_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("BUDDY_KEY_SECRET", "BUDDY_KEY_SECRET_FILE"):
        monkeypatch.delenv(variable, raising=False)


def test_key_carries_its_id() -> None:
    key = make_key()
    assert key.text.startswith(f"sk-{key.id}_")
    assert parse_key_id(key.text) == key.id
    assert key.text not in repr(key)
    assert make_key().text != key.text


@pytest.mark.parametrize(
    "text", ["", "sk-", "sk-example-acme", "sk-0123456789ab", "sk-0123456789AB_" + "a" * 43, "x" * 59]
)
def test_text_of_another_form_has_no_id(text: str) -> None:
    assert parse_key_id(text) is None


def test_key_matches_only_its_own_mac_under_the_same_secret() -> None:
    key, other, secret = make_key().text, make_key().text, KeySecret(b"a")
    assert secret.matches(key, secret.mac(key))
    assert not secret.matches(other, secret.mac(key))
    assert not KeySecret(b"b").matches(key, secret.mac(key))
    assert len(secret.mac(key)) == 32


def test_secret_is_made_once_beside_the_sqlite_file(tmp_path: Path) -> None:
    first = KeySecret.load(tmp_path / "buddy.db")
    file = tmp_path / "buddy.db.secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert KeySecret.load(tmp_path / "buddy.db").mac("k") == first.mac("k")
    assert [path.name for path in tmp_path.iterdir()] == ["buddy.db.secret"]
    assert repr(first) == "KeySecret(...)"


def test_servers_that_start_at_once_have_the_same_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        secrets = threads.map(lambda _: KeySecret.load(tmp_path / "buddy.db").mac("k"), range(8))
    assert len(set(secrets)) == 1


def test_environment_decides_before_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    monkeypatch.setenv("BUDDY_KEY_SECRET_FILE", str(file))
    assert KeySecret.load(None).mac("k") == KeySecret(SECRET.encode()).mac("k")
    monkeypatch.setenv("BUDDY_KEY_SECRET", SECRET * 2)
    assert KeySecret.load(None).mac("k") == KeySecret(SECRET.encode() * 2).mac("k")
    assert not (tmp_path / "buddy.db.secret").exists()


def test_postgres_without_a_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set BUDDY_KEY_SECRET, or BUDDY_KEY_SECRET_FILE"):
        KeySecret.load(None)


def test_short_secret_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDDY_KEY_SECRET", "hunter2")
    with pytest.raises(ConfigError, match="has 7 characters, allowed are at least 32") as refused:
        KeySecret.load(None)
    assert "hunter2" not in str(refused.value)


def test_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDDY_ADMIN_KEY_FILE", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"BUDDY_ADMIN_KEY_FILE: .*gone cannot be read: No such file"):
        secret_from_environment("BUDDY_ADMIN_KEY")
    (tmp_path / "gone").write_text("\n")
    with pytest.raises(ConfigError, match="has no secret in its first line"):
        secret_from_environment("BUDDY_ADMIN_KEY")
