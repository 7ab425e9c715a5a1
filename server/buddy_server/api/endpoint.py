"""The handling common to all endpoints that generate, streamed or not."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from buddy_server.api.admission import admit
from buddy_server.api.answer_format import AnswerFormat
from buddy_server.api.body import read_body
from buddy_server.api.disconnect import unless_disconnected
from buddy_server.api.generation import Generation
from buddy_server.api.schemas import GenerationFields
from buddy_server.api.services import Services
from buddy_server.api.stream import AnswerStream

Body = TypeVar("Body", bound=GenerationFields)


async def answer(
    services: Services,
    request: Request,
    schema: type[Body],
    make_format: Callable[[Generation, Body], AnswerFormat],
) -> Response:
    """The response to `request`, whose body has to fit `schema`."""
    # Before the body is read: a client without a key should cost us neither memory nor work.
    caller = services.authenticate(request)
    async with AsyncExitStack() as stack:
        life = await stack.enter_async_context(services.begin(caller))
        body = await read_body(request, schema)
        generation = Generation(services.engine, await admit(services, life, caller, request, body.job()), life)
        answer_format = make_format(generation, body)
        if generation.admitted.job.stream:
            # The response outlives this function and exits `life` itself.
            return AnswerStream(
                generation, answer_format, stack.pop_all(), life.headers, services.config.ping_interval_s
            )
        answers = await unless_disconnected(request, generation.answers())
        # Log probabilities of long prompts are megabytes, which take the json module a second.
        content = msgspec.json.encode(answer_format.body(answers))
        return Response(content, media_type="application/json", headers=dict(life.headers))
