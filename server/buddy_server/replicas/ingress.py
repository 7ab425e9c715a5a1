"""The HTTP application as a Ray Serve deployment: the same as in one process, but for where its engine is."""

import gc
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from buddy_server.chat_template import read_chat_template
from buddy_server.config import load_config
from buddy_server.fleet.member import FleetMember
from buddy_server.logs import configure_logs
from buddy_server.replicas.board import shared_board
from buddy_server.replicas.client import EngineReplicas
from buddy_server.replicas.metrics import ReplicatedMetrics
from buddy_server.replicas.wire import decode_ready, member_name
from buddy_server.serve import GRACE_PERIOD_S, ServeOptions, log_start, make_app, settler
from buddy_server.tenancy.tenancy import Tenancy, prepare_store
from buddy_server.tokenizer import ChatTokenizer, import_transformers_without_torch


@serve.ingress()
class Ingress:
    """One of the processes that answer clients. What they must agree on is in Redis and PostgreSQL; with limits in
    memory, there is one of them."""

    def __init__(self, options: ServeOptions, version: str, engines: DeploymentHandle) -> None:
        """`engines` are the replicas of `version` alone (PlacementRouter)."""
        configure_logs()
        self._options = options
        self._version = version
        self._engines = engines
        self._name = serve.get_replica_context().replica_id.unique_id

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve; waits for the first replica of the engine. Raises ConfigError."""
        options, config = self._options, load_config(self._options.config)
        if config.store is not None:
            await prepare_store(config.store)
        import_transformers_without_torch()
        template = None if options.chat_template is None else read_chat_template(options.chat_template)
        ready = decode_ready(await self._engines.describe.remote())
        self._metrics = metrics = ReplicatedMetrics(ready.info, config.tenants, _all_ingresses(), self._engines)
        tenancy = Tenancy(config, options.config, ready.info, metrics)
        board = shared_board(config.limits, ready.info.model_id)
        member = FleetMember(board, member_name(self._version, self._name), decides=True)
        settle, note = settler(metrics, tenancy.bills), tenancy.bills.note
        engine = EngineReplicas(self._engines, self._version, ready, member, settle, note)
        self._engine = engine
        tokenizer = ChatTokenizer.from_directory(Path(ready.directory), template)
        app = make_app(config, engine, tokenizer, metrics, tenancy, member)
        app.add_middleware(BehindProxy)
        log_start(ready, config, options)
        gc.collect()
        gc.freeze()
        return app

    async def drain(self) -> None:
        """Refuse new requests, and return when those under way have ended, within the grace period or at its end."""
        await self._engine.drain(GRACE_PERIOD_S)

    async def measure(self) -> tuple[str, list[Metric]]:
        """A name of this ingress, and its metrics."""
        return self._name, list(self._metrics.registry.collect())


def _all_ingresses() -> DeploymentHandle:
    here = serve.get_replica_context()
    return serve.get_deployment_handle(here.deployment, here.app_name)


class BehindProxy:
    """Two things that Ray Serve's proxy does otherwise than a server. It adds the header x-request-id to responses
    itself, and clients would find it twice. And where it is told no more of a client that has left, `receive` raises.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive_or_disconnect, send_without_id)
