"""The body of a request, read and checked."""

from typing import TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from buddy_server.api.errors_handler import invalid_request
from buddy_server.api.json_bound import JsonBound
from buddy_server.errors import ClientDisconnected

_SMALL_BYTES = 2**16
"""A body without room for enough values to matter, which is read on the spot."""
T = TypeVar("T", bound=BaseModel)


async def read_body(request: Request, schema: type[T]) -> T:
    """The body of `request`, checked.

    Raises InvalidRequest (malformed JSON included), BodyTooLarge, or ClientDisconnected when it ends early.
    """
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientDisconnected from None
    if len(body) <= _SMALL_BYTES:
        return _parsed(body, schema)
    # Others are answered meanwhile.
    return await to_thread.run_sync(_bounded_and_parsed, body, schema)


def _bounded_and_parsed(body: bytes, schema: type[T]) -> T:
    JsonBound().add(body)
    return _parsed(body, schema)


def _parsed(body: bytes, schema: type[T]) -> T:
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None
