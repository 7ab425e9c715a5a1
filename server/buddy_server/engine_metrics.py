"""The Prometheus metrics of one engine: what its steps ran, and its state."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from buddy_routing.action_space import MILLI_LAYERS
from buddy_server.engine.messages import EngineClient, EngineInfo, StepStats
from buddy_server.histogram import CountedHistogram

_TENANT = ("tenant", "tier")
_ROUTER_S = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
EIGHTHS = tuple(step / 8 for step in range(1, 9))


class EngineMetrics:
    """Registered in `registry`; `labels_of` gives the labels (tenant, tier) by a tenant's name. Methods may be called
    from any thread."""

    def __init__(
        self, info: EngineInfo, registry: CollectorRegistry, labels_of: Callable[[str], tuple[str, str]]
    ) -> None:
        self._num_layers = info.num_layers
        self._labels_of = labels_of
        self._declare_layers(registry)
        self._declare_steps(registry)
        self._running = Gauge("buddy_num_requests_running", "Sequences being run.", registry=registry)
        self._waiting = Gauge("buddy_num_requests_waiting", "Sequences waiting.", registry=registry)
        self._kv_usage = Gauge("buddy_kv_cache_usage_ratio", "Share of the KV cache in use.", registry=registry)
        self._up = Gauge("buddy_engine_up", "1 when the engine can take work.", registry=registry)
        self._restarts = Counter(
            "buddy_engine_restarts",
            "Processes started for the engine in place of one that had ended.",
            registry=registry,
        )

    def _declare_layers(self, registry: CollectorRegistry) -> None:
        self._executed = Counter("buddy_layers_executed", "Layers run, summed over tokens.", _TENANT, registry=registry)
        self._uncharged = Counter(
            "buddy_layers_uncharged",
            "Of the layers executed, those run again after a preemption or for tokens behind the end of an answer.",
            _TENANT,
            registry=registry,
        )
        self._skipped = Counter(
            "buddy_layers_skipped", "Layers not run, summed over tokens.", _TENANT, registry=registry
        )

    def _declare_steps(self, registry: CollectorRegistry) -> None:
        self._layers_read_ratio = CountedHistogram(
            "buddy_batch_layers_read_ratio",
            "Layers and exits that any row of a step ran, over the layers of the model.",
            buckets=EIGHTHS,
            registry=registry,
        ).labels()
        self._batch_size = CountedHistogram(
            "buddy_batch_size", "Sequences in a step.", buckets=_BATCH_SIZES, registry=registry
        ).labels()
        self._router = CountedHistogram(
            "buddy_router_seconds", "Choosing paths, per step.", buckets=_ROUTER_S, registry=registry
        ).labels()
        self._preemptions = Counter("buddy_preemptions", "Sequences preempted to be recomputed.", registry=registry)

    def observe_step(self, stats: StepStats) -> None:
        """Record the steps of one call to the model; each counts with the average of the call."""
        num_steps = stats.num_steps
        self._layers_read_ratio.observe(stats.num_layers_read / num_steps / self._num_layers, num_steps)
        self._batch_size.observe(stats.num_sequences, num_steps)
        self._router.observe(stats.router_s / num_steps, num_steps)
        self._preemptions.inc(stats.num_preemptions)
        for tenant, depth in stats.depth.items():
            labels = self._labels_of(tenant)
            self._executed.labels(*labels).inc(depth.executed / MILLI_LAYERS)
            self._skipped.labels(*labels).inc(depth.skipped / MILLI_LAYERS)
            self._uncharged.labels(*labels).inc(depth.uncharged / MILLI_LAYERS)

    def count_restart(self) -> None:
        """Count a restart of the engine's process."""
        self._restarts.inc()

    def show(self, engine: EngineClient) -> None:
        """Set the gauges. They are read from the engine when asked for: a stuck or idle engine reports no steps."""
        self._up.set(engine.is_ready)
        self._waiting.set(engine.num_waiting)
        self._running.set(engine.num_running)
        self._kv_usage.set(engine.kv_usage_ratio)
