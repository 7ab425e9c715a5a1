"""All Prometheus metrics of the server; metric names appear only here, in engine_metrics.py and tenancy_metrics.py.

Tenant labels come only from known tenants, at most 200 of them; all others are "other". Two identities hold at any
time:

    completion_tokens_total = inter_token_latency_seconds_count + time_to_first_token_seconds_count
    layers_executed_total + layers_skipped_total = L x tokens routed
"""

import time
from collections.abc import Iterable, Sequence

from prometheus_client import Counter, Gauge, Histogram, generate_latest

from buddy_routing.action_space import MILLI_LAYERS
from buddy_server.engine.messages import Account, EngineClient, EngineInfo
from buddy_server.engine_metrics import EIGHTHS, EngineMetrics
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


class Metrics(TenancyMetrics):
    """The server's metrics in a separate registry. Those of its engine are in `engine`; without `has_engine`, where
    replicas of the engine have their own, it is None. Methods may be called from any thread."""

    def __init__(self, info: EngineInfo, tenants: Iterable[Tenant], *, has_engine: bool = True):
        super().__init__(tenants)
        self._num_layers = info.num_layers
        self._full_cost = info.actions.full_cost
        self._declare_requests()
        self._declare_depth()
        self.engine = EngineMetrics(info, self.registry, self.labels_of) if has_engine else None
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
            buckets=[self._num_layers * share for share in EIGHTHS],
            registry=self.registry,
        )
        self._budget_requested = Histogram(
            "buddy_budget_requested",
            "Budgets of admitted requests that stated a number, before clamping.",
            _TENANT,
            buckets=EIGHTHS,
            registry=self.registry,
        )
        self._budget_granted = Histogram(
            "buddy_budget_granted",
            "Budgets of admitted requests, after clamping.",
            _TENANT,
            buckets=EIGHTHS,
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

    def observe_account(self, account: Account) -> None:
        """Record the usage of a settled request."""
        labels = self.labels_of(account.tenant)
        self._layer_tokens.labels(*labels).inc(account.usage.cost / self._full_cost)

    def request(self, tenant: Tenant) -> "RequestMetrics":
        """Metrics for one request of `tenant`, starting now."""
        return RequestMetrics(self, self._labels.get(tenant.name, (OTHER, tenant.tier.name)))

    async def render(self, engine: EngineClient) -> bytes:
        """The text for a Prometheus scrape."""
        if self.engine is not None:
            self.engine.show(engine)
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
