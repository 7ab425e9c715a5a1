"""POST /v1/completions."""

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from buddy_server.api.completion_responses import CompletionChunkWriter, collect_plain_completion
from buddy_server.api.endpoint import complete
from buddy_server.api.schemas import CompletionRequest
from buddy_server.api.services import Services


def completions_router(services: Services) -> APIRouter:
    """The plain completions endpoint, streamed or not."""
    router = APIRouter()
    collect = partial(collect_plain_completion, tokenizer=services.tokenizer)
    write = partial(CompletionChunkWriter, tokenizer=services.tokenizer)

    @router.post("/v1/completions", response_model=None)
    async def create_completion(request: Request) -> Response:
        return await complete(services, request, CompletionRequest, collect, write)

    return router
