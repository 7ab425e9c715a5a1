"""/openapi.json: what FastAPI cannot see, because bodies are read and written by hand."""

from collections.abc import Iterator, Sequence
from http import HTTPStatus
from itertools import groupby
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from buddy_server.api.admission import BUDGET_HEADER
from buddy_server.api.answer_schemas import ErrorView
from buddy_server.api.schemas import RequestFields
from buddy_server.engine.messages import EngineInfo
from buddy_server.errors import (
    ApiError,
    BodyTooLarge,
    BodyTooSlow,
    ContextLengthExceeded,
    InsufficientQuota,
    InternalError,
    InvalidApiKey,
    InvalidBudget,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    RateLimited,
    StoreAway,
    TenantDisabled,
    UnsupportedField,
)

REF = "#/components/schemas/{model}"
KEY = "api-key"
REFUSED = "x-refused"
"""Marks a field that only has values that change nothing."""
KEY_ERRORS = (InvalidApiKey, TenantDisabled, InternalError)
BODY_ERRORS = (InvalidRequest, UnsupportedField, BodyTooSlow, BodyTooLarge, ModelNotFound, *KEY_ERRORS)
COMPLETION_ERRORS = (
    InvalidBudget, ContextLengthExceeded, RateLimited, InsufficientQuota, Overloaded, NotReady, StoreAway, *BODY_ERRORS
)  # fmt: skip

BUDGET = "Budget"
BUDGET_PARAMETER = {
    "name": BUDGET_HEADER,
    "in": "header",
    "description": "For clients that cannot add a field; the field counts if both are given",
    "schema": {"$ref": REF.format(model=BUDGET)},
}
_LIMIT_HEADERS = {
    f"x-ratelimit-{kind}-{of}": "If the tenant's tier has such a limit; tokens are layer-tokens"
    for of in ("requests", "tokens")
    for kind in ("limit", "remaining", "reset")
}
_RETRY_HEADERS = {
    "retry-after": "In seconds",
    "retry-after-ms": "In milliseconds",
    "x-should-retry": '"false" if no retry can succeed',
}
_OTHER_HEADERS = {
    "x-request-id": "The request's own, cleaned, or a new one",
    "openai-processing-ms": "From the arrival of the request to the first byte of the response",
    "www-authenticate": "Bearer",
}
_TEXT = {"type": "string"}


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


_ERROR_HEADERS = {
    401: _headers("www-authenticate"),
    429: _headers(*_LIMIT_HEADERS, *_RETRY_HEADERS),
    503: _headers("retry-after"),
}


def errors(*kinds: type[ApiError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with errors of `kinds`."""
    by_status = groupby(sorted(kinds, key=lambda kind: kind.status), key=lambda kind: kind.status)
    return {
        status: {
            "model": ErrorView,
            "description": f"{HTTPStatus(status).phrase}: {', '.join(sorted({kind.code or kind.type for kind in of}))}",
            "headers": _ERROR_HEADERS.get(status, {}),
        }
        for status, of in by_status
    }


def completion_responses(
    body: type[BaseModel], *events: type[BaseModel], are_named: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with `body`, or streams `events`. With `are_named` each has its type
    outside its data as well; otherwise the last one is the text [DONE]."""
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": _ref(event)} for event in events]},
    }
    event = {
        "type": "object",
        "required": ["event", "data"] if are_named else ["data"],
        "properties": {"event": _TEXT, "data": data} if are_named else {"data": {"anyOf": [data, {"const": "[DONE]"}]}},
    }
    answer = {
        "model": body,
        "description": 'The whole answer, or with `"stream": true` server-sent events',
        # Of one event. OpenAPI 3.2 calls this itemSchema; 3.1, which more tools read, has no other word.
        "content": {"text/event-stream": {"schema": event}},
        "headers": _headers(*_LIMIT_HEADERS),
    }
    return {200: answer, **errors(*COMPLETION_ERRORS)}


def keyed(body: type[RequestFields] | None = None, *parameters: dict[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of a route that needs a key and reads a `body` and `parameters`."""
    extra: dict[str, Any] = {"security": [{KEY: []}]}
    if body is not None:
        content = {"application/json": {"schema": {"$ref": _ref(body)}}}
        extra["requestBody"] = {"required": True, "content": content}
    if parameters:
        extra["parameters"] = list(parameters)
    return extra


def describe(app: FastAPI, info: EngineInfo, models: Sequence[type[BaseModel]], *, is_open: bool) -> None:
    """Have `app` serve the whole document. `models` are the bodies and chunks that its routes read and write by hand;
    no key is needed if it `is_open`."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _complete(app.openapi_schema, info, models, is_open)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(document: dict[str, Any], info: EngineInfo, models: Sequence[type[BaseModel]], is_open: bool) -> None:
    components = document["components"]
    definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF)[1]
    share = {"type": "number", "minimum": info.actions.smallest_budget, "maximum": 1}
    components["schemas"] |= {**definitions["$defs"], BUDGET: {"anyOf": [share, {"const": "auto"}]}}
    for model in models:
        if issubclass(model, RequestFields):
            _state_limits(components["schemas"][model.__name__]["properties"], model, info)
    # FastAPI assumes that its own validation may fail, which has another status here.
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    told = _LIMIT_HEADERS | _RETRY_HEADERS | _OTHER_HEADERS
    components["headers"] = {name: {"description": told[name], "schema": _TEXT} for name in told}
    components.setdefault("securitySchemes", {})[KEY] = {"type": "http", "scheme": "bearer"}
    for operation in _operations(document):
        operation["responses"].pop("422", None)
        if is_open and operation.get("security") == [{KEY: []}]:
            operation["security"].insert(0, {})
        for response in operation["responses"].values():
            response["headers"] = _headers("x-request-id", "openai-processing-ms") | response.get("headers", {})


def _state_limits(fields: dict[str, Any], body: type[RequestFields], info: EngineInfo) -> None:
    """Add to the `fields` of a `body` what depends on the model, and those that are refused."""
    if "model" in fields:
        fields["model"]["examples"] = [info.model_id]
    if "budget" in fields:
        fields["budget"]["anyOf"] = [{"$ref": REF.format(model=BUDGET)}, {"type": "null"}]
    for field, (harmless, reason) in body.unsupported.items():
        refused = {"description": f"Not supported: {reason}", "enum": [None, *harmless], REFUSED: True}
        fields.setdefault(field, refused)


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in document["paths"].values():
        yield from methods.values()


def _ref(model: type[BaseModel]) -> str:
    return REF.format(model=model.__name__)
