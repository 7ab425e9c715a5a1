"""The HTTP application as a Ray Serve deployment: the same as in one process, but for where its engine is."""

import asyncio
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
from buddy_server.errors import EngineStartError
from buddy_server.fleet.member import FleetMember
from buddy_server.logs import configure_logs
from buddy_server.replicas.board import shared_board
from buddy_server.replicas.client import EngineReplicas
from buddy_server.replicas.metrics import ReplicatedMetrics
from buddy_server.replicas.wire import decode_ready, member_name
from buddy_server.serve import (
    GRACE_PERIOD_S,
    ServeOptions,
    Server,
    bind,
    http_settings,
    log_start,
    make_app,
    settler,
)
from buddy_server.tenancy.tenancy import Tenancy, prepare_store
from buddy_server.tokenizer import ChatTokenizer, import_transformers_without_torch

START_LOOK_S = 0.05


class HttpProcess:
    """One of the processes that answer clients. What they must agree on is in Redis and PostgreSQL; with limits in
    memory, there is one of them."""

    async def build(
        self, options: ServeOptions, version: str, engines: DeploymentHandle, ingresses: DeploymentHandle | None
    ) -> FastAPI:
        """Waits for the first of `engines`, the replicas of `version` alone (PlacementRouter). `ingresses` are all of
        them, None if this is the only one. Raises ConfigError."""
        config, self._name = load_config(options.config), serve.get_replica_context().replica_id.unique_id
        if config.store is not None:
            await prepare_store(config.store)
        import_transformers_without_torch()
        template = None if options.chat_template is None else read_chat_template(options.chat_template)
        ready = decode_ready(await engines.describe.remote())
        self._metrics = metrics = ReplicatedMetrics(ready.info, config.tenants, ingresses, engines)
        tenancy = Tenancy(config, options.config, ready.info, metrics)
        board = shared_board(config.limits, ready.info)
        member = FleetMember(board, member_name(version, self._name))
        settle, note = settler(metrics, tenancy.bills), tenancy.bills.note
        self.engine = EngineReplicas(engines, version, ready, member, settle, note)
        tokenizer = ChatTokenizer.from_directory(Path(ready.directory), template)
        app = make_app(config, self.engine, tokenizer, metrics, tenancy, member)
        log_start(ready, config, options)
        gc.collect()
        gc.freeze()
        return app

    async def measure(self) -> tuple[str, list[Metric]]:
        """A name of this ingress, and its metrics."""
        return self._name, list(self._metrics.registry.collect())


@serve.ingress()
class Ingress(HttpProcess):
    """Ray Serve's proxies pass requests on to it."""

    def __init__(self, options: ServeOptions, version: str, engines: DeploymentHandle) -> None:
        configure_logs()
        self._options = options
        self._version = version
        self._engines = engines

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve. Raises ConfigError."""
        here = serve.get_replica_context()
        ingresses = serve.get_deployment_handle(here.deployment, here.app_name)
        app = await self.build(self._options, self._version, self._engines, ingresses)
        app.add_middleware(BehindProxy)
        return app

    async def drain(self) -> None:
        """Refuse new requests, and return when those under way have ended, within the grace period or at its end."""
        await self.engine.drain(GRACE_PERIOD_S)


class ListeningIngress(HttpProcess):
    """It listens itself, as a server without replicas does: a hop less for every piece of an answer."""

    async def __init__(  # type: ignore[misc]
        self, options: ServeOptions, version: str, engines: DeploymentHandle
    ) -> None:
        """Returns when it listens. Raises ConfigError and EngineStartError."""
        configure_logs()
        app = await self.build(options, version, engines, ingresses=None)
        listener = bind(options.host, options.port)
        self._server = Server(http_settings(app), self.engine, listener, GRACE_PERIOD_S)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        # Once in the life of the server; not worth a signal.
        while not self._server.started:
            if self._serving.done():
                raise EngineStartError("the HTTP server did not start; its log says why")
            await asyncio.sleep(START_LOOK_S)

    async def check_health(self) -> None:
        """Ray Serve replaces an ingress that raises here."""
        if self._serving.done() and not self._server.should_exit:
            raise RuntimeError("the HTTP server has ended")

    async def drain(self) -> None:
        """As Ingress.drain."""
        self._server.should_exit = True
        await self._serving


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
