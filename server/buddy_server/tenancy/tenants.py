"""Finds the tenant behind an API key."""

import hashlib
import hmac
from collections.abc import Sequence

from buddy_server.errors import InvalidApiKey
from buddy_server.tenancy.keys import bearer_key
from buddy_server.tenancy.policy import Tenant


class TenantDirectory:
    """The configured tenants. A single tenant without keys is an open server: any header is accepted."""

    def __init__(self, tenants: Sequence[Tenant]):
        self._open_tenant = tenants[0] if len(tenants) == 1 and not tenants[0].key_digests else None
        self._digests = [(digest, tenant) for tenant in tenants for digest in tenant.key_digests]

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant whose key the `authorization` header carries as `Bearer <key>`.

        Raises InvalidApiKey if the header is absent, has another form, or holds an unknown key.
        """
        if self._open_tenant is not None:
            return self._open_tenant
        digest = hashlib.sha256(bearer_key(authorization).encode()).digest()
        found: Tenant | None = None
        # Compares every digest, so that the time taken does not reveal which one matched.
        for known, tenant in self._digests:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise InvalidApiKey("The API key is not valid here.")
        return found
