"""The ledger says what clients received, whatever is killed."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from end_to_end.mixed_requests import LAYERS, check_ledger, exchange
from end_to_end.tenant_site import ADMIN_KEY, KEY_SECRET, Served, rows_of, tenants
from postgres_process import PASSWORD, postgres

MOST_UNDER_WAY = 3 * 64
"""A few bursts."""


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('store')}/buddy.db"
        return
    with postgres() as server:
        yield server.url()


@pytest.mark.slow
def test_ledger_equals_what_clients_received_after_everything_was_killed(store_url: str, tmp_path: Path) -> None:
    config = {
        "tiers": {"all": {"requests_per_minute": 100000, "layer_tokens_per_minute": 10**9}},
        "tenants": tenants({f"t{index}": "all" for index in range(3)}),
        "store": {"url": store_url, "journal": str(tmp_path / "journal")},
    }
    site = Served(tmp_path, config)
    site.start()

    def again() -> None:
        site.kill()
        site.start()

    try:
        received = asyncio.run(exchange(site, [(60, site.replace_engine), (130, again)]))
        usage = site.admin("GET", "/usage", params={"group_by": "tenant"}).json()["data"]
    finally:
        site.stop()
    rows = rows_of(store_url)
    check_ledger(rows, received, MOST_UNDER_WAY)
    by_tenant: defaultdict[str, int] = defaultdict(int)
    for row in rows.values():
        by_tenant[row.tenant] += row.milli_layers
    assert {one["tenant"]: one["layer_tokens"] for one in usage} == {
        name: round(cost / (1000 * LAYERS), 3) for name, cost in by_tenant.items()
    }
    secrets = (ADMIN_KEY, KEY_SECRET, PASSWORD, *(f"sk-t{index}" for index in range(3)))
    assert not any(secret in site.log for secret in secrets)
