"""The application: combines routers, middleware and error handlers."""

from fastapi import FastAPI

from buddy_server.api.admin import AdminServices, admin_router
from buddy_server.api.answer_schemas import ChatCompletionChunk, CompletionChunk
from buddy_server.api.chat import chat_router
from buddy_server.api.completions import completions_router
from buddy_server.api.errors_handler import add_error_handlers
from buddy_server.api.health import health_router
from buddy_server.api.middleware import BodyLimit, RequestContext
from buddy_server.api.models import models_router
from buddy_server.api.openapi import describe
from buddy_server.api.pages import add_pages
from buddy_server.api.response_format import GrammarCompiler
from buddy_server.api.responses import responses_router
from buddy_server.api.responses_request import ResponsesRequest
from buddy_server.api.responses_schemas import ResponseEvent
from buddy_server.api.schemas import ChatRequest, CompletionRequest
from buddy_server.api.services import Services
from buddy_server.api.tokenization import DetokenizeRequest, TokenizeRequest, tokenization_router
from buddy_server.config import ServerConfig
from buddy_server.engine.constraint import Grammars
from buddy_server.engine.messages import EngineClient
from buddy_server.metrics import Metrics
from buddy_server.tenancy.capacity import Capacity
from buddy_server.tenancy.tenancy import Tenancy
from buddy_server.tokenizer import ChatTokenizer
from buddy_server.version import server_version


def create_app(
    config: ServerConfig,
    engine: EngineClient,
    tokenizer: ChatTokenizer,
    metrics: Metrics,
    tenancy: Tenancy,
    admin: AdminServices | None = None,
) -> FastAPI:
    """The ASGI application that serves `engine` to the tenants of `tenancy`. It starts and stops neither of them.
    Without `admin`, there is no /admin."""
    capacity = Capacity(engine, tenancy.book)
    compiler = GrammarCompiler(Grammars(tokenizer.backend, engine.info.vocab_size))
    services = Services(config, engine, tokenizer, metrics, tenancy, capacity, compiler)
    # FastAPI's own pages load scripts from other hosts.
    app = FastAPI(
        title="Buddy Serve", version=server_version(), openapi_url="/openapi.json", docs_url=None, redoc_url=None,
        description="The OpenAI API, with a budget for every request: the share of the model's layers it may run.",
        redirect_slashes=False,
    )  # fmt: skip
    add_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, max_pause_s=config.max_body_pause_s)
    # Added last, so outermost: it sees every response and every exception.
    app.add_middleware(RequestContext)
    app.include_router(chat_router(services))
    app.include_router(completions_router(services))
    app.include_router(responses_router(services))
    app.include_router(tokenization_router(services))
    app.include_router(models_router(services))
    app.include_router(health_router(services))
    if admin is not None:
        app.include_router(admin_router(admin, engine.info.actions))
    add_pages(app, engine.info.model_id)
    handwritten = (
        ChatRequest, ChatCompletionChunk, CompletionRequest, CompletionChunk, ResponsesRequest, ResponseEvent,
        TokenizeRequest, DetokenizeRequest,
    )  # fmt: skip
    describe(app, engine.info, handwritten, is_open=config.is_open)
    return app
