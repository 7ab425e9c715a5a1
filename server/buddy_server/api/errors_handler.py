"""The one place that turns errors into responses: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from buddy_server.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    StoreAway,
    StoreUnreachable,
    shown,
)

_log = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` the same JSON format; `RequestContext` answers unforeseen exceptions."""
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(StoreUnreachable, _handle_store_unreachable)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(HTTPException, _handle_http_error)


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON of an error, for a response or the middle of a stream."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def render_error(error: ApiError) -> Response:
    """The response to a request that failed with `error`."""
    return JSONResponse(error_body(error), error.status, headers=error.headers)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The first of pydantic's error details, as an InvalidRequest."""
    details = errors[0]
    if details["type"] == "json_invalid":
        return InvalidRequest(f"The request body is not valid JSON: {details['ctx']['error']}")
    param = _param(details["loc"])
    where = param or "The request body"
    if details["type"] == "missing":
        return InvalidRequest(f"{where}: this field is required", param=param)
    reason = str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"]
    if details["type"] == "value_error" and isinstance(details["input"], dict | list):
        # The reason names what is wrong inside; showing the whole value would only hide that.
        return InvalidRequest(f"{where}: {reason}", param=param)
    return InvalidRequest(f"{where}: {shown(details['input'])} is not allowed: {reason}", param=param)


def _param(location: Sequence[str | int]) -> str | None:
    """("messages", 0, "content") becomes "messages[0].content", as OpenAI names it."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.lstrip(".") or None


async def _handle_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return render_error(error)


async def _handle_store_unreachable(request: Request, error: Exception) -> Response:
    _log.warning("store unreachable", extra={"request_id": request.state.request_id, "reason": str(error)})
    return render_error(StoreAway())


async def _handle_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # FastAPI puts "body", "query" or "path" before the field.
    return render_error(invalid_request([{**details, "loc": details["loc"][1:]} for details in error.errors()]))


async def _handle_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    route = shown(f"{request.method} {request.url.path}")
    if error.status_code == 404:
        return render_error(RouteNotFound(f"There is no route {route}."))
    if error.status_code == 405:
        return render_error(MethodNotAllowed(f"The route does not allow {route}.", headers=error.headers))
    if isinstance(error.__cause__, ApiError):
        # FastAPI wraps what reading a body raises.
        return render_error(error.__cause__)
    if 400 <= error.status_code < 500:
        return render_error(InvalidRequest("The request body cannot be read; allowed is JSON in UTF-8, not too deep."))
    return render_error(InternalError())
