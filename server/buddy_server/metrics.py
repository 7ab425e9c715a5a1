"""All Prometheus metrics of the server; metric names appear only here and in tenancy_metrics.py.

Tenant labels come only from known tenants, at most 200 of them; all others are "other". Two identities hold at any
time:

    completion_tokens_total = inter_token_latency_seconds_count + time_to_first_token_seconds_count
    layers_executed_total + layers_skipped_total = L x tokens routed
"""

import time
from collections.abc import Iterable, Sequence

from prometheus_client import Counter, Gauge, Histogram, generate_latest

from buddy_routing.action_space import MILLI_LAYERS
from buddy_server.engine.messages import Account, EngineClient, EngineInfo, StepStats
from buddy_server.errors import Outcome
from buddy_server.histogram import CountedHistogram
from buddy_server.tenancy.depth import DepthDecision
from buddy_server.tenancy.policy import Tenant
from buddy_server.tenancy_metrics import OTHER, TenancyMetrics
from buddy_server.version import server_version

_TENANT = ("tenant", "tier")

# vLLM's buckets where the meaning is the same, so that queries carry over; inter-token latency starts lower here.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_INTER_TOKEN_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_ROUTER_S = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
_EIGHTHS = tuple(step / 8 for step in range(1, 9))
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics(TenancyMetrics):
    """The server's metrics in a separate registry. Methods may be called from any thread."""

    def __init__(self, info: EngineInfo, tenants: Iterable[Tenant]):
        super().__init__(tenants)
        self._num_layers = info.num_layers
        self._full_cost = info.actions.full_cost
        self._step_s = (0.0, 0)
        self._declare_requests()
        self._declare_depth()
        self._declare_engine()
        build = Gauge(
            "buddy_build_info",
            "1, with what runs as labels.",
            ("version", "model", "router", "device", "dtype", "arithmetic"),
            registry=self.registry,
        )
        build.labels(server_version(), info.model_id, info.router_id, info.device, info.dtype, info.arithmetic).set(1)

    def _declare_requests(self) -> None:
        self._requests = Counter(
            "buddy_requests", "Requests ended, once each.", (*_TENANT, "outcome"), registry=self.registry
        )
        self._first_token = Histogram(
            "buddy_time_to_first_token_seconds",
            "From the arrival of a request to the first token, for each of its choices.",
            _TENANT,
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._inter_token = CountedHistogram(
            "buddy_inter_token_latency_seconds",
            "Between two tokens of a choice; tokens that come together share the time since those before them.",
            _TENANT,
            buckets=_INTER_TOKEN_S,
            registry=self.registry,
        )
        self._queue_time = Histogram(
            "buddy_queue_time_seconds",
            "From the arrival of a choice in the engine to when it runs for the first time.",
            _TENANT,
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self._duration = Histogram(
            "buddy_request_duration_seconds",
            "From the arrival of a request to its end, whatever the outcome.",
            _TENANT,
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self._prompt_tokens = Counter(
            "buddy_prompt_tokens",
            "Prompt tokens of requests that produced a token.",
            _TENANT,
            registry=self.registry,
        )
        self._prefix_cache_hits = Counter(
            "buddy_prefix_cache_hits",
            "Prompt tokens of finished requests that were found in the prefix cache and not computed.",
            _TENANT,
            registry=self.registry,
        )
        self._completion_tokens = Counter(
            "buddy_completion_tokens",
            "Tokens generated that reached the request; those generated after its client had left are not counted.",
            _TENANT,
            registry=self.registry,
        )

    def _declare_depth(self) -> None:
        self._layers_executed = Counter(
            "buddy_layers_executed", "Layers run, summed over tokens.", _TENANT, registry=self.registry
        )
        self._layers_uncharged = Counter(
            "buddy_layers_uncharged",
            "Of the layers executed, those run again after a preemption or for tokens behind the end of an answer.",
            _TENANT,
            registry=self.registry,
        )
        self._layers_skipped = Counter(
            "buddy_layers_skipped", "Layers not run, summed over tokens.", _TENANT, registry=self.registry
        )
        self._layer_tokens = Counter(
            "buddy_layer_tokens",
            "What tenants are charged: tokens run for their requests, at the share of the layers that each ran.",
            _TENANT,
            registry=self.registry,
        )
        self._layers_per_token = CountedHistogram(
            "buddy_layers_per_token",
            "Layers run by a generated token.",
            _TENANT,
            buckets=[self._num_layers * share for share in _EIGHTHS],
            registry=self.registry,
        )
        self._budget_requested = Histogram(
            "buddy_budget_requested",
            "Budgets of admitted requests that stated a number, before clamping.",
            _TENANT,
            buckets=_EIGHTHS,
            registry=self.registry,
        )
        self._budget_granted = Histogram(
            "buddy_budget_granted",
            "Budgets of admitted requests, after clamping.",
            _TENANT,
            buckets=_EIGHTHS,
            registry=self.registry,
        )
        self._budget_clamped = Counter(
            "buddy_budget_clamped",
            "Requested budgets changed by a bound of the tier.",
            ("reason",),
            registry=self.registry,
        )
        for reason in ("tier_min", "tier_max"):
            self._budget_clamped.labels(reason)

    def _declare_engine(self) -> None:
        self._layers_read_ratio = CountedHistogram(
            "buddy_batch_layers_read_ratio",
            "Layers and exits that any row of a step ran, over the layers of the model.",
            buckets=_EIGHTHS,
            registry=self.registry,
        ).labels()
        self._batch_size = CountedHistogram(
            "buddy_batch_size", "Sequences in a step.", buckets=_BATCH_SIZES, registry=self.registry
        ).labels()
        self._router = CountedHistogram(
            "buddy_router_seconds", "Choosing paths, per step.", buckets=_ROUTER_S, registry=self.registry
        ).labels()
        self._running = Gauge("buddy_num_requests_running", "Sequences being run.", registry=self.registry)
        self._waiting = Gauge("buddy_num_requests_waiting", "Sequences waiting.", registry=self.registry)
        self._kv_usage = Gauge("buddy_kv_cache_usage_ratio", "Share of the KV cache in use.", registry=self.registry)
        self._preemptions = Counter(
            "buddy_preemptions", "Sequences preempted to be recomputed.", registry=self.registry
        )
        self._engine_up = Gauge("buddy_engine_up", "1 when the engine can take work.", registry=self.registry)
        self._engine_restarts = Counter(
            "buddy_engine_restarts",
            "Processes started for the engine in place of one that had ended.",
            registry=self.registry,
        )

    def take_inter_token_s(self) -> float:
        """The mean time of a step since the last call, each counted with the sequences that waited for it: what the
        engine makes of the time between two tokens, whatever clients do. 0.0 if there was no step."""
        seconds, num_steps = self._step_s
        self._step_s = (0.0, 0)
        return seconds / num_steps if num_steps else 0.0

    def observe_step(self, stats: StepStats) -> None:
        """Record the steps of one call to the model; each counts with the average of the call."""
        num_steps = stats.num_steps
        seconds, num_before = self._step_s
        self._step_s = (seconds + stats.seconds * stats.num_sequences, num_before + num_steps * stats.num_sequences)
        self._layers_read_ratio.observe(stats.num_layers_read / num_steps / self._num_layers, num_steps)
        self._batch_size.observe(stats.num_sequences, num_steps)
        self._router.observe(stats.router_s / num_steps, num_steps)
        self._preemptions.inc(stats.num_preemptions)
        for tenant, depth in stats.depth.items():
            labels = self._labels.get(tenant, (OTHER, OTHER))
            self._layers_executed.labels(*labels).inc(depth.executed / MILLI_LAYERS)
            self._layers_skipped.labels(*labels).inc(depth.skipped / MILLI_LAYERS)
            self._layers_uncharged.labels(*labels).inc(depth.uncharged / MILLI_LAYERS)

    def observe_account(self, account: Account) -> None:
        """Record the usage of a settled request."""
        labels = self._labels.get(account.tenant, (OTHER, OTHER))
        self._layer_tokens.labels(*labels).inc(account.usage.cost / self._full_cost)

    def count_restart(self) -> None:
        """Count a restart of the engine's process."""
        self._engine_restarts.inc()

    def request(self, tenant: Tenant) -> "RequestMetrics":
        """Metrics for one request of `tenant`, starting now."""
        return RequestMetrics(self, self._labels.get(tenant.name, (OTHER, tenant.tier.name)))

    def render(self, engine: EngineClient) -> bytes:
        """The text for a Prometheus scrape. Gauges are read from the engine now: a stuck or idle engine reports no
        steps."""
        self._engine_up.set(engine.is_ready)
        self._waiting.set(engine.num_waiting)
        self._running.set(engine.num_running)
        self._kv_usage.set(engine.kv_usage_ratio)
        return generate_latest(self.registry)


class RequestMetrics:
    """Measures one request, which counts as ended exactly once (tenancy/request_life.py)."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str]):
        self._metrics = metrics
        self._labels = labels
        self._started = time.perf_counter()
        self._last_token: dict[int, float] = {}
        self._num_prompt_tokens = 0
        self._finished = False
        self._first_token = metrics._first_token.labels(*labels)
        self._inter_token = metrics._inter_token.labels(*labels)
        self._completion_tokens = metrics._completion_tokens.labels(*labels)
        self._layers_per_token = metrics._layers_per_token.labels(*labels)

    def admitted(self, num_prompt_tokens: int, depth: DepthDecision) -> None:
        """Record that the request goes to the engine, and its depth unless the Budget Predictor will choose it."""
        self._num_prompt_tokens = num_prompt_tokens
        if isinstance(depth.requested, float):
            self._metrics._budget_requested.labels(*self._labels).observe(depth.requested)
        if depth.min_cost is None:
            self.granted(depth.granted)
        if depth.clamped is not None:
            self._metrics._budget_clamped.labels(depth.clamped).inc()

    def granted(self, budget: float) -> None:
        """Record the final budget of the request."""
        self._metrics._budget_granted.labels(*self._labels).observe(budget)

    def queued(self, queue_s: float) -> None:
        """Record how long one choice waited in the engine before it ran for the first time."""
        self._metrics._queue_time.labels(*self._labels).observe(queue_s)

    def tokens(self, costs: Sequence[int], choice: int = 0) -> None:
        """Record tokens of `choice` that arrived together, with the milli-layers that each ran; may be empty. They
        share the time since the previous tokens."""
        if not costs:
            return
        now = time.perf_counter()
        if not self._last_token:
            self._metrics._prompt_tokens.labels(*self._labels).inc(self._num_prompt_tokens)
        num_later = len(costs)
        if choice not in self._last_token:
            self._first_token.observe(now - self._started)
            self._last_token[choice] = now
            num_later -= 1
        if num_later:
            self._inter_token.observe((now - self._last_token[choice]) / num_later, num_later)
        self._last_token[choice] = now
        self._completion_tokens.inc(len(costs))
        for cost in set(costs):
            self._layers_per_token.observe(cost / MILLI_LAYERS, costs.count(cost))

    def cached(self, num_prompt_tokens: int) -> None:
        """Record how many prompt tokens came from the prefix cache."""
        self._metrics._prefix_cache_hits.labels(*self._labels).inc(num_prompt_tokens)

    def finish(self, outcome: Outcome) -> None:
        """Record the end of the request. Only the first call counts."""
        if self._finished:
            return
        self._finished = True
        self._metrics._requests.labels(*self._labels, outcome).inc()
        self._metrics._duration.labels(*self._labels).observe(time.perf_counter() - self._started)
