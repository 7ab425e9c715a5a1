"""What a Serve config file may ask for."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from buddy_process import NEEDS_RAY
from buddy_server.errors import ConfigError

# Ray says at its import what is deprecated in it.
pytestmark = [NEEDS_RAY, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

REDIS = {"url": "redis://127.0.0.1:1"}
TENANT = {"tiers": {"free": {}}, "tenants": {"acme": {"tier": "free", "key_sha256": ["0" * 64]}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "limits.url: several ingresses need limits in Redis"),
        (
            {"limits": REDIS, "store": {"url": "sqlite:///buddy.db"}},
            "store.url: several ingresses need a store in Postgre",
        ),
    ],
)
def test_several_ingresses_need_stores_that_they_share(tmp_path: Path, config: dict[str, object], message: str) -> None:
    from buddy_server.replicas.application import Arguments, build

    file = tmp_path / "tenants.yaml"
    file.write_text(yaml.safe_dump(TENANT | config))
    with pytest.raises(ConfigError, match=message):
        build(Arguments(config=file, ingresses=2))
    build(Arguments(config=file, ingresses=1))
    file.write_text(yaml.safe_dump(TENANT | {"limits": REDIS}))
    build(Arguments(config=file, ingresses=2))


def test_there_is_at_least_one_ingress() -> None:
    from buddy_server.replicas.application import Arguments

    with pytest.raises(ValidationError, match="greater than 0"):
        Arguments(ingresses=0)
