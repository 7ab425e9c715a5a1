import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from end_to_end.tenant_site import Served, served, tenants

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "buddy-serve" / "test-clients"
HERE = Path(__file__).parent
PYTHON, NODE = HERE / "python", HERE / "node"

# These run in an environment of their own (test_python_clients.py).
collect_ignore = ["python"]

_QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


def alone() -> dict[str, str]:
    """The environment of a client that talks to nobody but the server."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _QUIET


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
    """The interpreter of an environment that has the other Python clients; installed once for all runs."""
    folder, wanted = CACHE / "python", PYTHON / "requirements.txt"
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install = [[sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, "--requirement", str(wanted)]]
    _install_once(folder, wanted, install)
    return folder / "bin/python"


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder of the Node clients, installed once for all runs."""
    if not shutil.which("npm"):
        pytest.skip("NOT TESTED: the clients for Node need node and npm")
    folder, wanted = CACHE / "node", NODE / "package-lock.json"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(NODE / "package.json", folder)
    shutil.copy(wanted, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
    _install_once(folder, wanted, [command])
    return folder / "node_modules"


def _install_once(folder: Path, wanted: Path, commands: list[list[str]]) -> None:
    """Run `commands` unless they have been run for this version of the list `wanted`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    installed = folder / "installed"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if installed.exists() and installed.read_bytes() == wanted.read_bytes():
            return
        installed.unlink(missing_ok=True)
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        shutil.copy(wanted, installed)
