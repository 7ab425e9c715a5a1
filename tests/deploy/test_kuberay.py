"""The manifest for KubeRay, against what it must agree with. Nothing here talks to a cluster."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from buddy_server.replicas.scaling import Scaling

ROOT = Path(__file__).parents[2]
RAY = ROOT / "deploy" / "ray"
SERVE: dict[str, Any] = yaml.safe_load((RAY / "serve.yaml").read_text())
SERVICE: dict[str, Any] = yaml.safe_load((RAY / "kuberay.yaml").read_text())["spec"]
CLUSTER: dict[str, Any] = SERVICE["rayClusterConfig"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
PODS: dict[str, Any] = {
    "head": CLUSTER["headGroupSpec"]["template"]["spec"],
    "worker": WORKERS["template"]["spec"],
}
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def test_application_is_that_of_the_serve_config_file() -> None:
    assert yaml.safe_load(SERVICE["serveConfigV2"]) == SERVE


def test_policy_of_the_config_file_is_ours() -> None:
    (application,) = SERVE["applications"]
    (engines,) = application["deployments"]
    policy = engines["autoscaling_config"]["policy"]["policy_function"]
    assert policy == f"{Scaling.__module__}:{Scaling.__qualname__}"


def test_ray_is_the_version_that_the_image_installs() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert CLUSTER["rayVersion"] == pinned[1]


@pytest.mark.parametrize("pod", PODS)
def test_pods_run_the_images_user_and_keep_what_it_writes(pod: str) -> None:
    spec = PODS[pod]
    assert f"--uid {spec['securityContext']['runAsUser']} " in DOCKERFILE
    (container,) = spec["containers"]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounted.values()) == {volume["name"] for volume in spec["volumes"]}
    folders = re.search(r"mkdir --parents (.*) \\", DOCKERFILE)
    assert folders is not None
    assert set(mounted) == set(folders[1].split())


@pytest.mark.parametrize("pod", PODS)
def test_secrets_are_references(pod: str) -> None:
    (container,) = PODS[pod]["containers"]
    environment = {entry["name"]: entry for entry in container["env"]}
    for name in ("BUDDY_KEY_SECRET", "BUDDY_ADMIN_KEY", "PGPASSWORD"):
        assert environment[name]["valueFrom"]["secretKeyRef"]["key"] == name
        assert "value" not in environment[name]


def test_all_replicas_fit_on_the_workers_while_an_update_adds_one() -> None:
    (application,) = SERVE["applications"]
    (engines,) = application["deployments"]
    (container,) = PODS["worker"]["containers"]
    num_cpus = WORKERS["maxReplicas"] * int(container["resources"]["limits"]["cpu"])
    assert num_cpus >= (engines["autoscaling_config"]["max_replicas"] + 1) * engines["ray_actor_options"]["num_cpus"]
