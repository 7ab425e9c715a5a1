"""The Ray Serve application: ingresses, and replicas of the engine."""

from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, PositiveInt
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from buddy_server.config import ServerConfig, load_config
from buddy_server.engine.settings import EnginePlan
from buddy_server.errors import ConfigError
from buddy_server.replicas.engine_replica import EngineReplica
from buddy_server.replicas.ingress import Ingress, ListeningIngress
from buddy_server.replicas.router import PlacementRouter
from buddy_server.replicas.scaling import Scaling
from buddy_server.replicas.wire import VERSION
from buddy_server.serve import ServeOptions, check_exposure

MOST_REQUESTS = 65536
"""How many requests Ray Serve lets a process have at once: the ingress itself decides how many there are."""
DRAIN_LOOK_S = 0.5
DRAIN_TIMEOUT_S = 3600.0
"""How long answers may go on in a replica that an update or less load ends."""
SURGE_PERCENT = 20
"""How many more replicas there may be during an update, at least one: new ones start before old ones end."""
REPORT_EVERY_S, LOOK_BACK_S = 2.0, 10.0
MORE_AFTER_S, FEWER_AFTER_S = 10.0, 60.0
"""For how long scaling.py must want another number of replicas."""


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
    fewest: int = 1,
    most: int = 1,
    num_cpus: int = 1,
    num_gpus: int = 0,
    num_ingresses: int = 1,
    kind: type[Ingress] | type[ListeningIngress] = Ingress,
) -> Application:
    """With `fewest` to `most` replicas of the engine, by load, and ingresses of a `kind`. Each replica gets `num_cpus`
    and `num_gpus`."""
    # Of each application that is made, so that nothing goes from one to another during an update.
    version = uuid4().hex
    plan = EnginePlan(options.model, options.router, config.engine, options.device, options.dtype)
    engines = serve.deployment(EngineReplica).options(
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=PlacementRouter, request_router_kwargs={VERSION: version}
        ),
        max_surge_percent=SURGE_PERCENT,
        **({"num_replicas": most} if fewest == most else {"autoscaling_config": scaled(fewest, most)}),
        **_limits(),
    )
    ingress = serve.deployment(kind).options(
        num_replicas=num_ingresses, ray_actor_options={"num_cpus": 0}, max_surge_percent=100, **_limits()
    )
    return ingress.bind(options, version, engines.bind(plan, version, options.config))


def scaled(fewest: int, most: int) -> AutoscalingConfig:
    """As in deploy/ray/serve.yaml."""
    return AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        metrics_interval_s=REPORT_EVERY_S,
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=MORE_AFTER_S,
        downscale_delay_s=FEWER_AFTER_S,
        policy=AutoscalingPolicy(policy_function=Scaling),
    )


def _check_ingresses(config: ServerConfig, num_ingresses: int) -> None:
    """Raises ConfigError if so many would not agree on what tenants have left."""
    if num_ingresses > 1 and not config.limits.is_shared:
        raise ConfigError("limits.url: several ingresses need limits in Redis; allowed is redis://..., not memory://")
    if num_ingresses > 1 and config.store is not None and config.store.url.startswith("sqlite"):
        raise ConfigError("store.url: several ingresses need a store in PostgreSQL; allowed is postgresql://...")


def _limits() -> dict[str, float]:
    return {
        "max_ongoing_requests": MOST_REQUESTS,
        "graceful_shutdown_timeout_s": DRAIN_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": DRAIN_LOOK_S,
    }
