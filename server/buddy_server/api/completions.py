"""POST /v1/completions."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from buddy_server.api.answer_schemas import Completion, CompletionChunk, ErrorView
from buddy_server.api.completion_format import CompletionFormat
from buddy_server.api.endpoint import answer
from buddy_server.api.generation import Generation
from buddy_server.api.openapi import BUDGET_PARAMETER, completion_responses, keyed
from buddy_server.api.schemas import CompletionRequest
from buddy_server.api.services import Services


def completions_router(services: Services) -> APIRouter:
    """The plain completions endpoint, streamed or not."""
    router = APIRouter(tags=["completions"])

    def completion_format(generation: Generation, _: CompletionRequest) -> CompletionFormat:
        return CompletionFormat(generation, services.tokenizer)

    @router.post(
        "/v1/completions",
        response_model=None,
        responses=completion_responses(Completion, CompletionChunk, ErrorView),
        openapi_extra=keyed(CompletionRequest, BUDGET_PARAMETER),
    )
    async def create_completion(request: Request) -> Response:
        """Continue a text."""
        return await answer(services, request, CompletionRequest, completion_format)

    return router
