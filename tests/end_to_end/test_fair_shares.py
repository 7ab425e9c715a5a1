"""Two servers with one Redis: a tenant's share is that of both together."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from end_to_end.tenant_site import LONG, Served, tenants
from redis_process import needs_redis, redis_process

pytestmark = [pytest.mark.slow, needs_redis]

FLOOD_S, SETTLED_S = 16.0, 6.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    folder = tmp_path_factory.mktemp("fair")
    with ExitStack() as stack:
        config = {
            "tiers": {"free": {}},
            "tenants": tenants({"here": "free", "everywhere": "free"}),
            "limits": {"url": stack.enter_context(redis_process()).url},
            "engine": {"max_sequences": 4},
        }
        both = Served(folder, config, "a", arguments=("--device", "cpu")), Served(folder, config, "b")
        for server in both:
            server.launch()
            stack.callback(server.kill)
        for server in both:
            server.wait_until_ready()
        yield both
        for server in both:
            server.stop()


def test_what_a_tenant_gets_on_one_server_counts_on_the_other(servers: tuple[Served, Served]) -> None:
    """One tenant has work on both, the other on the first alone: it gets nearly all of that, where it would get half if
    each server shared out its own."""
    first, second = servers
    ends_s = time.monotonic() + FLOOD_S

    def flood(server: Served, tenant: str) -> None:
        while time.monotonic() < ends_s:
            answer = server.ask(f"sk-{tenant}", **LONG | {"n": 1, "max_tokens": 300})
            assert answer.status_code == httpx.codes.OK, answer.text

    def executed() -> dict[str, float]:
        return {name: first.sample("buddy_layers_executed_total", tenant=name) for name in ("here", "everywhere")}

    with ThreadPoolExecutor(36) as pool:
        places = [(first, "here"), (first, "everywhere"), (second, "everywhere")]
        flooding = [pool.submit(flood, *place) for place in places for _ in range(12)]
        time.sleep(SETTLED_S)
        before = executed()
        time.sleep(FLOOD_S - SETTLED_S - 1)
        after = executed()
        for future in flooding:
            future.result()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["here"] > 0.75 * sum(grown.values())
