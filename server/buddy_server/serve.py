"""`buddy serve`: configuration, engine, HTTP application, and their beginning and end."""

import ipaddress
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from buddy_server.api.app import create_app
from buddy_server.config import ServerConfig, load_config
from buddy_server.engine.build import build_engine
from buddy_server.engine.service import EngineService
from buddy_server.errors import ConfigError
from buddy_server.logs import configure_logs
from buddy_server.metrics import Metrics
from buddy_server.tokenizer import ChatTokenizer

log = logging.getLogger(__name__)

GRACE_PERIOD_S = 10


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


def serve(options: ServeOptions) -> None:
    """Run until SIGINT or SIGTERM. Raises ConfigError, ValueError or OSError for what cannot be started."""
    configure_logs()
    started = time.monotonic()
    config = load_config(options.config)
    check_exposure(config, options.host)
    app = make_app(options, config)
    url = f"http://{options.host}:{options.port}"
    log.info("starting", extra={"address": url, "after_s": round(time.monotonic() - started, 1)})
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_PERIOD_S,
    )


def check_exposure(config: ServerConfig, host: str) -> None:
    """Raises ConfigError when anyone on a network could use the server without a key, and nobody said so."""
    if config.is_open and not config.allow_open and not _is_loopback(host):
        raise ConfigError(
            f"host {host!r} is reachable from other machines and no tenant has a key; allowed: 127.0.0.1, "
            "a --config with tenants, or allow_open: true in it"
        )


def make_app(options: ServeOptions, config: ServerConfig) -> FastAPI:
    """The application with a running engine behind it, from the application's start to its end."""
    built = build_engine(options.model, options.router, config.engine, options.device, options.dtype)
    metrics = Metrics(built.info, config.tenants)
    engine = EngineService(built.engine, built.info, metrics.observe_step)
    app = create_app(config, engine, ChatTokenizer.from_directory(built.directory), metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app.router.lifespan_context = lifespan
    info = built.info
    log.info(
        "model ready",
        extra={
            "model": info.model_id,
            "layers": info.num_layers,
            "context": info.max_context,
            "router": info.router_id,
            "device": info.device,
            "dtype": info.dtype,
            "kv_tokens": info.kv_capacity_tokens,
            "tenants": len(config.tenants),
            "predictor": "none (auto is the tier's largest budget)",
        },
    )
    return app


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
