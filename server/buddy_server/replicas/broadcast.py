"""One question to all replicas of a deployment."""

import asyncio
from contextvars import Context
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

ANSWER_TIMEOUT_S = 2.0


async def ask_all(deployment: DeploymentHandle, method: str, *arguments: object) -> list[Any]:
    """The answers of all replicas that are alive. Raises TimeoutError if any of them does not answer."""
    # In a context of its own: in that of an HTTP request, Ray Serve gives all calls one id, and takes them for one.
    return await asyncio.create_task(_ask_all(deployment, method, *arguments), context=Context())


async def _ask_all(deployment: DeploymentHandle, method: str, *arguments: object) -> list[Any]:
    try:
        asked = deployment.broadcast(method, *arguments)
        answers = await asked.results_async(timeout_s=ANSWER_TIMEOUT_S, return_exceptions=True)
    except DeploymentUnavailableError:
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]
