"""POST /v1/chat/completions."""

from contextlib import ExitStack

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from buddy_server.api.admission import admit, read_body
from buddy_server.api.disconnect import unless_disconnected
from buddy_server.api.generation import Generation
from buddy_server.api.responses import ChunkWriter, collect_completion
from buddy_server.api.schemas import ChatRequest
from buddy_server.api.services import Services
from buddy_server.api.stream import CompletionStream


def chat_router(services: Services) -> APIRouter:
    """The chat completions endpoint, streamed or not."""
    router = APIRouter()

    # response_model=None: the shapes are built by hand, FastAPI is not to check or copy them.
    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(request: Request) -> Response:
        # Before the body is read: who has no key gets neither memory nor work out of us.
        tenant = services.authenticate(request)
        with ExitStack() as stack:
            measured = stack.enter_context(services.metrics.request(tenant))
            chat = await read_body(request, ChatRequest)
            admitted = await admit(services, tenant, request, chat)
            measured.admitted(len(admitted.prompts[0]), admitted.depth)
            generation = Generation(services.engine, admitted, measured)
            if chat.stream:
                # The response outlives this function and closes `measured` itself.
                stack.pop_all()
                return CompletionStream(generation, ChunkWriter(generation), measured, services.config.ping_interval_s)
            return JSONResponse(await unless_disconnected(request, collect_completion(generation)))

    return router
