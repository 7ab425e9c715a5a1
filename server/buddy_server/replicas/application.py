"""The Ray Serve application: one ingress, replicas of the engine."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from buddy_server.config import ServerConfig, load_config
from buddy_server.engine.settings import EnginePlan
from buddy_server.replicas.engine_replica import EngineReplica
from buddy_server.replicas.ingress import Ingress
from buddy_server.replicas.router import PlacementRouter
from buddy_server.serve import GRACE_PERIOD_S, LAST_WORDS_S, ServeOptions, check_exposure

MOST_REQUESTS = 65536
"""How many requests Ray Serve lets a process have at once: the ingress itself decides how many there are."""
DRAIN_LOOK_S = 0.5


class Arguments(BaseModel):
    """What `serve run` and a Serve config file may set; each as the flag of `buddy serve`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    router: str | None = None
    chat_template: Path | None = None
    config: Path | None = None
    device: str = "auto"
    dtype: str = "auto"


def build(arguments: Arguments) -> Application:
    """The target of `serve run` and of a Serve config file, which also says how many replicas there are and what each
    gets. Raises ConfigError, also for a configuration that lets anyone use the server."""
    options = ServeOptions(**arguments.model_dump(), host="0.0.0.0")  # noqa: S104, Ray's proxies may listen anywhere
    config = load_config(options.config)
    check_exposure(config, options.host)
    return application(options, config)


def application(
    options: ServeOptions, config: ServerConfig, num_replicas: int = 1, num_cpus: int = 1, num_gpus: int = 0
) -> Application:
    """With `num_replicas` of the engine, each of which gets `num_cpus` and `num_gpus`."""
    plan = EnginePlan(options.model, options.router, config.engine, options.device, options.dtype)
    engines = serve.deployment(EngineReplica).options(
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=PlacementRouter),
        **_limits(),
    )
    ingress = serve.deployment(Ingress).options(num_replicas=1, ray_actor_options={"num_cpus": 0}, **_limits())
    return ingress.bind(options, engines.bind(plan))


def _limits() -> dict[str, float]:
    return {
        "max_ongoing_requests": MOST_REQUESTS,
        "graceful_shutdown_timeout_s": GRACE_PERIOD_S + LAST_WORDS_S,
        "graceful_shutdown_wait_loop_s": DRAIN_LOOK_S,
    }
