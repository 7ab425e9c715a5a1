"""What is counted, and what must add up."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from buddy_server.config import ServerConfig
from buddy_server.engine.messages import Account, DepthCount, StepStats, Usage
from buddy_server.errors import InvalidBudget
from buddy_server.histogram import CountedHistogram
from buddy_server.metrics import Metrics
from buddy_server.tenancy.capacity import Capacity
from buddy_server.tenancy.depth import decide_depth
from buddy_server.tenancy.limits.limiter import LimitName
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tenancy.request_life import RequestLife
from fakes.engine import INFO, FakeEngine
from fakes.site import Serve, Site
from fakes.tenancy import tenancy_of

LIMITS = get_args(LimitName)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def step(**depth: DepthCount) -> StepStats:
    return StepStats(
        num_steps=1,
        num_rows=9,
        num_sequences=2,
        num_layers_read=6,
        num_preemptions=1,
        router_s=0.0002,
        depth=depth,
    )


def test_completion_tokens_are_first_tokens_and_gaps(serve: Serve) -> None:
    site = serve(FakeEngine(raise_at=4))
    site.chat()
    site.chat(n=3, stream=True)
    site.chat(max_tokens=1)
    site.chat(budget=7)
    completion = site.sample("buddy_completion_tokens_total")
    first = site.sample("buddy_time_to_first_token_seconds_count")
    assert completion == first + site.sample("buddy_inter_token_latency_seconds_count")
    assert first == 5
    assert completion == site.sample("buddy_layers_per_token_count")


def test_every_request_is_counted_once_with_its_outcome(serve: Serve) -> None:
    site = serve(FakeEngine(delay_s=0.05), ServerConfig(max_waiting=1))
    site.chat()
    site.chat(stream=True)
    site.chat(budget=7)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda _: site.chat(n=3).status_code, range(2))) == [200, 503]
    site.engine.fail_at = 1
    site.chat()
    outcomes = {"finished": 3, "refused": 1, "overloaded": 1, "error": 1, "cancelled": 0}
    for outcome, count in outcomes.items():
        assert site.sample("buddy_requests_total", outcome=outcome, tenant="default") == count
    assert site.sample("buddy_requests_total") == site.sample("buddy_request_duration_seconds_count") == 6


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_is_lost_with_its_engine_counts_as_an_error(serve: Serve, stream: bool) -> None:
    site = serve(FakeEngine(fail_at=2, fail_with="lost"))
    site.chat(stream=stream)
    assert site.sample("buddy_requests_total", outcome="error") == 1
    assert site.sample("buddy_requests_total") == 1


def test_time_in_the_queue_is_measured_for_every_choice(serve: Serve) -> None:
    site = serve(FakeEngine(queue_s=0.25))
    site.chat(n=3)
    assert site.sample("buddy_queue_time_seconds_count", tenant="default", tier="default") == 3
    assert site.sample("buddy_queue_time_seconds_sum") == 0.75


def test_usage_and_counters_agree(site: Site) -> None:
    usage = site.chat(budget=0.5).json()["usage"]
    assert site.sample("buddy_prompt_tokens_total") == usage["prompt_tokens"]
    assert site.sample("buddy_completion_tokens_total") == usage["completion_tokens"]
    assert site.sample("buddy_layers_per_token_sum") == 4 * usage["completion_tokens"]
    assert site.sample("buddy_budget_granted_sum") == 0.5


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_step_counts_layers_by_configured_tenant() -> None:
    metrics = Metrics(INFO, [Tenant("acme", Tier("pro"))])
    assert metrics.engine is not None
    for _ in range(2):
        metrics.engine.observe_step(step(acme=DepthCount(30000, 10000, 500), stranger=DepthCount(4000, 28000)))
    assert sample(metrics, "buddy_layers_executed_total", tenant="acme", tier="pro") == 60
    assert sample(metrics, "buddy_layers_skipped_total", tenant="acme", tier="pro") == 20
    assert sample(metrics, "buddy_layers_uncharged_total", tenant="acme", tier="pro") == 1
    assert sample(metrics, "buddy_layers_skipped_total", tenant="other", tier="other") == 56
    assert sample(metrics, "buddy_batch_layers_read_ratio_sum") == 2 * 6 / 8
    assert sample(metrics, "buddy_batch_size_sum") == 4
    assert sample(metrics, "buddy_preemptions_total") == 2
    assert sample(metrics, "buddy_router_seconds_count") == 2


@pytest.mark.anyio
async def test_gauges_are_asked_of_the_engine_when_scraped() -> None:
    metrics = Metrics(INFO, [])
    await metrics.render(FakeEngine(is_ready=False, num_waiting=1, num_running=2, kv_usage_ratio=0.5))
    assert sample(metrics, "buddy_engine_up") == 0
    assert sample(metrics, "buddy_num_requests_waiting") == 1
    assert sample(metrics, "buddy_num_requests_running") == 2
    assert sample(metrics, "buddy_kv_cache_usage_ratio") == 0.5


def test_tenants_after_the_first_200_share_a_label() -> None:
    tenants = [Tenant(f"t{index}", Tier("pro")) for index in range(202)]
    metrics = Metrics(INFO, tenants)
    for tenant in tenants:
        metrics.request(tenant).finish("finished")
    assert sample(metrics, "buddy_requests_total", tenant="t199", tier="pro", outcome="finished") == 1
    assert sample(metrics, "buddy_requests_total", tenant="other", tier="pro", outcome="finished") == 2


def test_labels_follow_the_tenants() -> None:
    acme, free = Tenant("acme", Tier("pro")), Tier("free")
    metrics = Metrics(INFO, [acme])
    metrics.follow([Tenant("acme", free), Tenant("new", free)])
    metrics.request(acme).finish("finished")
    metrics.request(Tenant("new", free)).finish("limited")
    assert sample(metrics, "buddy_requests_total", tenant="acme", tier="free", outcome="finished") == 1
    assert sample(metrics, "buddy_requests_total", tenant="new", tier="free", outcome="limited") == 1


def test_tenants_that_come_and_go_use_200_labels_at_most() -> None:
    pro = Tier("pro")
    first = [Tenant(f"first{index}", pro) for index in range(150)]
    later = [Tenant(f"later{index}", pro) for index in range(150)]
    metrics = Metrics(INFO, first)
    metrics.follow(later)
    metrics.follow([*later, *first])
    for tenant in (*first, *later):
        metrics.observe_account(Account("r", tenant.name, "stop", Usage(9, 0, 2, 8000, 0)))
    assert sample(metrics, "buddy_layer_tokens_total", tenant="first149", tier="pro") == 1
    assert sample(metrics, "buddy_layer_tokens_total", tenant="later49", tier="pro") == 1
    assert sample(metrics, "buddy_layer_tokens_total", tenant="other", tier="pro") == 100


def test_refusals_are_counted_by_the_limits_that_a_tenant_has() -> None:
    acme = Tenant("acme", Tier("free", requests_per_minute=1, max_concurrent_requests=1))
    metrics = Metrics(INFO, [acme])
    metrics.limited(acme, "requests_per_minute")
    counts = {limit: sample(metrics, "buddy_rate_limited_total", tenant="acme", limit=limit) for limit in LIMITS}
    assert counts == {
        "requests_per_minute": 1,
        "layer_tokens_per_minute": None,
        "max_concurrent_requests": 0,
        "layer_tokens_per_month": None,
    }


def test_quota_is_shown_for_those_who_have_one() -> None:
    acme = Tenant("acme", Tier("free", layer_tokens_per_month=1000))
    crowd = [Tenant(f"t{index}", acme.tier) for index in range(200)]
    metrics = Metrics(INFO, [acme, *crowd])
    assert sample(metrics, "buddy_quota_used_ratio", tenant="acme") is None
    metrics.quota(acme, 0.25)
    metrics.quota(crowd[-1], 0.75)
    assert sample(metrics, "buddy_quota_used_ratio", tenant="acme") == 0.25
    assert sample(metrics, "buddy_quota_used_ratio", tenant="other") is None
    metrics.follow([Tenant("acme", Tier("free", layer_tokens_per_month=2000))])
    assert sample(metrics, "buddy_quota_used_ratio", tenant="acme") == 0.25
    metrics.follow([Tenant("acme", Tier("pro"))])
    assert sample(metrics, "buddy_quota_used_ratio", tenant="acme") is None


def test_budget_limit_is_shown_for_elastic_tiers_and_counts_its_changes() -> None:
    metrics = Metrics(INFO, [Tenant("acme", Tier("free", elastic_floor=0.25)), Tenant("hobby", Tier("pro"))])
    assert sample(metrics, "buddy_budget_limit_ratio", tier="free") == 1
    assert sample(metrics, "buddy_budget_limit_ratio", tier="pro") is None
    for ratio in (1.0, 0.75, 0.5, 0.5, 1.0):
        metrics.depth_limit("free", ratio)
    metrics.depth_limit("free", 0.75)
    metrics.follow([Tenant("acme", Tier("free", elastic_floor=0.25))])
    assert sample(metrics, "buddy_budget_limit_ratio", tier="free") == 0.75
    assert sample(metrics, "buddy_budget_limit_changes_total", tier="free", direction="lowered") == 3
    assert sample(metrics, "buddy_budget_limit_changes_total", tier="free", direction="restored") == 1
    metrics.follow([Tenant("acme", Tier("free"))])
    assert sample(metrics, "buddy_budget_limit_ratio", tier="free") is None


def test_requested_budgets_are_those_that_requests_state() -> None:
    acme = Tenant("acme", Tier("free", max_budget=0.5))
    metrics = Metrics(INFO, [acme])
    for requested in (0.75, None, "auto", 0.25):
        metrics.request(acme).admitted(9, decide_depth(requested, acme.tier, INFO.actions, has_predictor=False))
    labels = {"tenant": "acme", "tier": "free"}
    assert sample(metrics, "buddy_budget_requested_sum", **labels) == 1
    assert sample(metrics, "buddy_budget_requested_count", **labels) == 2
    assert sample(metrics, "buddy_budget_granted_count", **labels) == 4


def test_ledger_is_measured() -> None:
    metrics = Metrics(INFO, [])
    metrics.ledger_pending(3)
    metrics.ledger_written(2, 0.004)
    metrics.ledger_recovered(5)
    assert sample(metrics, "buddy_ledger_rows_pending") == 3
    assert sample(metrics, "buddy_ledger_rows_total", result="written") == 2
    assert sample(metrics, "buddy_ledger_rows_total", result="recovered") == 5
    assert sample(metrics, "buddy_ledger_write_seconds_sum") == 0.004


def test_store_and_limits_are_shown_once_they_are_asked() -> None:
    metrics = Metrics(INFO, [])
    assert b"buddy_store_up" not in generate_latest(metrics.registry)
    assert b"buddy_limits_up" not in generate_latest(metrics.registry)
    for is_up in (True, False):
        metrics.store_up(is_up)
        metrics.limits_up(is_up)
        assert sample(metrics, "buddy_store_up") == sample(metrics, "buddy_limits_up") == is_up


def test_reloads_are_counted_by_result() -> None:
    metrics = Metrics(INFO, [])
    metrics.reloaded(applied=True)
    assert sample(metrics, "buddy_config_reloads_total", result="applied") == 1
    assert sample(metrics, "buddy_config_reloads_total", result="refused") == 0


@pytest.mark.anyio
async def test_life_that_is_left_by_an_error_takes_its_outcome() -> None:
    tenant = Tenant("acme", Tier("pro"))
    engine, metrics = FakeEngine(), Metrics(INFO, [tenant])
    tenancy = tenancy_of(engine, ServerConfig(), metrics)
    capacity, bills = Capacity(engine, tenancy.book), tenancy.bills
    with pytest.raises(InvalidBudget):
        async with RequestLife(capacity, bills, metrics.request(tenant)):
            raise InvalidBudget("no")
    with pytest.raises(ZeroDivisionError):
        async with RequestLife(capacity, bills, metrics.request(tenant)):
            raise ZeroDivisionError
    async with RequestLife(capacity, bills, metrics.request(tenant)):
        pass
    async with RequestLife(capacity, bills, metrics.request(tenant)) as life:
        life.metrics.finish("finished")
        life.metrics.finish("error")
    for outcome in ("refused", "error", "cancelled", "finished"):
        assert sample(metrics, "buddy_requests_total", tenant="acme", tier="pro", outcome=outcome) == 1


def test_accounts_are_counted_in_layer_tokens() -> None:
    metrics = Metrics(INFO, [Tenant("acme", Tier("pro"))])
    metrics.observe_account(Account("r", "acme", "cancelled", Usage(9, 0, 2, 36000, 4000)))
    assert sample(metrics, "buddy_layer_tokens_total", tenant="acme", tier="pro") == 5.0


def test_layer_buckets_are_eighths_of_the_model() -> None:
    metrics = Metrics(INFO, [Tenant("acme", Tier("pro"))])
    metrics.request(Tenant("acme", Tier("pro"))).tokens([4000])
    assert sample(metrics, "buddy_layers_per_token_bucket", tenant="acme", tier="pro", le="3.0") == 0
    assert sample(metrics, "buddy_layers_per_token_bucket", tenant="acme", tier="pro", le="4.0") == 1


def test_histogram_with_counts_says_what_one_by_one_would() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counted = CountedHistogram("gap_seconds", "Help.", ("tenant",), buckets=(0.5, 1, 2.5), registry=ours)
    single = Histogram("gap_seconds", "Help.", ("tenant",), buckets=(0.5, 1, 2.5), registry=theirs)
    for value, count in ((0.5, 3), (0.75, 2), (1, 1), (9.0, 4), (0.0, 1)):
        counted.labels("acme").observe(value, count)
        for _ in range(count):
            single.labels("acme").observe(value)
    counted.labels("quiet")
    single.labels("quiet")
    told = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == told
    with pytest.raises(ValueError, match="gap_seconds"):
        CountedHistogram("gap_seconds", "Help.", buckets=(1,), registry=ours)


def test_tokens_that_come_together_share_the_time_since_those_before() -> None:
    metrics = Metrics(INFO, [Tenant("acme", Tier("pro"))])
    measured = metrics.request(Tenant("acme", Tier("pro")))
    measured.tokens([])
    assert sample(metrics, "buddy_completion_tokens_total", tenant="acme", tier="pro") == 0
    measured.tokens([4000, 4000, 3000])
    started = time.perf_counter()
    time.sleep(0.02)
    measured.tokens([4000, 4000])
    passed = time.perf_counter() - started
    labels = {"tenant": "acme", "tier": "pro"}
    assert sample(metrics, "buddy_time_to_first_token_seconds_count", **labels) == 1
    assert sample(metrics, "buddy_inter_token_latency_seconds_count", **labels) == 4
    assert sample(metrics, "buddy_inter_token_latency_seconds_sum", **labels) == pytest.approx(passed, abs=0.005)
    # The two that came with the first one, and none of those that had to wait.
    assert sample(metrics, "buddy_inter_token_latency_seconds_bucket", **labels, le="0.005") == 2
    assert sample(metrics, "buddy_layers_per_token_sum", **labels) == 19
