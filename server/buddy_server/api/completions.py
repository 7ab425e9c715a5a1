"""POST /v1/completions."""

from contextlib import ExitStack

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from buddy_server.api.admission import admit, read_body
from buddy_server.api.completion_responses import CompletionChunkWriter, collect_plain_completion
from buddy_server.api.disconnect import unless_disconnected
from buddy_server.api.generation import Generation
from buddy_server.api.schemas import CompletionRequest
from buddy_server.api.services import Services
from buddy_server.api.stream import CompletionStream


def completions_router(services: Services) -> APIRouter:
    """The plain completions endpoint, streamed or not."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def create_completion(request: Request) -> Response:
        tenant = services.authenticate(request)
        with ExitStack() as stack:
            measured = stack.enter_context(services.metrics.request(tenant))
            admitted = await admit(services, tenant, request, await read_body(request, CompletionRequest))
            measured.admitted(sum(map(len, admitted.prompts)), admitted.depth)
            generation = Generation(services.engine, admitted, measured)
            if admitted.body.stream:
                stack.pop_all()
                writer = CompletionChunkWriter(generation, services.tokenizer)
                return CompletionStream(generation, writer, measured, services.config.ping_interval_s)
            body = collect_plain_completion(generation, services.tokenizer)
            return JSONResponse(await unless_disconnected(request, body))

    return router
