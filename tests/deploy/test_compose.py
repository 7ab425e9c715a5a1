"""The files of docker/ and deploy/ agree with each other and with the repository."""

import fnmatch
import re
import shutil
import subprocess
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from buddy_server.config import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def with_defaults(text: str) -> str:
    """`${NAME:-value}` as compose reads it when NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(service: str) -> dict[PurePosixPath, Path]:
    """Paths in the container to the paths of this repository that are mounted there."""
    split = [with_defaults(volume).split(":") for volume in SERVICES[service]["volumes"]]
    return {PurePosixPath(target): DEPLOY / source for source, target, *_ in split if source.startswith(".")}


def on_host(service: str, path: str) -> Path:
    """What the container finds at `path`, as a file of this repository."""
    for target, source in mounts(service).items():
        if PurePosixPath(path).is_relative_to(target):
            return source / PurePosixPath(path).relative_to(target)
    raise AssertionError(f"{service} mounts nothing at {path}")


def test_services_are_server_prometheus_and_grafana() -> None:
    assert set(SERVICES) == {"server", "prometheus", "grafana"}


@pytest.mark.parametrize("service", SERVICES)
def test_mounted_paths_exist(service: str) -> None:
    assert mounts(service)
    for source in mounts(service).values():
        assert source.exists()


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_on_the_loopback_by_default(service: str) -> None:
    assert all(with_defaults(port).startswith("127.0.0.1:") for port in SERVICES[service]["ports"])


def test_images_of_others_have_a_version() -> None:
    for service in ("prometheus", "grafana"):
        assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", SERVICES[service]["image"])


def test_server_runs_with_a_read_only_root() -> None:
    assert SERVICES["server"]["read_only"] is True
    assert SERVICES["server"]["tmpfs"] == ["/tmp"]


def test_image_finds_its_tenants_where_compose_mounts_them() -> None:
    default = re.search(r'^CMD \[.*"--config", "([^"]+)"\]$', DOCKERFILE, re.MULTILINE)
    assert default is not None
    config = load_config(on_host("server", default[1]))
    assert {tenant.name for tenant in config.tenants} == {"acme", "hobby"}
    assert not config.is_open
    gpu = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]["server"]
    assert default[1] in gpu["command"]


def test_build_uses_the_dockerfile_and_arguments_that_exist() -> None:
    build = SERVICES["server"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).read_text() == DOCKERFILE
    assert all(f"\nARG {name}=" in DOCKERFILE for name in build["args"])


def is_sent(path: str, patterns: list[str]) -> bool:
    """Whether `path` is part of the build context: the last pattern of .dockerignore that matches it decides."""
    sent = True
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        parts = path.split("/")
        prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        # In .dockerignore a star stops at a slash, and **/ is any folder or none.
        if any(
            fnmatch.fnmatch(prefix.rsplit("/", 1)[-1], glob[3:])
            if glob.startswith("**/")
            else prefix.count("/") == glob.count("/") and fnmatch.fnmatch(prefix, glob)
            for prefix in prefixes
        ):
            sent = pattern.startswith("!")
    return sent


def test_build_context_is_what_the_wheel_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for path in (
        *("pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]),
        *(f"{package}/__init__.py" for package in packages),
        "routing/buddy_routing/embedded/model/model.safetensors",
    ):
        assert is_sent(path, patterns), path
    for path in (
        *(".git/config", ".venv/bin/python", "build/notes", "tests/deploy", "deploy/tenants.example.yaml"),
        *(f"{package}/__pycache__/__init__.cpython-311.pyc" for package in packages),
    ):
        assert not is_sent(path, patterns), path


def test_grafana_is_provisioned_from_this_folder() -> None:
    provisioning = Path("/etc/grafana/provisioning")
    [provider] = yaml.safe_load(on_host("grafana", f"{provisioning}/dashboards/buddy.yaml").read_text())["providers"]
    dashboards = on_host("grafana", provider["options"]["path"])
    assert (dashboards / "buddy.json").is_file()
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert on_host("grafana", home) == dashboards / "buddy.json"


def test_prometheus_finds_its_config_and_the_server() -> None:
    [flag] = [part for part in SERVICES["prometheus"]["command"] if part.startswith("--config.file=")]
    config = yaml.safe_load(on_host("prometheus", flag.removeprefix("--config.file=")).read_text())
    [target] = config["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in SERVICES
    assert f"\nEXPOSE {port}\n" in DOCKERFILE


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")
def test_prometheus_config_passes_promtool() -> None:
    command = ["promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
