"""compose.tenancy.yaml: what it adds to compose.yaml, and that its parts agree with each other."""

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from buddy_server.config import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERRIDE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.tenancy.yaml").read_text())
SERVER: dict[str, Any] = OVERRIDE["services"]["server"]
STORES: dict[str, Any] = {name: service for name, service in OVERRIDE["services"].items() if name != "server"}
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
EXAMPLE = DEPLOY / "tenancy.example.yaml"


@pytest.mark.parametrize("store", STORES)
def test_stores_have_a_version_and_a_volume(store: str) -> None:
    assert re.fullmatch(rf"{store}:\d+\.\d+(\.\d+)?", STORES[store]["image"])
    [volume] = STORES[store]["volumes"]
    assert volume.split(":")[0] in OVERRIDE["volumes"]


@pytest.mark.parametrize("store", STORES)
def test_stores_are_reached_by_the_server_alone(store: str) -> None:
    assert "ports" not in STORES[store]
    assert STORES[store]["networks"] == ["stores"]
    assert OVERRIDE["networks"]["stores"] == {"internal": True}
    assert SERVER["networks"] == ["default", "stores"]


@pytest.mark.parametrize("store", STORES)
def test_stores_run_without_root_on_a_read_only_root_file_system(store: str) -> None:
    assert STORES[store]["read_only"] is True
    assert STORES[store]["cap_drop"] == ["ALL"]
    assert STORES[store]["user"] == store


def test_server_waits_until_every_store_is_healthy() -> None:
    assert SERVER["depends_on"] == {name: {"condition": "service_healthy"} for name in STORES}
    assert all("healthcheck" in store for store in STORES.values())


def test_secrets_come_from_the_environment_and_a_missing_one_is_named() -> None:
    secrets = {**SERVER["environment"], "POSTGRES_PASSWORD": STORES["postgres"]["environment"]["POSTGRES_PASSWORD"]}
    assert set(secrets) == {"PGPASSWORD", "BUDDY_ADMIN_KEY", "BUDDY_KEY_SECRET", "POSTGRES_PASSWORD"}
    told = (DEPLOY / "README.md").read_text()
    for value in secrets.values():
        reference = re.fullmatch(r"\$\{(\w+):\?deploy/README\.md says how to make it\}", value)
        assert reference is not None
        assert reference[1] in told


def test_example_takes_the_place_of_the_tenants_and_loads() -> None:
    mounted = next(volume for volume in SERVER["volumes"] if volume.endswith(":/etc/buddy/tenants.yaml:ro"))
    assert mounted.startswith("${BUDDY_TENANTS:-./tenancy.example.yaml}:")
    config = load_config(EXAMPLE)
    assert not config.is_open
    assert config.tenants == ()
    free, pro = config.tiers
    assert None not in (free.requests_per_minute, free.layer_tokens_per_month, free.elastic_floor)
    assert pro.weight > free.weight


def test_example_names_the_stores_and_holds_no_password() -> None:
    config = load_config(EXAMPLE)
    assert config.store is not None
    store, limits = urlsplit(config.store.url), urlsplit(config.limits.url)
    assert (store.hostname, limits.hostname) == ("postgres", "redis")
    assert store.password is None
    assert store.username == STORES["postgres"]["environment"]["POSTGRES_USER"]
    assert store.path == f"/{STORES['postgres']['environment']['POSTGRES_DB']}"


def test_journal_is_on_a_volume_that_the_server_may_write() -> None:
    config = load_config(EXAMPLE)
    assert config.store is not None
    assert config.store.journal is not None
    [state] = [volume for volume in SERVER["volumes"] if volume.split(":")[0] in OVERRIDE["volumes"]]
    folder = state.split(":")[1]
    assert PurePosixPath(config.store.journal).is_relative_to(folder)
    assert re.search(rf"chown buddy .*{folder}\n", DOCKERFILE)
