"""Three replicas of the engine and two ingresses, as a Serve config file deploys them on a real Ray, with a real Redis
and PostgreSQL: they agree on what tenants have left and who is next, and nothing is lost with one of them."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from buddy_process import NEEDS_RAY
from child_processes import command_of, descendants_of, engines_of, parent_of
from end_to_end.mixed_requests import check_ledger, exchange
from end_to_end.serve_run import serve_run
from end_to_end.tenant_site import LONG, Served, bearer, rows_of, tenants
from fakes.serving import wait_until
from postgres_process import postgres
from redis_process import needs_redis, redis_process

pytestmark = [NEEDS_RAY, needs_redis, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

REPLACED_S = 240.0
"""Within which Ray Serve starts another process, on a machine that has more to do."""
RECOVERED_S = 90.0
"""Within which the ledger has the rows of an ingress that was killed: others look every minute."""
MOST_UNDER_WAY = 1000
"""Tokens that a replica gathers for a message, and those behind it on a busy machine."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fleet")
    tiers = {"free": {}, "ten": {"requests_per_minute": 10}, "heavy": {"weight": 3}, "light": {"weight": 1}}
    names = {"ten": "ten", "heavy": "heavy", "light": "light", **{f"t{index}": "free" for index in range(3)}}
    with ExitStack() as stack:
        store = stack.enter_context(postgres()).create_database("buddy")
        redis = stack.enter_context(redis_process())
        config = {
            "tiers": tiers,
            "tenants": tenants(names),
            # With so many processes on two cores, a database may not get its turn in time.
            "store": {"url": store, "journal": str(folder / "journal"), "when_unreachable": "allow"},
            "limits": {"url": redis.url},
            "engine": {"max_sequences": 4},
        }
        server = serve_run(folder, config, num_replicas=3, ingresses=2)
        # Other processes of the tests would go before Ray's.
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("RAY_worker_niceness", "0")
        stack.callback(server.kill)
        server.start()
        wait_until(lambda: len(ingresses(server)) == 2 and server.sample("buddy_engine_up") == 3, REPLACED_S, 0.5)
        yield server


def ingresses(site: Served) -> list[int]:
    """Process ids."""
    assert site.process is not None
    return [pid for pid in descendants_of(site.process.pid) if "ServeReplica:buddy:Ingress" in command_of(pid)]


def engines(site: Served) -> list[int]:
    """Process ids of the replicas' engines."""
    assert site.process is not None
    return engines_of(site.process.pid)


def test_a_limit_of_ten_lets_exactly_ten_of_forty_clients_pass(site: Served) -> None:
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: site.ask("sk-ten").status_code, range(40)))
    assert sorted(answers) == [httpx.codes.OK] * 10 + [httpx.codes.TOO_MANY_REQUESTS] * 30


def test_metrics_of_all_ingresses_come_in_one_scrape_and_add_up(site: Served) -> None:
    before = {name: site.sample(f"buddy_{name}_total") for name in ("requests", "layer_tokens")}
    usages = [site.ask("sk-t0", budget=0.5).json()["buddy"]["layer_tokens"] for _ in range(16)]
    assert site.sample("buddy_requests_total") - before["requests"] == 16
    assert site.sample("buddy_layer_tokens_total") - before["layer_tokens"] == pytest.approx(sum(usages))
    shares = [site.sample("buddy_requests_total", ingress=name) for name in names(site, "ingress")]
    assert len(shares) == 2
    assert min(shares) > 0
    assert len(names(site, "replica")) == 3


def names(site: Served, label: str) -> set[str]:
    """The values of a label in the metrics."""
    lines = site.http.get(f"{site.url}/metrics").text.splitlines()
    return {line.partition(f'{label}="')[2].partition('"')[0] for line in lines if f'{label}="' in line}


def test_second_requests_find_the_prefix_of_the_first_through_any_ingress(site: Served) -> None:
    draw = random.Random(0)
    prompts = [[draw.randrange(100, 1000) for _ in range(300)] for _ in range(24)]

    def cached(prompt: list[int]) -> int:
        body = {"model": "buddy-7m", "prompt": prompt, "max_tokens": 8, "budget": 1.0}
        answer = site.http.post(f"{site.url}/v1/completions", json=body, headers=bearer("sk-t0"))
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(cached, prompts))
        draw.shuffle(prompts)
        second = list(pool.map(cached, prompts))
    assert first == [0] * 24
    assert second.count(256) >= 0.9 * 24


def test_weights_of_three_to_one_give_three_to_one_over_all_replicas(site: Served) -> None:
    ends_s = time.monotonic() + 30
    body = {"model": "buddy-7m", "prompt": "hi", **LONG, "n": 1, "max_tokens": 300, "stream": True}

    def flood(tenant: str) -> None:
        url, headers = f"{site.url}/v1/completions", bearer(f"sk-{tenant}")
        while time.monotonic() < ends_s:
            with site.http.stream("POST", url, json=body, headers=headers) as answer:
                assert answer.status_code == httpx.codes.OK, answer.read()
                for _ in answer.iter_lines():
                    if time.monotonic() > ends_s:
                        return

    def executed() -> dict[str, float]:
        return {tenant: site.sample("buddy_layers_executed_total", tenant=tenant) for tenant in ("heavy", "light")}

    with ThreadPoolExecutor(40) as pool:
        flooding = [pool.submit(flood, tenant) for tenant in ("heavy", "light") for _ in range(20)]
        time.sleep(10)
        before = executed()
        time.sleep(18)
        after = executed()
        for future in flooding:
            future.result()
    grown = {tenant: after[tenant] - before[tenant] for tenant in after}
    assert grown["heavy"] / grown["light"] == pytest.approx(3, rel=0.1)


def test_ledger_equals_what_clients_received_after_a_replica_and_an_ingress_were_killed(site: Served) -> None:
    url, others = site.config["store"]["url"], set(rows_of(site.config["store"]["url"]))
    wait_until(lambda: site.sample("buddy_engine_up") == 3, REPLACED_S, 0.5)
    killed = (lambda: os.kill(parent_of(engines(site)[0]), signal.SIGKILL), lambda: kill_ingress(site))
    received = asyncio.run(exchange(site, [(60, killed[0]), (130, killed[1])]))

    def rows() -> dict[str, Any]:
        mixed = {"t0", "t1", "t2"}
        return {name: row for name, row in rows_of(url).items() if row.tenant in mixed and name not in others}

    begun = {got.response_id for got in received if got.response_id}
    wait_until(lambda: begun <= set(rows()), RECOVERED_S, 1.0)
    check_ledger(rows(), received, MOST_UNDER_WAY)
    wait_until(lambda: site.sample("buddy_num_requests_running") == 0, 15)
    wait_until(lambda: len(ingresses(site)) == 2 and site.sample("buddy_engine_up") == 3, REPLACED_S, 0.5)


def kill_ingress(site: Served) -> None:
    os.kill(ingresses(site)[0], signal.SIGKILL)
