"""Clients for Python that need an environment of their own, unmodified. Their tests are in python/, one file a client."""

import os
import subprocess
from pathlib import Path

import pytest

from clients.conftest import PYTHON
from end_to_end.tenant_site import Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUIET = {
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
}
"""The clients talk to the server alone."""


@pytest.mark.parametrize("file", sorted(path.name for path in PYTHON.glob("test_*.py")))
def test_python_client(file: str, site: Served, client_python: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= QUIET | {"SERVER_URL": site.url}
    command = [client_python, "-m", "pytest", "-c", PYTHON / "pytest.ini", "--rootdir", PYTHON, PYTHON / file]
    ran = subprocess.run(command, env=environment, cwd=PYTHON, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
