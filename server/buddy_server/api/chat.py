"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from buddy_server.api.answer_schemas import ChatCompletion, ChatCompletionChunk, ErrorView
from buddy_server.api.chat_format import ChatFormat
from buddy_server.api.endpoint import answer
from buddy_server.api.generation import Generation
from buddy_server.api.openapi import BUDGET_PARAMETER, completion_responses, keyed
from buddy_server.api.schemas import ChatRequest
from buddy_server.api.services import Services


def chat_router(services: Services) -> APIRouter:
    """The chat completions endpoint, streamed or not."""
    router = APIRouter(tags=["completions"])

    def chat_format(generation: Generation, _: ChatRequest) -> ChatFormat:
        return ChatFormat(generation, services.tokenizer)

    # response_model=None: the bodies are built by hand, and FastAPI should not check or copy them.
    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses=completion_responses(ChatCompletion, ChatCompletionChunk, ErrorView),
        openapi_extra=keyed(ChatRequest, BUDGET_PARAMETER),
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        return await answer(services, request, ChatRequest, chat_format)

    return router
