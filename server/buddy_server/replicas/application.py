"""The Ray Serve application: ingresses, and replicas of the engine."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from buddy_server.config import ServerConfig, load_config
from buddy_server.engine.settings import EnginePlan
from buddy_server.errors import ConfigError
from buddy_server.replicas.engine_replica import EngineReplica
from buddy_server.replicas.ingress import Ingress
from buddy_server.replicas.router import PlacementRouter
from buddy_server.serve import GRACE_PERIOD_S, LAST_WORDS_S, ServeOptions, check_exposure

MOST_REQUESTS = 65536
"""How many requests Ray Serve lets a process have at once: the ingress itself decides how many there are."""
DRAIN_LOOK_S = 0.5


class Arguments(BaseModel):
    """What `serve run` and a Serve config file may set; each as the flag of `buddy serve`. How many replicas of the
    engine there are is a setting of Ray Serve's."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    router: str | None = None
    chat_template: Path | None = None
    config: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    ingresses: PositiveInt = 1


def build(arguments: Arguments) -> Application:
    """The target of `serve run` and of a Serve config file, which also says how many replicas there are and what each
    gets. Raises ConfigError, also for a configuration that lets anyone use the server."""
    flags = arguments.model_dump(exclude={"ingresses"})
    options = ServeOptions(**flags, host="0.0.0.0")  # noqa: S104, Ray's proxies may listen anywhere
    config = load_config(options.config)
    check_exposure(config, options.host)
    _check_ingresses(config, arguments.ingresses)
    return application(options, config, num_ingresses=arguments.ingresses)


def application(
    options: ServeOptions,
    config: ServerConfig,
    num_replicas: int = 1,
    num_cpus: int = 1,
    num_gpus: int = 0,
    num_ingresses: int = 1,
) -> Application:
    """With `num_replicas` of the engine, each of which gets `num_cpus` and `num_gpus`."""
    plan = EnginePlan(options.model, options.router, config.engine, options.device, options.dtype)
    engines = serve.deployment(EngineReplica).options(
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=PlacementRouter),
        **_limits(),
    )
    ingress = serve.deployment(Ingress).options(
        num_replicas=num_ingresses, ray_actor_options={"num_cpus": 0}, **_limits()
    )
    return ingress.bind(options, engines.bind(plan, options.config))


def _check_ingresses(config: ServerConfig, num_ingresses: int) -> None:
    """Raises ConfigError if so many would not agree on what tenants have left."""
    if num_ingresses > 1 and not config.limits.is_shared:
        raise ConfigError("limits.url: several ingresses need limits in Redis; allowed is redis://..., not memory://")
    if num_ingresses > 1 and config.store is not None and config.store.url.startswith("sqlite"):
        raise ConfigError("store.url: several ingresses need a store in PostgreSQL; allowed is postgresql://...")


def _limits() -> dict[str, float]:
    return {
        "max_ongoing_requests": MOST_REQUESTS,
        "graceful_shutdown_timeout_s": GRACE_PERIOD_S + LAST_WORDS_S,
        "graceful_shutdown_wait_loop_s": DRAIN_LOOK_S,
    }
