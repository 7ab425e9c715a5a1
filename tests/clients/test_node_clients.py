"""Clients for Node, unmodified. Their tests are in node/, one file a client."""

import subprocess
from pathlib import Path

import pytest

from clients.environments import NODE, client_variables
from end_to_end.tenant_site import Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("file", sorted(path.name for path in NODE.glob("*.test.mjs")))
def test_node_client(file: str, site: Served, node_modules: Path, tmp_path: Path) -> None:
    # Node looks for packages beside the file that imports them.
    (tmp_path / file).write_bytes((NODE / file).read_bytes())
    (tmp_path / "node_modules").symlink_to(node_modules)
    command = ["node", "--test", "--test-reporter=tap", str(tmp_path / file)]
    variables = client_variables(SERVER_URL=site.url)
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\n# fail 0\n" in ran.stdout
    assert "\n# pass 0\n" not in ran.stdout
