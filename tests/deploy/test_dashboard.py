"""Every expression of the dashboard and every rule, asked of a real Prometheus that scraped the real server."""

import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from buddy_process import free_port, serving
from fakes.serving import wait_until
from redis_process import redis_process

DEPLOY = Path(__file__).parents[2] / "deploy"
GRAFANA = DEPLOY / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "buddy.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
EXPRESSIONS = [
    pytest.param(target["expr"], id=f"{panel['title']}, {target['legendFormat']}")
    for panel in PANELS
    for target in panel["targets"]
]
RULES = DEPLOY / "prometheus" / "rules"
RECORDED = [
    pytest.param(rule["expr"], id=rule["record"])
    for group in yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
    for rule in group["rules"]
]
KEYS = {"acme": "sk-test-acme", "hobby": "sk-test-hobby"}
LIMITS = {"requests_per_minute": 1000, "layer_tokens_per_minute": 300, "layer_tokens_per_month": 1000000}
CONFIG = {
    "tiers": {
        "pro": {"default_budget": 1.0, **LIMITS},
        "free": {"max_budget": 0.5, "default_budget": 0.5, "elastic_floor": 0.25, **LIMITS},
    },
    "tenants": {
        name: {"tier": tier, "key_sha256": [hashlib.sha256(KEYS[name].encode()).hexdigest()]}
        for name, tier in {"acme": "pro", "hobby": "free"}.items()
    },
}
BUDGETS = (1.0, 0.5)


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that scrapes the server, asked about the moment `at` (seconds since 1970)."""

    http: httpx.Client
    at: float

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of `expression`."""
        answer = self.http.get("/api/v1/query", params={"query": expression, "time": self.at})
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        data = answer.json()["data"]
        assert data["resultType"] == "vector"
        return list(data["result"])

    def total(self, metric: str) -> float:
        """The sum of all series of `metric`."""
        return sum(float(series["value"][1]) for series in self.query(metric))

    def label_values(self, metric: str, label: str) -> list[str]:
        answer = self.http.get(f"/api/v1/label/{label}/values", params={"match[]": metric})
        return list(answer.json()["data"])


@contextmanager
def buddy_server(folder: Path, redis_url: str) -> Iterator[httpx.Client]:
    """`buddy serve` with two tenants, a ledger, limits in Redis and the embedded model."""
    config = folder / "tenants.yaml"
    stores = {"store": {"url": f"sqlite:///{folder}/buddy.db"}, "limits": {"url": redis_url}}
    config.write_text(yaml.safe_dump(CONFIG | stores))
    with serving("--config", str(config), "--device", "cpu") as url, client(url) as http:
        yield http


def client(url: str) -> httpx.Client:
    """A busy machine is no reason to fail, and no proxy stands between us and the loopback."""
    return httpx.Client(base_url=url, timeout=20, trust_env=False)


@contextmanager
def prometheus_scraping(server: httpx.Client, folder: Path) -> Iterator[httpx.Client]:
    """Prometheus with the project's own configuration; only the target's address and the intervals are others."""
    executable = shutil.which("prometheus")
    assert executable is not None
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / pattern) for pattern in config["rule_files"]]
    [scrape] = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [f"{server.base_url.host}:{server.base_url.port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        executable,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        with client(f"http://{address}") as http:

            def is_ready() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return http.get("/-/ready").status_code == httpx.codes.OK
                except httpx.TransportError:
                    return False

            wait_until(is_ready, 20)
            yield http
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def once_scraped(prometheus: httpx.Client, num_requests: int) -> Prometheus:
    """Prometheus at a moment when it knows of exactly `num_requests` and its last scrape went well."""
    moments: list[Prometheus] = []

    def is_scraped() -> bool:
        moments.append(Prometheus(prometheus, time.time()))
        return moments[-1].total("up") == 1 and moments[-1].total("buddy_requests_total") == num_requests

    wait_until(is_scraped, 20)
    return moments[-1]


def use(server: httpx.Client) -> int:
    """Both tenants ask at several budgets, and one for more than its tier allows. Returns the number of requests."""
    choices = list(itertools.product(KEYS.values(), BUDGETS))
    for key, budget in choices:
        # More than one token, or there would be no gap between tokens.
        assert ask(server, key, max_tokens=12, budget=budget) == 200
    assert ask(server, KEYS["hobby"], max_tokens=800) == 429
    return len(choices) + 1


def ask(server: httpx.Client, key: str, **fields: Any) -> int:
    """The status of a chat completion."""
    body = {"model": "buddy-7m", "messages": [{"role": "user", "content": "Tell me a story."}], **fields}
    headers = {"Authorization": f"Bearer {key}"}
    return server.post("/v1/chat/completions", json=body, headers=headers).status_code


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("NOT TESTED: the dashboard's expressions. There is no prometheus: apt-get install prometheus")
    if shutil.which("redis-server") is None:
        pytest.skip("NOT TESTED: the dashboard's expressions. There is no Redis: apt-get install redis-server")
    folder = tmp_path_factory.mktemp("dashboard")
    with ExitStack() as stack:
        redis = stack.enter_context(redis_process())
        server = stack.enter_context(buddy_server(folder, redis.url))
        scraped = stack.enter_context(prometheus_scraping(server, folder))
        # A rate needs two samples of every series, so more requests come after a scrape of the first.
        num_requests = use(server)
        once_scraped(scraped, num_requests)
        yield once_scraped(scraped, num_requests + use(server))


def substituted(expression: str, tenant: str = ".*") -> str:
    """`expression` as Grafana sends it: with "All", the tenant variable's allValue."""
    sent = expression.replace("$tenant", tenant).replace("$__rate_interval", "2m")
    assert "$" not in sent
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("expression", [*EXPRESSIONS, *RECORDED])
def test_expression_has_finite_data_of_all_servers_together(prometheus: Prometheus, expression: str) -> None:
    found = prometheus.query(substituted(expression))
    assert found
    for series in found:
        assert "instance" not in series["metric"]
        assert math.isfinite(float(series["value"][1])), series


@pytest.mark.slow
@pytest.mark.parametrize("expression", [case for case in EXPRESSIONS if "$tenant" in str(case.values[0])])
def test_expression_is_by_tenant_and_follows_the_variable(prometheus: Prometheus, expression: str) -> None:
    for chosen, expected in ((".*", {"acme", "hobby"}), ("hobby", {"hobby"}), ("acme|hobby", {"acme", "hobby"})):
        found = prometheus.query(substituted(expression, chosen))
        assert {series["metric"].get("tenant") for series in found} == expected


@pytest.mark.slow
def test_rules_are_evaluated_and_no_alert_fires(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = prometheus.http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), 20)
    assert len(rules()) > len(RECORDED)
    for rule in rules():
        assert rule["health"] == "ok", rule
        assert rule.get("alerts", []) == []


