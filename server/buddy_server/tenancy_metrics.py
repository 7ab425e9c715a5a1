"""The Prometheus metrics of tenancy: the labels of tenants, limits, quotas, the ledger and the stores behind them."""

from collections.abc import Iterable
from functools import cached_property
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from buddy_server.tenancy.limits.limiter import LimitName
from buddy_server.tenancy.policy import Tenant

MAX_TENANT_LABELS = 200
OTHER = "other"

_WRITE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class TenancyMetrics:
    """The part of `Metrics` that knows tenants and tiers. `_labels` are the labels (tenant, tier) by tenant's name."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self.registry = CollectorRegistry()
        self._labels: dict[str, tuple[str, str]] = {}
        self._labelled: set[str] = set()
        self._with_quota: set[str] = set()
        self._budget_limits: dict[str, float] = {}
        self._declare_limits()
        self._declare_ledger()
        self._reloads = Counter(
            "buddy_config_reloads",
            "Reads of the configuration file after the start; one that is refused changes nothing.",
            ("result",),
            registry=self.registry,
        )
        for result in ("applied", "refused"):
            self._reloads.labels(result)
        self.follow(tenants)

    def _declare_limits(self) -> None:
        self._rate_limited = Counter(
            "buddy_rate_limited",
            "Requests refused by a limit of the tier.",
            ("tenant", "limit"),
            registry=self.registry,
        )
        self._quota_used = Gauge(
            "buddy_quota_used_ratio",
            "Layer-tokens that the month has used and reserved, over the tenant's quota.",
            ("tenant",),
            registry=self.registry,
        )
        self._budget_limit = Gauge(
            "buddy_budget_limit_ratio",
            "The largest budget that an elastic tier gets under the present load; 1 when budgets are not lowered.",
            ("tier",),
            registry=self.registry,
        )
        self._budget_limit_changes = Counter(
            "buddy_budget_limit_changes",
            "Steps in which that budget was lowered and restored.",
            ("tier", "direction"),
            registry=self.registry,
        )

    def _declare_ledger(self) -> None:
        self._ledger_rows = Counter(
            "buddy_ledger_rows",
            "Rows added to the ledger: written by this process, or recovered from one that had died.",
            ("result",),
            registry=self.registry,
        )
        for result in ("written", "recovered"):
            self._ledger_rows.labels(result)
        self._ledger_pending = Gauge(
            "buddy_ledger_rows_pending", "Ended requests whose row is not in the store yet.", registry=self.registry
        )
        self._ledger_write = Histogram(
            "buddy_ledger_write_seconds",
            "One transaction that adds rows to the ledger.",
            buckets=_WRITE_S,
            registry=self.registry,
        )

    @cached_property
    def _store_up(self) -> Gauge:
        return Gauge("buddy_store_up", "1 when the store of tenants and the ledger answers.", registry=self.registry)

    @cached_property
    def _limits_up(self) -> Gauge:
        return Gauge("buddy_limits_up", "1 when the shared store of limits answers.", registry=self.registry)

    def follow(self, tenants: Iterable[Tenant]) -> None:
        """Label the tenants that there are now. A name once used as a label stays that tenant's, also when it leaves,
        so that there are never more than MAX_TENANT_LABELS."""
        present = tuple(tenants)
        for tenant in present:
            if len(self._labelled) < MAX_TENANT_LABELS:
                self._labelled.add(tenant.name)
        # Replaced whole: the engine's thread reads it meanwhile.
        self._labels = self._labels | {
            tenant.name: (tenant.name if tenant.name in self._labelled else OTHER, tenant.tier.name)
            for tenant in present
        }
        self._show_limits(present)
        self._show_budget_limits({tenant.tier.name for tenant in present if tenant.tier.elastic_floor is not None})

    def _show_limits(self, tenants: tuple[Tenant, ...]) -> None:
        for tenant in tenants:
            for limit in get_args(LimitName):
                if getattr(tenant.tier, limit) is not None:
                    # A rate needs the zero before the first refusal.
                    self._rate_limited.labels(self._labels[tenant.name][0], limit)
        with_quota = {tenant.name for tenant in tenants if tenant.tier.layer_tokens_per_month is not None}
        for name in self._with_quota - with_quota:
            self._quota_used.remove(name)
        self._with_quota &= with_quota

    def _show_budget_limits(self, elastic_tiers: set[str]) -> None:
        for tier in self._budget_limits.keys() - elastic_tiers:
            self._budget_limit.remove(tier)
        self._budget_limits = {tier: self._budget_limits.get(tier, 1.0) for tier in elastic_tiers}
        for tier, ratio in self._budget_limits.items():
            self._budget_limit.labels(tier).set(ratio)
            for direction in ("lowered", "restored"):
                self._budget_limit_changes.labels(tier, direction)

    def labels_of(self, tenant: str) -> tuple[str, str]:
        """The labels (tenant, tier) of the tenant with this name."""
        return self._labels.get(tenant, (OTHER, OTHER))

    def limited(self, tenant: Tenant, limit: LimitName) -> None:
        """Count a request refused by `limit`."""
        label, _ = self.labels_of(tenant.name)
        self._rate_limited.labels(label, limit).inc()

    def quota(self, tenant: Tenant, ratio: float) -> None:
        """Show how much of its monthly quota a tenant has used. Tenants without a label of their own are not shown."""
        if tenant.name in self._labelled:
            self._with_quota.add(tenant.name)
            self._quota_used.labels(tenant.name).set(ratio)

    def depth_limit(self, tier: str, ratio: float) -> None:
        """Show the largest budget that the elastic `tier` gets now, 1 for no limit, and count the change if it is
        one."""
        previous = self._budget_limits.get(tier, 1.0)
        if ratio != previous:
            self._budget_limit_changes.labels(tier, "lowered" if ratio < previous else "restored").inc()
        self._budget_limits[tier] = ratio
        self._budget_limit.labels(tier).set(ratio)

    def reloaded(self, applied: bool) -> None:
        """Count a reload of the configuration file."""
        self._reloads.labels("applied" if applied else "refused").inc()

    def ledger_written(self, num_rows: int, seconds: float) -> None:
        """Record a transaction that added `num_rows` rows of this process."""
        self._ledger_rows.labels("written").inc(num_rows)
        self._ledger_write.observe(seconds)

    def ledger_recovered(self, num_rows: int) -> None:
        """Count rows that a process had left behind and this one has added."""
        self._ledger_rows.labels("recovered").inc(num_rows)

    def ledger_pending(self, num_rows: int) -> None:
        """Show how many ended requests have no row in the store yet."""
        self._ledger_pending.set(num_rows)

    def store_up(self, is_up: bool) -> None:
        """Show whether the store answers. Without a store it is never called, and the metric is absent."""
        self._store_up.set(is_up)

    def limits_up(self, is_up: bool) -> None:
        """Show whether the shared store of limits answers. With limits in memory it is never called."""
        self._limits_up.set(is_up)
