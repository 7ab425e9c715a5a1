"""The models this server serves: one."""

import time

from fastapi import APIRouter, Request

from buddy_server.api.answer_schemas import ModelList, ModelView
from buddy_server.api.openapi import KEY_ERRORS, errors, keyed
from buddy_server.api.prompts import context_limit
from buddy_server.api.services import Services
from buddy_server.errors import ModelNotFound


def models_router(services: Services) -> APIRouter:
    """GET /v1/models and /v1/models/{id}; an id may contain slashes, as hub ids do."""
    router = APIRouter(tags=["models"])
    model_id = services.engine.info.model_id
    longest, _ = context_limit(services.engine.info)
    model = ModelView(id=model_id, created=int(time.time()), owned_by="buddy-serve", max_model_len=longest)

    @router.get("/v1/models", responses=errors(*KEY_ERRORS), openapi_extra=keyed())
    async def list_models(request: Request) -> ModelList:
        services.authenticate(request)
        return ModelList(data=[model])

    @router.get("/v1/models/{asked:path}", responses=errors(ModelNotFound, *KEY_ERRORS), openapi_extra=keyed())
    async def retrieve_model(request: Request, asked: str) -> ModelView:
        services.authenticate(request)
        if asked != model_id:
            raise ModelNotFound(asked, model_id)
        return model

    return router
