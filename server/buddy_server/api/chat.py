"""POST /v1/chat/completions."""

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from buddy_server.api.chat_responses import ChunkWriter, collect_completion
from buddy_server.api.endpoint import complete
from buddy_server.api.schemas import ChatRequest
from buddy_server.api.services import Services


def chat_router(services: Services) -> APIRouter:
    """The chat completions endpoint, streamed or not."""
    router = APIRouter()
    collect = partial(collect_completion, tokenizer=services.tokenizer)
    write = partial(ChunkWriter, tokenizer=services.tokenizer)

    # response_model=None: the bodies are built by hand, and FastAPI should not check or copy them.
    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(request: Request) -> Response:
        return await complete(services, request, ChatRequest, collect, write)

    return router
