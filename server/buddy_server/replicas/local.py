"""`buddy serve --replicas`: Ray and Ray Serve on this machine, from start to shutdown."""

import logging
import os
import signal
import threading

# Before Ray is imported. Nothing about this server goes to anyone else, and its log has every line of every process.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Ray gives its workers the last place behind everything else on the machine.
os.environ.setdefault("RAY_worker_niceness", "0")
# A replica that hangs has nothing to finish.
os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from buddy_server.config import load_config
from buddy_server.errors import EngineStartError
from buddy_server.logs import configure_logs
from buddy_server.replicas.application import application
from buddy_server.replicas.ingress import ListeningIngress
from buddy_server.serve import GRACE_PERIOD_S, LAST_WORDS_S, ServeOptions, bind, check_exposure

# After Ray is imported: for its processes, not for this one, which has no event loop. By gRPC, and in one event loop of
# each process, a piece of an answer takes half the CPU time. Nothing here needs to be decided ten times a second.
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "1000")

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Only pieces of answers go through it."""
NAME = "buddy"


def serve_replicas(options: ServeOptions, fewest: int, most: int) -> None:
    """Serve until SIGINT or SIGTERM, with `fewest` to `most` engines by load. Raises one of serve.START_ERRORS."""
    configure_logs()
    config = load_config(options.config)
    check_exposure(config, options.host)
    # Ray's own message would not name the address.
    bind(options.host, options.port).close()
    cores = os.cpu_count() or 1
    ray.init(
        "local",
        num_cpus=max(cores, most),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        configure_logging=False,
        logging_level="WARNING",
    )
    # Ray has handlers of its own until now. Requests come in as soon as the first replica is ready.
    stopped = _stop_signal()
    try:
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        # It would name an address at which nothing listens.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        num_gpus = 1 if options.device != "cpu" and ray.cluster_resources().get("GPU") else 0
        target = application(options, config, fewest, most, max(1, cores // most), num_gpus, kind=ListeningIngress)
        try:
            serve.run(target, name=NAME, logging_config=quiet)
        except RuntimeError as error:
            raise EngineStartError(_reason() or str(error)) from error
        stopped.wait()
        _drain()
    finally:
        serve.shutdown()
        ray.shutdown()


def _stop_signal() -> threading.Event:
    """Set by SIGINT or SIGTERM. A second one does not wait for what the first one began."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped


def _drain() -> None:
    try:
        serve.get_app_handle(NAME).drain.remote().result(timeout_s=GRACE_PERIOD_S + 2 * LAST_WORDS_S)
    except TimeoutError:
        log.error("requests under way are given up")
        return
    # The last answers reach their clients, and what was used is settled.
    serve.delete(NAME)


def _reason() -> str | None:
    """The last error that kept the application from starting: Ray Serve only has the text of its traceback."""
    deployments = serve.status().applications[NAME].deployments.values()
    lines = [line for deployment in deployments for line in deployment.message.splitlines()]
    errors = [line.partition("Error: ")[2] for line in lines if "Error: " in line]
    return errors[-1] if errors else None
