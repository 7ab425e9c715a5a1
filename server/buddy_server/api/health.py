"""Liveness, readiness, version and metrics. None of these endpoints needs a key."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from buddy_server.api.answer_schemas import Status, Version
from buddy_server.api.openapi import errors
from buddy_server.api.services import Services
from buddy_server.errors import NotReady, StoreAway
from buddy_server.version import server_version


def health_router(services: Services) -> APIRouter:
    """GET /health, /ready, /version, /metrics."""
    router = APIRouter(tags=["operation"])
    engine = services.engine

    @router.get("/health")
    async def health() -> Status:
        """Whether the server is alive."""
        return Status(status="ok")

    @router.get("/ready", responses=errors(NotReady, StoreAway))
    async def ready() -> Status:
        """Whether it can take work."""
        if not engine.is_ready:
            raise NotReady("The engine cannot take work yet.", retry_after_s=engine.ready_in_s)
        if not services.tenancy.is_ready:
            raise StoreAway
        return Status(status="ready")

    @router.get("/version")
    async def version() -> Version:
        return Version(version=server_version())

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await services.metrics.render(engine), media_type=CONTENT_TYPE_LATEST)

    return router
