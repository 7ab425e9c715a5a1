"""The models this server serves: one."""

import time
from typing import Any

from fastapi import APIRouter, Request

from buddy_server.api.services import Services
from buddy_server.errors import ModelNotFound


def models_router(services: Services) -> APIRouter:
    """GET /v1/models and /v1/models/{id}; an id may contain slashes, as hub ids do."""
    router = APIRouter()
    model_id = services.engine.info.model_id
    model = {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "buddy-serve"}

    @router.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        services.authenticate(request)
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{asked:path}")
    async def retrieve_model(request: Request, asked: str) -> dict[str, Any]:
        services.authenticate(request)
        if asked != model_id:
            raise ModelNotFound(asked, model_id)
        return model

    return router
