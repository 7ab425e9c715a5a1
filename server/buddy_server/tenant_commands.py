"""`buddy tenants` and `buddy keys`: the store, without a server. Running servers notice the changes."""

import argparse
import asyncio
import getpass
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import TypeAdapter, ValidationError

from buddy_server.clock import now_ms
from buddy_server.config import ServerConfig, load_config
from buddy_server.errors import ConfigError, InvalidRequest, shown
from buddy_server.tenancy.administration import Administration
from buddy_server.tenancy.keys import KeySecret
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.known_secret import check_secret
from buddy_server.tenancy.store.snapshot import StoredKey
from buddy_server.tenancy.store.tenant_store import TenantStore
from buddy_server.tenancy.tier_entry import Name


def run_command(parsed: argparse.Namespace) -> None:
    """Raises ConfigError, StoreUnreachable, or the ApiError that the admin API would answer with."""
    asyncio.run(_run(parsed, load_config(parsed.config)))


async def _run(parsed: argparse.Namespace, config: ServerConfig) -> None:
    if config.store is None:
        raise ConfigError(f"{parsed.config} has no store; allowed is one like store: {{url: 'sqlite:///buddy.db'}}")
    database = Database(config.store.url)
    try:
        await database.migrate()
        secret = None
        if parsed.action == "create_key":
            secret = KeySecret.load(database.sqlite_file)
            await check_secret(database, secret, may_replace=False)
        book = _FileBook({tenant.name: tenant for tenant in config.tenants}, {tier.name: tier for tier in config.tiers})
        administration = Administration(TenantStore(database), book, secret, f"command:{_user()}")
        await _ACTIONS[parsed.action](parsed, administration)
    finally:
        await database.close()


@dataclass(frozen=True, slots=True)
class _FileBook:
    """A Book without a server that could apply what changes."""

    file_tenants: Mapping[str, Tenant]
    file_tiers: Mapping[str, Tier]

    async def refresh(self) -> None:
        """Running servers poll the store."""


async def _list_tenants(_: argparse.Namespace, administration: Administration) -> None:
    rows = [
        (tenant.name, tenant.tier, tenant.source, "disabled" if tenant.disabled else "enabled")
        for tenant in await administration.tenants()
    ]
    _print_table([("TENANT", "TIER", "SOURCE", "STATE"), *rows])


async def _create_tenant(parsed: argparse.Namespace, administration: Administration) -> None:
    try:
        TypeAdapter(Name).validate_python(parsed.name)
    except ValidationError:
        allowed = "up to 64 letters, digits, '.', '_' and '-', first a letter or a digit"
        raise InvalidRequest(f"{shown(parsed.name)} is not allowed as a name: give {allowed}") from None
    await administration.create_tenant(parsed.name, parsed.tier)
    print(f"created {parsed.name}; `buddy keys create {parsed.name}` makes its keys", file=sys.stderr)


async def _change_tenant(parsed: argparse.Namespace, administration: Administration) -> None:
    await administration.change_tenant(parsed.name, tier=parsed.tier)
    print(f"{parsed.name} is in the tier {parsed.tier}", file=sys.stderr)


async def _disable_tenant(parsed: argparse.Namespace, administration: Administration) -> None:
    await administration.change_tenant(parsed.name, disabled=True)
    print(f"disabled {parsed.name}", file=sys.stderr)


async def _enable_tenant(parsed: argparse.Namespace, administration: Administration) -> None:
    await administration.change_tenant(parsed.name, disabled=False)
    print(f"enabled {parsed.name}", file=sys.stderr)


async def _create_key(parsed: argparse.Namespace, administration: Administration) -> None:
    key, stored = await administration.create_key(parsed.tenant, parsed.expires)
    print(f"key {key.id} of {stored.tenant}, shown only now:", file=sys.stderr)
    print(key.text)


async def _list_keys(parsed: argparse.Namespace, administration: Administration) -> None:
    disabled = {tenant.name for tenant in await administration.tenants() if tenant.disabled}
    rows = [
        (key.id, key.tenant, _time(key.created_ms), _time(key.expires_ms), _state(key, key.tenant in disabled))
        for key in await administration.keys(parsed.tenant)
    ]
    _print_table([("KEY", "TENANT", "CREATED", "EXPIRES", "STATE"), *rows])


async def _revoke_key(parsed: argparse.Namespace, administration: Administration) -> None:
    await administration.revoke_key(parsed.key_id)
    print(f"revoked {parsed.key_id}", file=sys.stderr)


_ACTIONS: Mapping[str, Callable[[argparse.Namespace, Administration], Awaitable[None]]] = {
    "list_tenants": _list_tenants,
    "create_tenant": _create_tenant,
    "change_tenant": _change_tenant,
    "disable_tenant": _disable_tenant,
    "enable_tenant": _enable_tenant,
    "create_key": _create_key,
    "list_keys": _list_keys,
    "revoke_key": _revoke_key,
}


def _state(key: StoredKey, is_disabled: bool) -> str:
    if key.revoked_ms is not None:
        return "revoked"
    if not key.is_valid(now_ms()):
        return "expired"
    return "disabled" if is_disabled else "valid"


def _time(milliseconds: int | None) -> str:
    if milliseconds is None:
        return "never"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    listed = list(rows)
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    for row in listed:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that has no name.
        return str(os.getuid())
