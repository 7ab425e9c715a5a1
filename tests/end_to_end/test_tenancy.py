"""Servers that share a PostgreSQL and a Redis: what one of them knows, the others know, whatever ends or is away."""

import csv
import io
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from buddy_server.tenancy.limits.limiter import LEASE_S
from end_to_end.tenant_site import ADMIN_KEY, KEY_SECRET, LONG, Served, Streamed, bearer, rows_of, tenants
from fakes.serving import wait_until
from postgres_process import PASSWORD, Postgres, postgres
from redis_process import RedisProcess, needs_redis, redis_process

pytestmark = [pytest.mark.slow, needs_redis]

LAYERS = 16
TIERS = {
    "ten": {"requests_per_minute": 10},
    "tokens": {"layer_tokens_per_minute": 210},
    "one": {"max_concurrent_requests": 1},
    "many": {"requests_per_minute": 100000},
    "free": {},
}
TENANTS = tenants(
    {"ten": "ten", "late": "ten", "tokens": "tokens", "one": "one", "load": "many", "free": "free", "counted": "free"}
)
ONCE_S = 1.0
"""How soon a server knows of a change that another has made."""
EXACT: dict[str, Any] = {"budget": 1.0, "logit_bias": LONG["logit_bias"]}
"""Fields of a request that uses all it may: each token but the last, through all layers."""