@pytest.mark.slow
def test_panels_tell_the_truth(prometheus: Prometheus) -> None:
    """acme ran at 1 and 0.5; hobby's tier clamps both to 0.5."""
    [shares] = values_by_tenant(prometheus, "Share of layers executed")
    assert shares["hobby"] < shares["acme"] <= 1
    granted, requested = values_by_tenant(prometheus, "Mean budgets")
    assert granted == {"acme": pytest.approx(0.75), "hobby": pytest.approx(0.5)}
    assert requested == {"acme": pytest.approx(0.75), "hobby": pytest.approx(0.75)}
    [depths] = values_by_tenant(prometheus, "Mean layers per token")
    assert 0 < depths["hobby"] < depths["acme"]
    [shares] = values_by_tenant(prometheus, "Share of all layer-tokens")
    assert shares["hobby"] < shares["acme"]
    assert sum(shares.values()) == pytest.approx(1)
    for target in panel("Up")["targets"]:
        [series] = prometheus.query(target["expr"])
        assert series["value"][1] == "1"


def panel(title: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [shown for shown in PANELS if shown["title"] == title]
    [only] = found
    return only


def values_by_tenant(prometheus: Prometheus, title: str) -> list[dict[str, float]]:
    """The expressions of a panel, each by tenant."""
    found = [prometheus.query(substituted(target["expr"])) for target in panel(title)["targets"]]
    return [{series["metric"]["tenant"]: float(series["value"][1]) for series in each} for each in found]


@pytest.mark.slow
def test_tenant_variable_offers_the_tenants(prometheus: Prometheus) -> None:
    query = re.fullmatch(r"label_values\((\w+), (\w+)\)", VARIABLES["tenant"]["query"])
    assert query is not None
    assert prometheus.label_values(query[1], query[2]) == ["acme", "hobby"]
    assert VARIABLES["tenant"]["allValue"] == ".*"


def test_every_query_goes_to_the_chosen_datasource() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert VARIABLES["tenant"]["datasource"] == chosen
    for shown in PANELS:
        assert [shown["datasource"], *(target["datasource"] for target in shown["targets"])] == [chosen] * (
            1 + len(shown["targets"])
        )


def test_first_choice_of_datasource_is_the_provisioned_one() -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    [source] = provisioned["datasources"]
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == source["type"] == "prometheus"
    assert VARIABLES["datasource"]["current"]["value"] == source["uid"] == "buddy-prometheus"
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]


def test_dashboard_and_panels_have_fixed_ids_descriptions_and_units() -> None:
    assert DASHBOARD["uid"] == "buddy"
    assert "id" not in DASHBOARD
    ids = [shown["id"] for shown in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for shown in PANELS:
        assert shown["description"]
        assert shown["type"] == "stat" or shown["fieldConfig"]["defaults"]["unit"]


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for place in (shown["gridPos"] for shown in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
