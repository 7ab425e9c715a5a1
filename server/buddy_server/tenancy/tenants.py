"""Finds the tenant behind an API key."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from buddy_server.errors import InvalidApiKey, TenantDisabled
from buddy_server.tenancy.keys import KeySecret, bearer_key, parse_key_id
from buddy_server.tenancy.policy import Tenant
from buddy_server.tenancy.store.snapshot import StoredKey


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. `key_id` is what the ledger knows the key by; None on an open server."""

    tenant: Tenant
    key_id: str | None = None


class TenantDirectory:
    """The tenants of one moment, and their keys. With `is_open`, the only tenant needs no key."""

    def __init__(
        self,
        tenants: Iterable[Tenant],
        *,
        is_open: bool,
        keys: Iterable[StoredKey] = (),
        disabled: Iterable[str] = (),
        secret: KeySecret | None = None,
    ) -> None:
        self.tenants: Mapping[str, Tenant] = {tenant.name: tenant for tenant in tenants}
        self._open_caller = Caller(next(iter(self.tenants.values()))) if is_open else None
        self._by_digest = {digest: tenant for tenant in self.tenants.values() for digest in tenant.key_digests}
        self._by_id = {key.id: key for key in keys}
        self._disabled = frozenset(disabled)
        self._secret = secret

    def authenticate(self, authorization: str | None, now_ms: int) -> Caller:
        """Who owns the key that the `authorization` header carries as `Bearer <key>`, at `now_ms` since 1970.

        Raises InvalidApiKey if the header is absent, has another form, or holds an unknown, expired or revoked key;
        TenantDisabled if the key is good and its tenant is not.
        """
        if self._open_caller is not None:
            return self._open_caller
        key = bearer_key(authorization)
        caller = self._by_stored_key(key, now_ms) or self._by_file_key(key)
        if caller is None:
            raise InvalidApiKey("The API key is not valid here.")
        if caller.tenant.name in self._disabled:
            raise TenantDisabled(caller.tenant.name)
        return caller

    def _by_stored_key(self, key: str, now_ms: int) -> Caller | None:
        known = self._by_id.get(parse_key_id(key) or "")
        if known is None or self._secret is None or not self._secret.matches(key, known.mac):
            return None
        if not known.is_valid(now_ms):
            raise InvalidApiKey("The API key has expired or was revoked.")
        tenant = self.tenants.get(known.tenant)
        return None if tenant is None else Caller(tenant, known.id)

    def _by_file_key(self, key: str) -> Caller | None:
        digest = hashlib.sha256(key.encode()).digest()
        # How long the look-up of a digest takes tells nothing about other keys.
        tenant = self._by_digest.get(digest)
        return None if tenant is None else Caller(tenant, digest.hex()[:12])
