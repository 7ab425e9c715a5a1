"""Clients for Python in an environment of their own, unmodified. Their tests are in python/, one file a client."""

import subprocess
from pathlib import Path

import pytest

from clients.environments import PYTHON, client_variables
from end_to_end.tenant_site import Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("file", sorted(path.name for path in PYTHON.glob("test_*.py")))
def test_python_client(file: str, site: Served, client_python: Path) -> None:
    command = [client_python, "-m", "pytest", "-c", PYTHON / "pytest.ini", PYTHON / file]
    variables = client_variables(SERVER_URL=site.url)
    ran = subprocess.run(command, env=variables, cwd=PYTHON, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
