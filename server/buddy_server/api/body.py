"""Reads and checks the body of a request."""

from typing import TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from buddy_server.api.errors_handler import invalid_request
from buddy_server.api.json_bound import JsonBound
from buddy_server.errors import ClientDisconnected

_SMALL_BYTES = 2**16
"""A body up to this size cannot hold enough values to matter, and is parsed on the event loop."""
T = TypeVar("T", bound=BaseModel)


async def read_body(request: Request, schema: type[T]) -> T:
    """The validated body of `request`.

    Raises InvalidRequest (malformed JSON included), BodyTooLarge, or ClientDisconnected if the body ends early.
    """
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientDisconnected from None
    if len(body) <= _SMALL_BYTES:
        return _parsed(body, schema)
    # Parsed on a thread, so that other requests do not wait.
    return await to_thread.run_sync(_bounded_and_parsed, body, schema)


def _bounded_and_parsed(body: bytes, schema: type[T]) -> T:
    JsonBound().add(body)
    return _parsed(body, schema)


def _parsed(body: bytes, schema: type[T]) -> T:
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None
