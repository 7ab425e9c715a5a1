"""API keys, `sk-<id>_<secret>`: made, recognized and compared. The store has the id and a MAC, never the key."""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from buddy_server.errors import ConfigError, InvalidApiKey

_ID = "[0-9a-f]{12}"
_KEY = re.compile(f"sk-({_ID})_[A-Za-z0-9_-]{{43}}")
_MIN_SECRET_CHARS = 32


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that has just been made. `text` is what the client sends; nobody can see it again later."""

    id: str
    text: str = field(repr=False)


def make_key() -> NewKey:
    """A new key with a secret of 32 random bytes. The id is 12 hexadecimal digits."""
    key_id = secrets.token_hex(6)
    return NewKey(key_id, f"sk-{key_id}_{secrets.token_urlsafe(32)}")


def parse_key_id(text: str) -> str | None:
    """The id in a key, or None for what is no key of this form."""
    match = _KEY.fullmatch(text)
    return match[1] if match else None


def is_key_id(text: str) -> bool:
    """Whether a key could have this id."""
    return re.fullmatch(_ID, text) is not None


def bearer_key(authorization: str | None) -> str:
    """The key in an `authorization` header, `Bearer <key>`. Raises InvalidApiKey if it is absent or has another
    form."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise InvalidApiKey("No API key was given; send it as 'Authorization: Bearer <key>'.")
    return key.strip()


class KeySecret:
    """The server's secret, without which the MACs in the store say nothing about the keys. Every process that shares a
    store needs the same one."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def __repr__(self) -> str:
        return "KeySecret(...)"

    @property
    def fingerprint(self) -> bytes:
        """What tells this secret from others, and reveals nothing of it. It is the MAC of no key."""
        return self.mac("fingerprint")

    @classmethod
    def load(cls, sqlite_file: Path | None) -> "KeySecret":
        """The secret in BUDDY_KEY_SECRET, or in the file that BUDDY_KEY_SECRET_FILE names. Without either, it is in the
        `secret_file`, made here if there is none; for PostgreSQL, `sqlite_file` is None.

        Raises ConfigError if the secret is missing, too short or cannot be read.
        """
        secret = secret_from_environment("BUDDY_KEY_SECRET")
        if secret is None and sqlite_file is None:
            raise ConfigError(
                "a PostgreSQL store needs the server's secret for API keys: set BUDDY_KEY_SECRET, or "
                f"BUDDY_KEY_SECRET_FILE to a file that has it; allowed are at least {_MIN_SECRET_CHARS} characters"
            )
        if secret is None:
            assert sqlite_file is not None
            secret = _secret_beside(sqlite_file)
        if len(secret) < _MIN_SECRET_CHARS:
            raise ConfigError(
                f"the server's secret for API keys has {len(secret)} characters, allowed are at least "
                f"{_MIN_SECRET_CHARS}"
            )
        return cls(secret.encode())

    def mac(self, key: str) -> bytes:
        """The HMAC-SHA256 of a key, as the store has it."""
        return hmac.digest(self._secret, key.encode(), hashlib.sha256)

    def matches(self, key: str, mac: bytes) -> bool:
        """Whether `mac` is that of `key`; the time taken does not depend on how much of it matches."""
        return hmac.compare_digest(self.mac(key), mac)


def secret_from_environment(variable: str) -> str | None:
    """The value of an environment variable, or else the first line of the file that `<variable>_FILE` names; None if
    neither is set.

    Raises ConfigError, which names the variable, if the file cannot be read or is empty.
    """
    if value := os.environ.get(variable):
        return value
    path = os.environ.get(f"{variable}_FILE")
    if not path:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{variable}_FILE: {path} cannot be read: {reason}") from None
    if not lines or not lines[0].strip():
        raise ConfigError(f"{variable}_FILE: {path} has no secret in its first line")
    return lines[0].strip()


def secret_file(sqlite_file: Path) -> Path:
    """Where the secret of an SQLite database is, unless the environment has it."""
    return sqlite_file.with_name(f"{sqlite_file.name}.secret")


def _secret_beside(database: Path) -> str:
    path = secret_file(database)
    try:
        if not path.exists():
            _create(path)
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{path}: the server's secret for API keys cannot be kept here: {error.strerror}") from None


def _create(path: Path) -> None:
    """Write a new secret, which only this user may read, unless another process is faster."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8") as file:
        file.write(f"{secrets.token_urlsafe(32)}\n")
        file.flush()
        os.fsync(file.fileno())
        try:
            # Whole or not at all, and never over the secret of another process that starts now.
            os.link(file.name, path)
        except FileExistsError:
            return
