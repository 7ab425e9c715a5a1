"""Liveness, readiness, version and metrics. None of these endpoints needs a key."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from buddy_server.api.services import Services
from buddy_server.errors import NotReady, StoreAway
from buddy_server.version import server_version


def health_router(services: Services) -> APIRouter:
    """GET /health, /ready, /version, /metrics."""
    router = APIRouter()
    engine = services.engine

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        if not engine.is_ready:
            raise NotReady("The engine cannot take work yet.", retry_after_s=engine.ready_in_s)
        if not services.tenancy.is_ready:
            raise StoreAway
        return {"status": "ready"}

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": server_version()}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(services.metrics.render(engine), media_type=CONTENT_TYPE_LATEST)

    return router