@dataclass
class Site:
    """`a` and `b` refuse requests while a store is away, `lenient` allows them. `bodies` are those of errors."""

    postgres: Postgres
    redis: RedisProcess
    store_url: str
    a: Served
    b: Served
    lenient: Served
    bodies: list[str] = field(default_factory=list)
    made_keys: list[str] = field(default_factory=list)

    @property
    def servers(self) -> tuple[Served, ...]:
        return (self.a, self.b, self.lenient)

    def make_key(self, tenant: str, **fields: Any) -> dict[str, Any]:
        """On `a`."""
        made: dict[str, Any] = self.a.admin("POST", f"/tenants/{tenant}/keys", json=fields).json()
        self.made_keys.append(made["key"])
        return made

    def code(self, answer: httpx.Response) -> str:
        """The code of an error."""
        self.bodies.append(answer.text)
        return str(answer.json()["error"]["code"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("shared")
    with ExitStack() as stack:
        database, redis = stack.enter_context(postgres()), stack.enter_context(redis_process())
        url = database.create_database("buddy")

        def server(name: str, when_unreachable: str) -> Served:
            away = {"when_unreachable": when_unreachable}
            store = {"url": url, "journal": str(folder / f"{name}.journals"), **away}
            config = {"tiers": TIERS, "tenants": TENANTS, "store": store, "limits": {"url": redis.url, **away}}
            launched = Served(folder, config, name)
            launched.launch()
            stack.callback(launched.kill)
            return launched

        shared = Site(database, redis, url, server("a", "refuse"), server("b", "refuse"), server("lenient", "allow"))
        for served in shared.servers:
            served.wait_until_ready()
        yield shared
        for served in shared.servers:
            served.stop()


def ask_both(site: Site, num_requests: int, key: str, **fields: Any) -> list[httpx.Response]:
    """As many requests at once, over two servers in turn."""
    with ThreadPoolExecutor(num_requests) as pool:
        turns = [(site.a, site.b)[index % 2] for index in range(num_requests)]
        return list(pool.map(lambda server: server.ask(key, **fields), turns))


def statuses(answers: list[httpx.Response]) -> list[int]:
    return sorted(answer.status_code for answer in answers)


def test_twenty_at_once_over_two_servers_against_ten_per_minute_are_exactly_ten(site: Site) -> None:
    assert statuses(ask_both(site, 20, "sk-ten")) == [200] * 10 + [429] * 10
    refused = [server.sample("buddy_rate_limited_total", tenant="ten") for server in (site.a, site.b)]
    assert sum(refused) == 10


def test_layer_tokens_are_held_to_the_token_over_two_servers(site: Site) -> None:
    num_prompt = site.a.ask("sk-free").json()["usage"]["prompt_tokens"]

    def reserving(layer_tokens: int) -> dict[str, Any]:
        return {**EXACT, "max_tokens": layer_tokens - num_prompt}

    # Each uses 25: the last token of an answer is not run.
    answers = ask_both(site, 20, "sk-tokens", **reserving(26))
    assert statuses(answers) == [200] * 8 + [429] * 12
    granted = [answer for answer in answers if answer.status_code == httpx.codes.OK]
    assert [answer.json()["buddy"]["layer_tokens"] for answer in granted] == [25] * 8
    assert site.code(site.b.ask("sk-tokens", **reserving(11))) == "rate_limit_exceeded"
    last = site.a.ask("sk-tokens", **reserving(10))
    assert (last.status_code, last.headers["x-ratelimit-remaining-tokens"]) == (200, "0")


def test_key_made_on_one_server_works_on_the_other_until_it_is_revoked(site: Site) -> None:
    made = site.make_key("free")
    wait_until(lambda: site.b.ask(made["key"]).status_code == httpx.codes.OK, ONCE_S)
    site.a.admin("DELETE", f"/keys/{made['id']}").raise_for_status()
    assert site.code(site.a.ask(made["key"])) == "invalid_api_key"
    wait_until(lambda: site.b.ask(made["key"]).status_code == httpx.codes.UNAUTHORIZED, ONCE_S)


def test_disabled_tenant_gets_403_on_every_server_until_it_is_enabled(site: Site) -> None:
    site.a.admin("POST", "/tenants", json={"name": "shop", "tier": "free"}).raise_for_status()
    key = site.make_key("shop")["key"]
    for disabled, status in ((True, httpx.codes.FORBIDDEN), (False, httpx.codes.OK)):
        site.a.admin("PATCH", "/tenants/shop", json={"disabled": disabled}).raise_for_status()
        assert site.a.ask(key).status_code == status
        wait_until(lambda: site.b.ask(key).status_code == status, ONCE_S)  # noqa: B023


def test_expired_key_is_refused_on_every_server(site: Site) -> None:
    expires = datetime.now(UTC) + timedelta(seconds=1.5)
    key = site.make_key("free", expires_at=expires.isoformat())["key"]
    assert site.a.ask(key).status_code == httpx.codes.OK
    wait_until(lambda: datetime.now(UTC) > expires)
    for server in site.servers:
        assert site.code(server.ask(key)) == "invalid_api_key"


def test_usage_is_the_sum_of_the_responses_as_json_and_csv(site: Site) -> None:
    answers = [
        server.ask("sk-counted", budget=budget, max_tokens=max_tokens, n=n).json()
        for server in site.servers
        for budget, max_tokens, n in ((0.25, 3, 1), (0.5, 9, 2), (1.0, 1, 1))
    ]
    query = {"tenant": "counted", "group_by": "tenant,day"}

    def usage() -> dict[str, Any]:
        [row] = site.a.admin("GET", "/usage", params=query).json()["data"]
        return row

    # The other servers' rows come a moment after their responses.
    wait_until(lambda: usage()["requests"] == len(answers))
    row = usage()
    assert row["tenant"] == "counted"
    assert row["layer_tokens"] == sum(answer["buddy"]["layer_tokens"] for answer in answers)
    for name in ("prompt_tokens", "completion_tokens"):
        assert row[name] == sum(answer["usage"][name] for answer in answers)
    text = site.b.admin("GET", "/usage", params={**query, "format": "csv"}).text
    assert list(csv.DictReader(io.StringIO(text))) == [{name: str(value) for name, value in row.items()}]


def test_every_change_has_its_row_in_the_audit(site: Site) -> None:
    [newest, *_] = site.a.admin("GET", "/audit").json()["data"]
    site.a.admin("PUT", "/tiers/gold", json={"weight": 2.0}).raise_for_status()
    site.a.admin("POST", "/tenants", json={"name": "bank", "tier": "gold"}).raise_for_status()
    made = site.make_key("bank")
    site.a.admin("DELETE", f"/keys/{made['id']}").raise_for_status()
    site.a.admin("PATCH", "/tenants/bank", json={"tier": "free"}).raise_for_status()
    site.a.admin("DELETE", "/tiers/gold").raise_for_status()
    audit = site.b.admin("GET", "/audit").json()["data"]
    changes = [(row["action"], row["subject"]) for row in audit if row["id"] > newest["id"]]
    assert changes[::-1] == [
        ("tier.create", "gold"),
        ("tenant.create", "bank"),
        ("key.create", made["id"]),
        ("key.revoke", made["id"]),
        ("tenant.change", "bank"),
        ("tier.delete", "gold"),
    ]


def test_key_of_a_tenant_does_not_open_the_admin_api(site: Site) -> None:
    for path in ("/tenants", "/usage", "/audit"):
        answer = site.a.http.get(f"{site.a.url}/admin{path}", headers=bearer("sk-free"))
        assert (answer.status_code, site.code(answer)) == (401, "invalid_api_key")


def test_place_of_a_killed_servers_request_is_free_once_its_lease_has_lapsed(site: Site) -> None:
    got = Streamed()
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(site.a.stream, "sk-one", got, **LONG)
        wait_until(lambda: got.num_tokens)
        assert site.code(site.b.ask("sk-one")) == "rate_limit_exceeded"
        site.a.kill()
        killed_s = time.monotonic()
        assert isinstance(streaming.exception(), httpx.TransportError)
    site.a.launch()
    wait_until(lambda: site.b.ask("sk-one").status_code == httpx.codes.OK, LEASE_S + 2, pause_s=0.2)
    # Leases are renewed each third of their time, so the last renewal may have been that long ago.
    assert time.monotonic() - killed_s > LEASE_S * 2 / 3 - 1
    site.a.wait_until_ready()
    row = rows_of(site.store_url)[got.response_id]
    assert (row.tenant, row.outcome) == ("one", "error")
    assert got.num_tokens <= row.completion_tokens < LONG["max_tokens"] * LONG["n"]
    assert row.milli_layers >= 1000 * LAYERS * (row.completion_tokens - LONG["n"])


class Load:
    """What clients have received that ask all the time."""

    def __init__(self) -> None:
        self.answers: list[tuple[Served, httpx.Response]] = []

    def ask(self, server: Served, stopped: threading.Event) -> None:
        while not stopped.wait(0.1):
            self.answers.append((server, server.ask("sk-load", **EXACT)))

    def of(self, server: Served, status: int, after: int = 0) -> list[httpx.Response]:
        """The responses of a server with a status, of those after the first `after` of all."""
        return [answer for sender, answer in self.answers[after:] if (sender, answer.status_code) == (server, status)]

    def wait_for(self, servers: list[Served], status: int, timeout_s: float) -> None:
        """Return when each of the servers has answered with a status from now on."""
        begun = len(self.answers)
        wait_until(lambda: all(self.of(server, status, begun) for server in servers), timeout_s)


@contextmanager
def load_on(servers: tuple[Served, ...]) -> Iterator[Load]:
    """Two clients for each server; at the end, all they asked is answered."""
    load, stopped = Load(), threading.Event()
    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(load.ask, server, stopped) for server in servers for _ in range(2)]
        try:
            yield load
        finally:
            stopped.set()
        for future in asking:
            future.result()


def outage(site: Site, stop: Callable[[], None], start: Callable[[], None]) -> tuple[Load, list[Streamed]]:
    """A store is stopped under load and started again; streams run meanwhile."""
    streams = [Streamed() for _ in site.servers]
    with ThreadPoolExecutor() as pool, load_on(site.servers) as load:
        load.wait_for([*site.servers], 200, 10)
        streaming = [
            pool.submit(server.stream, "sk-load", got, **LONG | {"n": 2})
            for server, got in zip(site.servers, streams, strict=True)
        ]
        wait_until(lambda: all(got.num_tokens for got in streams), 10)
        stop()
        load.wait_for([site.a, site.b], 503, 3)
        load.wait_for([site.lenient], 200, 5)
        for future in streaming:
            future.result()
        start()
        load.wait_for([*site.servers], 200, 10)
    for server, answer in load.answers:
        if answer.status_code != httpx.codes.OK:
            assert (answer.status_code, site.code(answer)) == (503, "store_unreachable")
            assert int(answer.headers["retry-after"]) > 0
            assert server is not site.lenient
    assert all(got.is_done for got in streams)
    return load, streams


def test_postgres_away_refuses_or_allows_as_configured_and_loses_no_row(site: Site) -> None:
    load, streams = outage(site, site.postgres.stop, site.postgres.start)
    used = {got.response_id: got.layer_tokens for got in streams}
    for _, answer in load.answers:
        if answer.status_code == httpx.codes.OK:
            used[answer.json()["id"]] = answer.json()["buddy"]["layer_tokens"]
    wait_until(lambda: used.keys() <= rows_of(site.store_url).keys(), 5, pause_s=0.1)
    rows = {name: row for name, row in rows_of(site.store_url).items() if name in used}
    assert {name: round(row.milli_layers / (1000 * LAYERS), 3) for name, row in rows.items()} == used
    assert {row.outcome for row in rows.values()} == {"finished"}
    for server in site.servers:
        assert server.sample("buddy_ledger_rows_pending") == 0
        wait_until(lambda: server.sample("buddy_store_up") == 1, 2)  # noqa: B023


def test_redis_away_refuses_or_allows_as_configured_and_limits_hold_afterwards(site: Site) -> None:
    outage(site, site.redis.kill, site.redis.start)
    assert statuses(ask_both(site, 20, "sk-late")) == [200] * 10 + [429] * 10


def test_no_secret_is_in_a_log_a_metric_an_error_the_database_or_a_journal(site: Site) -> None:
    made = site.make_key("free")["key"]
    site.code(site.a.admin("DELETE", f"/keys/{made}"))
    site.code(site.b.ask(f"{made}x"))
    site.code(site.a.http.get(f"{site.a.url}/admin/tenants", headers=bearer(made)))
    got = Streamed()
    # A request under way has a row in the journal.
    site.a.stream(made, got, leave=lambda: "chatcmpl" in journals(site), **LONG)
    dump = subprocess.run(
        [site.postgres.binaries / "pg_dump", site.store_url.replace(f":{PASSWORD}@", "@")],
        env=os.environ | {"PGPASSWORD": PASSWORD}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "INSERT" in dump or "COPY" in dump
    texts = {"errors": "\n".join(site.bodies), "dump": dump}
    for server in site.servers:
        texts[f"log of {server.name}"] = server.log
        texts[f"metrics of {server.name}"] = server.http.get(f"{server.url}/metrics").text
    texts["journals"] = journals(site)
    secrets = [ADMIN_KEY, KEY_SECRET, PASSWORD, site.redis.password, *(f"sk-{name}" for name in TENANTS)]
    secrets += [part for key in site.made_keys for part in (key, key.partition("_")[2])]
    found = [(where, secret) for where, text in texts.items() for secret in secrets if secret in text]
    assert found == []


def journals(site: Site) -> str:
    files: list[Path] = [path for path in site.a.folder.rglob("*") if path.suffix == ".journal"]
    return "\n".join(path.read_bytes().decode("latin-1") for path in files)
