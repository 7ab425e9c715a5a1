"""The command lines of `buddy tenants` and `buddy keys`; tenant_commands.py runs them."""

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path

from buddy_server.clock import now_ms

_DAY_MS = 24 * 60 * 60 * 1000


def add_tenant_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add(actions.add_parser("list", help="all tenants, of the file and the store"), "list_tenants")
    create = _add(actions.add_parser("create", help="a new tenant, in the store"), "create_tenant")
    change = _add(actions.add_parser("change", help="put a tenant into another tier"), "change_tenant")
    disable = _add(actions.add_parser("disable", help="refuse all keys of a tenant"), "disable_tenant")
    enable = _add(actions.add_parser("enable", help="accept them again"), "enable_tenant")
    for each in (create, change, disable, enable):
        each.add_argument("name", metavar="NAME")
    for each in (create, change):
        each.add_argument("--tier", metavar="TIER", required=True, help="of the file or the store")


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    create = _add(actions.add_parser("create", help="a new key, printed once"), "create_key")
    create.add_argument("tenant", metavar="TENANT")
    create.add_argument(
        "--expires",
        metavar="WHEN",
        type=_expiry,
        help="30d for 30 days from now, or the first day, in UTC, on which it is not valid (default: never)",
    )
    listing = _add(actions.add_parser("list", help="the keys in the store"), "list_keys")
    listing.add_argument("tenant", metavar="TENANT", nargs="?")
    revoke = _add(actions.add_parser("revoke", help="refuse a key from now on"), "revoke_key")
    revoke.add_argument("key_id", metavar="ID", help="what is between 'sk-' and '_' in the key")


def _add(parser: argparse.ArgumentParser, action: str) -> argparse.ArgumentParser:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", required=True, help="YAML file; its `store` is where the tenants are"
    )
    parser.set_defaults(action=action)
    return parser


def _expiry(text: str) -> int:
    """Milliseconds since 1970."""
    now = now_ms()
    expires_ms = 0
    if match := re.fullmatch(r"([0-9]{1,5})d", text):
        expires_ms = now + int(match[1]) * _DAY_MS
    elif re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        try:
            expires_ms = int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)
        except ValueError:
            expires_ms = 0
    if expires_ms <= now:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: give days like 30d, or a day to come like 2030-12-31"
        )
    return expires_ms
