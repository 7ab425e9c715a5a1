"""`buddy serve`: configuration, engine, HTTP application, and their beginning and end."""

import gc
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import uvicorn
from fastapi import FastAPI

from buddy_server.api.app import create_app
from buddy_server.config import ServerConfig, load_config
from buddy_server.engine.messages import OwnedEngine
from buddy_server.engine.process import EngineProcess
from buddy_server.engine.settings import EnginePlan
from buddy_server.engine.wire import Ready
from buddy_server.engine.worker_process import WorkerProcess
from buddy_server.errors import ConfigError, EngineStartError
from buddy_server.logs import configure_logs
from buddy_server.metrics import Metrics
from buddy_server.tokenizer import ChatTokenizer, import_transformers_without_torch

log = logging.getLogger(__name__)

GRACE_PERIOD_S = 10
"""How long requests may go on after SIGTERM."""
LAST_WORDS_S = 3
"""How long their last events may then take to reach the clients."""
START_ERRORS = (ConfigError, EngineStartError, OSError)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The flags of `buddy serve`."""

    model: str | None = None
    router: str | None = None
    config: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"


class Server(uvicorn.Server):
    """uvicorn's server, which asks the engine to end what still runs when the grace period is over: clients then get
    an error in the API's shape, where uvicorn would cut them off."""

    def __init__(
        self, config: uvicorn.Config, engine: OwnedEngine, listener: socket.socket, grace_period_s: float
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._listener = listener
        self._grace_period_s = grace_period_s

    def serve_forever(self) -> None:
        """Until SIGINT or SIGTERM."""
        # What is there now stays. To sweep over all of it would hold up every stream for 30 ms, now and then.
        gc.collect()
        gc.freeze()
        self.run(sockets=[self._listener])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._end_generations)
            await super().shutdown(sockets)
            tasks.cancel_scope.cancel()

    async def _end_generations(self) -> None:
        await anyio.sleep(self._grace_period_s)
        await anyio.to_thread.run_sync(self._engine.stop)


def make_server(options: ServeOptions) -> Server:
    """Everything loaded and checked, the address taken. Raises one of START_ERRORS."""
    configure_logs()
    config = load_config(options.config)
    check_exposure(config, options.host)
    listener = bind(options.host, options.port)
    plan = EnginePlan(options.model, options.router, config.engine, options.device, options.dtype)
    worker = WorkerProcess(plan)
    try:
        # While the child loads the model.
        import_transformers_without_torch()
        ready = worker.wait_until_ready()
        metrics = Metrics(ready.info, config.tenants)
        engine = EngineProcess(plan, worker, ready, metrics.observe_step, metrics.count_restart)
        app = make_app(config, engine, ChatTokenizer.from_directory(Path(ready.directory)), metrics)
    except BaseException:
        worker.close()
        raise
    _log_start(ready, config, options)
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_PERIOD_S + LAST_WORDS_S,
    )
    return Server(settings, engine, listener, GRACE_PERIOD_S)


def bind(host: str, port: int) -> socket.socket:
    """The socket, bound before a model is loaded for nothing. Raises ConfigError when the address cannot be had.

    It does not listen yet: until the model is there, clients are refused at once rather than left waiting.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def check_exposure(config: ServerConfig, host: str) -> None:
    """Raises ConfigError when anyone on a network could use the server without a key, and nobody said so."""
    if config.is_open and not config.allow_open and not _is_loopback(host):
        raise ConfigError(
            f"host {host!r} is reachable from other machines and no tenant has a key; allowed: 127.0.0.1, "
            "a --config with tenants, or allow_open: true in it"
        )


def make_app(config: ServerConfig, engine: OwnedEngine, tokenizer: ChatTokenizer, metrics: Metrics) -> FastAPI:
    """The application, which starts the engine with itself and stops it at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await anyio.to_thread.run_sync(engine.stop)

    app = create_app(config, engine, tokenizer, metrics)
    app.router.lifespan_context = lifespan
    return app


def _log_start(ready: Ready, config: ServerConfig, options: ServeOptions) -> None:
    info = ready.info
    log.info(
        "model ready",
        extra={
            "model": info.model_id,
            "layers": info.num_layers,
            "context": info.max_context,
            "router": info.router_id,
            "device": info.device,
            "dtype": info.dtype,
            "arithmetic": info.arithmetic,
            "kv_tokens": info.kv_capacity_tokens,
            "tenants": len(config.tenants),
            "predictor": "yes" if ready.has_predictor else "none (auto is the tier's largest budget)",
            "address": f"http://{options.host}:{options.port}",
        },
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
