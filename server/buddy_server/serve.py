"""`buddy serve`: configuration, engine and HTTP application, from start to shutdown."""

import asyncio
import gc
import ipaddress
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import uvicorn
from fastapi import FastAPI

from buddy_server.api.admin import AdminServices
from buddy_server.api.app import create_app
from buddy_server.api.http_protocol import HttpProtocol
from buddy_server.chat_template import read_chat_template
from buddy_server.config import ServerConfig, load_config
from buddy_server.engine.messages import Account, OwnedEngine
from buddy_server.engine.process import EngineProcess
from buddy_server.engine.settings import EnginePlan
from buddy_server.engine.wire import Ready
from buddy_server.engine.worker_process import WorkerProcess
from buddy_server.errors import ConfigError, EngineStartError
from buddy_server.fleet.build import make_board
from buddy_server.fleet.member import FleetMember
from buddy_server.logs import configure_logs
from buddy_server.metrics import Metrics
from buddy_server.tenancy.bills import Bills
from buddy_server.tenancy.elastic import ElasticBudgets
from buddy_server.tenancy.keys import secret_from_environment
from buddy_server.tenancy.tenancy import Tenancy, persistent, prepare_store
from buddy_server.tokenizer import ChatTokenizer, import_transformers_without_torch

log = logging.getLogger(__name__)

GRACE_PERIOD_S = 10
"""How long requests may continue after SIGTERM."""
LAST_WORDS_S = 3
"""How long delivering their last events to the clients may then take."""
KEEP_ALIVE_S = 75
BACKLOG = 4096
START_ERRORS = (ConfigError, EngineStartError, OSError)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The flags of `buddy serve`."""

    model: str | None = None
    router: str | None = None
    chat_template: Path | None = None
    config: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"


class Server(uvicorn.Server):
    """uvicorn's server, which has the engine end open requests when the grace period is over. Clients then get an error
    in the API's format, where uvicorn would cut them off."""

    def __init__(
        self, config: uvicorn.Config, engine: OwnedEngine, listener: socket.socket, grace_period_s: float
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._listener = listener
        self._grace_period_s = grace_period_s

    def serve_forever(self) -> None:
        """Serve until SIGINT or SIGTERM."""
        # Existing objects stay: a full garbage collection would now and then hold up every stream for 30 ms.
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
    """Load and check everything, and bind the address. Raises one of START_ERRORS."""
    configure_logs()
    config = load_config(options.config)
    check_exposure(config, options.host)
    template = None
    if options.chat_template is not None:
        import_transformers_without_torch()
        template = read_chat_template(options.chat_template)
    listener = bind(options.host, options.port)
    plan = EnginePlan(options.model, options.router, config.engine, options.device, options.dtype)
    worker = WorkerProcess(plan)
    try:
        # Both run while the child loads the model.
        if config.store is not None:
            asyncio.run(prepare_store(config.store))
        import_transformers_without_torch()
        ready = worker.wait_until_ready()
        metrics = Metrics(ready.info, config.tenants)
        assert metrics.engine is not None
        tenancy = Tenancy(config, options.config, ready.info, metrics)
        engine = EngineProcess(
            plan,
            worker,
            ready,
            on_step=metrics.engine.observe_step,
            on_restart=metrics.engine.count_restart,
            settle=settler(metrics, tenancy.bills),
            note=tenancy.bills.note,
        )
        board = make_board(config.limits, ready.info)
        member = FleetMember(board, secrets.token_hex(8), engine)
        tokenizer = ChatTokenizer.from_directory(Path(ready.directory), template)
        app = make_app(config, engine, tokenizer, metrics, tenancy, member)
    except BaseException:
        worker.close()
        raise
    log_start(ready, config, options)
    return Server(http_settings(app), engine, listener, GRACE_PERIOD_S)


def http_settings(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        log_config=None,
        access_log=False,
        ws="none",
        # Longer than clients and load balancers keep an idle connection, so that they close it. If we did, it could be
        # at the moment they send the next request on it.
        timeout_keep_alive=KEEP_ALIVE_S,
        # A burst of clients should get an answer, even if a 503; when the kernel's queue is full, it resets them.
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_PERIOD_S + LAST_WORDS_S,
    )


def settler(metrics: Metrics, bills: Bills) -> Callable[[Account], None]:
    """Returns the function that receives the account of every request, however it ended."""

    def settle(account: Account) -> None:
        metrics.observe_account(account)
        bills.account(account)
        usage = account.usage
        log.info(
            "request settled",
            extra={
                "request_id": account.request_id,
                "tenant": account.tenant,
                "reason": account.reason,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "milli_layers": usage.cost,
            },
        )

    return settle


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before time is spent on loading a model. Raises ConfigError if the address is not available.

    It does not listen yet: until the model is loaded, clients are refused at once instead of left waiting.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def check_exposure(config: ServerConfig, host: str) -> None:
    """Raises ConfigError if anyone on a network could use the server without a key, and the config does not allow
    it."""
    if config.is_open and not config.allow_open and not _is_loopback(host):
        raise ConfigError(
            f"host {host!r} is reachable from other machines and no tenant has a key; allowed: 127.0.0.1, "
            "a --config with tenants, or allow_open: true in it"
        )


def make_app(
    config: ServerConfig,
    engine: OwnedEngine,
    tokenizer: ChatTokenizer,
    metrics: Metrics,
    tenancy: Tenancy,
    member: FleetMember,
) -> FastAPI:
    """The application, which starts engine and tenancy at its start and stops them at its end. In between, it is a
    `member` of its fleet."""
    elastic = ElasticBudgets(member, engine.info, metrics, tenancy.book)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with tenancy.running():
            engine.start()
            await member.exchange()
            loops = [asyncio.create_task(persistent(run)) for run in (member.run, elastic.run)]
            yield
            for loop in loops:
                loop.cancel()
            await member.leave()
            await anyio.to_thread.run_sync(engine.stop)

    app = create_app(config, engine, tokenizer, metrics, tenancy, admin_services(tenancy))
    app.router.lifespan_context = lifespan
    return app


def admin_services(tenancy: Tenancy) -> AdminServices | None:
    """What the admin API needs; None without a store or an admin key. Raises ConfigError for a key file that cannot be
    read."""
    administration, key = tenancy.administration(), secret_from_environment("BUDDY_ADMIN_KEY")
    if tenancy.store is None or administration is None or key is None:
        if tenancy.store is not None or key is not None:
            missing = "BUDDY_ADMIN_KEY" if key is None else "a store in the configuration"
            log.warning("admin API off", extra={"missing": missing})
        return None
    return AdminServices(key, administration, tenancy.store.ledger, tenancy.store.rows)


def log_start(ready: Ready, config: ServerConfig, options: ServeOptions) -> None:
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
            "predictor": "yes" if info.has_predictor else "none (auto is the tier's largest budget)",
            "address": f"http://{options.host}:{options.port}",
        },
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
