"""The admin API: tenants, tiers and keys, usage and audit. Every endpoint needs the admin key."""

import hmac
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from buddy_routing.action_space import ActionSpace
from buddy_server.api.admin_records import add_audit, add_usage
from buddy_server.api.admin_schemas import (
    KeyRequest,
    KeyView,
    Listed,
    NewKeyView,
    NewTenant,
    TenantChange,
    TenantView,
    TierView,
    shown_time,
)
from buddy_server.api.answer_schemas import ErrorView
from buddy_server.api.openapi import errors
from buddy_server.errors import ConfigError, InternalError, InvalidApiKey, InvalidRequest, StoreAway
from buddy_server.tenancy.administration import Administration, ListedTenant, ListedTier
from buddy_server.tenancy.depth import check_tier
from buddy_server.tenancy.keys import bearer_key
from buddy_server.tenancy.ledger.ledger import Ledger
from buddy_server.tenancy.store.ledger_store import LedgerStore
from buddy_server.tenancy.store.snapshot import StoredKey
from buddy_server.tenancy.tier_entry import Name, TierEntry


@dataclass(frozen=True, slots=True)
class AdminServices:
    """What the admin API needs; `key` opens it."""

    key: str = field(repr=False)
    administration: Administration
    ledger: Ledger
    rows: LedgerStore


def admin_router(services: AdminServices, actions: ActionSpace) -> APIRouter:
    """All of /admin. The budgets of tiers are checked against the model's `actions`."""
    router = APIRouter(
        prefix="/admin",
        tags=["admin"],
        route_class=_guarded_route(services.key),
        # For the OpenAPI document alone; the route checks the key.
        dependencies=[Security(HTTPBearer(scheme_name="admin-key", auto_error=False))],
        responses={"4XX": {"model": ErrorView, "description": "Refused"}, **errors(InternalError, StoreAway)},
    )
    _add_tenants(router, services.administration)
    _add_tiers(router, services.administration, actions)
    _add_keys(router, services.administration)
    add_audit(router, services.administration)
    add_usage(router, services.ledger, services.rows)
    return router


def _guarded_route(admin_key: str) -> type[APIRoute]:
    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_with_key(request: Request) -> Response:
                # A dependency would run after the body has been read.
                given = bearer_key(request.headers.get("authorization"))
                if not hmac.compare_digest(given.encode(), admin_key.encode()):
                    raise InvalidApiKey("The API key is not the admin key.")
                return await handle(request)

            return handle_with_key

    return GuardedRoute


def _add_tenants(router: APIRouter, administration: Administration) -> None:
    @router.get("/tenants")
    async def list_tenants() -> Listed[TenantView]:
        return Listed(data=[_tenant_view(tenant) for tenant in await administration.tenants()])

    @router.post("/tenants", status_code=201)
    async def create_tenant(body: NewTenant) -> TenantView:
        await administration.create_tenant(body.name, body.tier)
        return _tenant_view(await administration.tenant(body.name))

    @router.get("/tenants/{name}")
    async def retrieve_tenant(name: str) -> TenantView:
        return _tenant_view(await administration.tenant(name))

    @router.patch("/tenants/{name}")
    async def change_tenant(name: Name, body: TenantChange) -> TenantView:
        await administration.change_tenant(name, tier=body.tier, disabled=body.disabled)
        return _tenant_view(await administration.tenant(name))


def _add_tiers(router: APIRouter, administration: Administration, actions: ActionSpace) -> None:
    @router.get("/tiers")
    async def list_tiers() -> Listed[TierView]:
        return Listed(data=[_tier_view(tier) for tier in await administration.tiers()])

    @router.get("/tiers/{name}")
    async def retrieve_tier(name: str) -> TierView:
        return _tier_view(await administration.tier(name))

    @router.put("/tiers/{name}")
    async def put_tier(name: Name, body: TierEntry) -> TierView:
        """Create the tier, or replace all of its fields."""
        tier = body.tier(name)
        try:
            check_tier(tier, actions)
        except ConfigError as error:
            raise InvalidRequest(str(error)) from None
        await administration.put_tier(tier)
        return _tier_view(await administration.tier(name))

    @router.delete("/tiers/{name}", status_code=204)
    async def delete_tier(name: Name) -> None:
        await administration.delete_tier(name)


def _add_keys(router: APIRouter, administration: Administration) -> None:
    @router.get("/tenants/{name}/keys")
    async def list_keys(name: str) -> Listed[KeyView]:
        return Listed(data=[KeyView(**_key_fields(key)) for key in await administration.keys(name)])

    @router.post("/tenants/{name}/keys", status_code=201)
    async def create_key(name: Name, body: Annotated[KeyRequest, Body(default_factory=KeyRequest)]) -> NewKeyView:
        """Make a key. The response has it, and nothing has it later."""
        key, stored = await administration.create_key(name, body.expires_ms)
        return NewKeyView(**_key_fields(stored), key=key.text)

    @router.delete("/keys/{key_id}", status_code=204)
    async def revoke_key(key_id: str) -> None:
        await administration.revoke_key(key_id)


def _tenant_view(tenant: ListedTenant) -> TenantView:
    return TenantView(name=tenant.name, tier=tenant.tier, disabled=tenant.disabled, source=tenant.source)


def _tier_view(listed: ListedTier) -> TierView:
    return TierView(**asdict(listed.tier), source=listed.source)


def _key_fields(key: StoredKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "created_at": shown_time(key.created_ms),
        "expires_at": None if key.expires_ms is None else shown_time(key.expires_ms),
        "revoked_at": None if key.revoked_ms is None else shown_time(key.revoked_ms),
    }
