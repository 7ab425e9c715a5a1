"""`buddy serve` as users start it: a process of its own, from the installed command."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import httpx
import pytest

from buddy_server.bench.server_process import free_port

BUDDY = str(Path(sys.executable).with_name("buddy"))
START_TIMEOUT_S = 300
"""Ray starts a dozen processes."""
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: the extra [ray]")


@dataclass(frozen=True)
class Running:
    """A server that takes work."""

    url: str
    process: "subprocess.Popen[bytes]"


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """A running server's URL. It is stopped, and must stop cleanly, at the end."""
    with running(*arguments) as server:
        yield server.url


@contextmanager
def running(*arguments: str) -> Iterator[Running]:
    """The same with its process, the first of a group of its own."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # A file, not a pipe: nobody reads while the server runs, and a full pipe would stop it.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        command = [BUDDY, "serve", "--port", str(port), *arguments]
        # On all cores, as users have it, where the tests themselves keep to one.
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(command, stderr=log, process_group=0, env=environment)
        try:
            _wait_until_ready(url, process, log)
            yield Running(url, process)
        finally:
            process.terminate()
            process.wait(timeout=60)
        # uvicorn hands the signal on once everything has been shut down.
        assert process.returncode in (0, -signal.SIGTERM, 130), f"ended with {process.returncode}:\n{_text(log)}"
        assert "Traceback" not in _text(log), _text(log)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: IO[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server did not start:\n{_text(log)}"
        try:
            if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server was not ready within {START_TIMEOUT_S} s:\n{_text(log)}")


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read()
