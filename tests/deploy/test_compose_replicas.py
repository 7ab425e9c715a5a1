"""compose.replicas.yaml: what it adds, and that HAProxy and Prometheus find the servers."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
HAPROXY = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()


class ComposeLoader(yaml.SafeLoader):
    """Reads `!reset`, Compose's tag for what an override takes back, as None."""


ComposeLoader.add_constructor("!reset", lambda *_: None)

OVERRIDE: dict[str, Any] = yaml.load((DEPLOY / "compose.replicas.yaml").read_text(), ComposeLoader)["services"]
BASE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
STORES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.tenancy.yaml").read_text())["services"]


def prometheus_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())
    return config


def test_balancer_takes_the_place_of_the_server_and_is_the_way_in() -> None:
    assert OVERRIDE["server"]["ports"] is None
    assert OVERRIDE["balancer"]["ports"] == BASE["server"]["ports"]
    assert "\n    bind :8000\n" in HAPROXY
    assert OVERRIDE["balancer"]["depends_on"] == ["server"]


def test_balancer_has_a_version_and_a_read_only_root_without_capabilities() -> None:
    balancer = OVERRIDE["balancer"]
    assert re.fullmatch(r"haproxy:\d+\.\d+\.\d+", balancer["image"])
    assert (balancer["read_only"], balancer["cap_drop"]) == (True, ["ALL"])
    assert balancer["stop_grace_period"] == BASE["server"]["stop_grace_period"]


def test_balancer_reads_the_configuration_where_its_image_looks_for_it() -> None:
    [mount] = OVERRIDE["balancer"]["volumes"]
    source, target, mode = mount.split(":")
    assert (DEPLOY / source / "haproxy.cfg").read_text() == HAPROXY
    assert (target, mode) == ("/usr/local/etc/haproxy", "ro")


def test_balancer_and_prometheus_find_every_server_by_the_name_of_the_service() -> None:
    [(count, host, port)] = re.findall(r"server-template \S+ (\d+) (\w+):(\d+) resolvers docker", HAPROXY)
    [scrape] = prometheus_config("replicas.yml")["scrape_configs"]
    [found] = scrape["dns_sd_configs"]
    assert host in BASE
    assert (found["names"], found["type"], found["port"]) == ([host], "A", int(port))
    [default] = re.findall(r"^\$\{BUDDY_REPLICAS:-(\d+)\}$", OVERRIDE["server"]["deploy"]["replicas"])
    assert 2 <= int(default) <= int(count)


def test_servers_share_the_folder_of_their_journals() -> None:
    assert "state:/var/lib/buddy" in STORES["server"]["volumes"]
    assert "volumes" not in OVERRIDE["server"]


@pytest.mark.parametrize("name", ["replicas.yml", "kubernetes.yml"])
def test_configs_of_prometheus_differ_in_how_servers_are_found_alone(name: str) -> None:
    base, other = prometheus_config("prometheus.yml"), prometheus_config(name)
    [before], [after] = base.pop("scrape_configs"), other.pop("scrape_configs")
    assert other == base
    assert after["job_name"] == before["job_name"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")
@pytest.mark.parametrize("name", ["replicas.yml", "kubernetes.yml"])
def test_configs_of_prometheus_pass_promtool(name: str, tmp_path: Path) -> None:
    config = prometheus_config(name)
    [scrape] = config["scrape_configs"]
    # Debian's Prometheus is built without Kubernetes.
    if scrape.pop("kubernetes_sd_configs", None):
        scrape["static_configs"] = [{"targets": ["localhost:8000"]}]
    config["rule_files"] = [str(DEPLOY / "prometheus" / pattern) for pattern in config["rule_files"]]
    file = tmp_path / name
    file.write_text(yaml.safe_dump(config))
    checked = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_reads_the_configuration_for_replicas() -> None:
    [mount] = OVERRIDE["prometheus"]["volumes"]
    source, target, _ = mount.split(":")
    assert (DEPLOY / source).is_file()
    [flag] = [part for part in BASE["prometheus"]["command"] if part.startswith("--config.file=")]
    assert target == flag.removeprefix("--config.file=")
