"""POST /v1/responses, without stored responses."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from buddy_server.api.endpoint import answer
from buddy_server.api.generation import Generation
from buddy_server.api.openapi import BUDGET_PARAMETER, completion_responses, keyed
from buddy_server.api.responses_format import ResponsesFormat
from buddy_server.api.responses_request import ResponsesRequest
from buddy_server.api.responses_schemas import ResponseEvent, ResponseView
from buddy_server.api.services import Services


def responses_router(services: Services) -> APIRouter:
    """The responses endpoint, streamed or not."""
    router = APIRouter(tags=["completions"])

    def responses_format(generation: Generation, body: ResponsesRequest) -> ResponsesFormat:
        return ResponsesFormat(generation, body, services.tokenizer)

    @router.post(
        "/v1/responses",
        response_model=None,
        responses=completion_responses(ResponseView, ResponseEvent, are_named=True),
        openapi_extra=keyed(ResponsesRequest, BUDGET_PARAMETER),
    )
    async def create_response(request: Request) -> Response:
        """Answer a conversation, in OpenAI's newer format. Nothing is stored."""
        return await answer(services, request, ResponsesRequest, responses_format)

    return router
