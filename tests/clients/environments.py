"""Where clients are installed that cannot share the environment of the tests: once, for all runs."""

import os
import sys
from pathlib import Path

from installed_once import CACHE, install_once

PYTHON = Path(__file__).with_name("python")
NODE = Path(__file__).with_name("node")
_CACHE = CACHE / "test-clients"
_OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


def client_variables(**more: str) -> dict[str, str]:
    """The environment variables of a client that talks to the server alone."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _OFFLINE | more


def installed_python() -> Path:
    """The interpreter that has the clients of python/requirements.txt."""
    folder, wanted = _CACHE / "python", PYTHON / "requirements.txt"
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install_once(folder, wanted, [sys.executable, "-m", "venv", "--clear", folder], [*pip, "--requirement", wanted])
    return folder / "bin/python"


def installed_node_modules() -> Path:
    """The folder that has the clients of node/package-lock.json."""
    folder = _CACHE / "node"
    copy = ["cp", "--", NODE / "package.json", NODE / "package-lock.json", folder]
    npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", folder]
    install_once(folder, NODE / "package-lock.json", copy, npm)
    return folder / "node_modules"
