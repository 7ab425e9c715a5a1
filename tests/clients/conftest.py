import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from clients.environments import installed_node_modules, installed_python
from end_to_end.tenant_site import Served, served, tenants

# These run in an environment of their own (test_python_clients.py).
collect_ignore = ["python"]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded model for tenants `open`, `full` (budget 1.0), `single` (one request at a time) and `spent` (no
    quota worth speaking of), whose keys are `sk-<name>`."""
    folder = tmp_path_factory.mktemp("clients")
    config = {
        "tiers": {
            "open": {},
            "full": {"default_budget": 1.0},
            "single": {"max_concurrent_requests": 1},
            "spent": {"layer_tokens_per_month": 1},
        },
        "tenants": tenants({name: name for name in ("open", "full", "single", "spent")}),
        "store": {"url": f"sqlite:///{folder}/buddy.db"},
    }
    with served(folder, config, "server", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def client(site: Served) -> Iterator[openai.OpenAI]:
    """The official client. It raises for every response that its own types do not allow."""
    with openai.OpenAI(
        base_url=f"{site.url}/v1", api_key="sk-open", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="session")
def client_python() -> Path:
    """The interpreter of the environment that has the other Python clients."""
    return installed_python()


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder of the clients for Node."""
    if not shutil.which("npm"):
        pytest.skip("NOT TESTED: the clients for Node need node and npm")
    return installed_node_modules()
