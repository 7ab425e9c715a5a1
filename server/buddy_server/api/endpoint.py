"""The handling common to both kinds of completion, streamed or not."""

from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response

from buddy_server.api.admission import admit
from buddy_server.api.body import read_body
from buddy_server.api.disconnect import unless_disconnected
from buddy_server.api.generation import Generation
from buddy_server.api.prompts import Body
from buddy_server.api.services import Services
from buddy_server.api.stream import ChunkWriter, CompletionStream


async def complete(
    services: Services,
    request: Request,
    schema: type[Body],
    collect: Callable[[Generation], Coroutine[Any, Any, dict[str, Any]]],
    write: Callable[[Generation], ChunkWriter],
) -> Response:
    """The response to `request`: `collect` creates its body, `write` the chunks of its stream."""
    # Before the body is read: a client without a key should cost us neither memory nor work.
    caller = services.authenticate(request)
    async with AsyncExitStack() as stack:
        life = await stack.enter_async_context(services.begin(caller))
        admitted = await admit(services, life, caller, request, await read_body(request, schema))
        generation = Generation(services.engine, admitted, life)
        if admitted.body.stream:
            # The response outlives this function and exits `life` itself.
            return CompletionStream(
                generation, write(generation), stack.pop_all(), life.headers, services.config.ping_interval_s
            )
        body = await unless_disconnected(request, collect(generation))
        # Log probabilities of long prompts are megabytes, which take the json module a second.
        return Response(msgspec.json.encode(body), media_type="application/json", headers=dict(life.headers))
