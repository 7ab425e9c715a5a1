"""A `buddy serve` process that the bench starts, and that always ends with it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import httpx

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 20
START_SERVER = "from buddy_server.cli import main; main()"


class ServerBenchError(ValueError):
    """A server that does not start, or answers that do not match their requests; the message states which."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    url: str
    pid: int


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[ServerProcess]:
    """A ready `buddy serve` with `arguments` on a free port; at the end it and all its children are gone.

    Raises ServerBenchError with the end of its log if it does not become ready.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", START_SERVER, "serve", "--host", "127.0.0.1", "--port", str(port), *arguments]
    # A file, not a pipe: nobody reads while the server runs, and a full pipe would block it.
    with tempfile.TemporaryFile() as log:
        # A separate session, so that Ctrl-C reaches only the bench, which then ends the server.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603
        try:
            _wait_until_ready(url, process, log)
            yield ServerProcess(url, process.pid)
        finally:
            _end(process)


def wait_until_answering(url: str, headers: dict[str, str]) -> str:
    """The id of the model that a ready server at `url` serves. Raises ServerBenchError."""
    try:
        httpx.get(f"{url}/ready").raise_for_status()
        answer = httpx.get(f"{url}/v1/models", headers=headers).raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerBenchError(f"no server is ready at {url}: {error}") from error


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerBenchError(f"the server did not start: {_last_lines(log)}")
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    raise ServerBenchError(f"the server was not ready within {START_TIMEOUT_S} s: {_last_lines(log)}")


def _last_lines(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
    return log.read().decode(errors="replace").strip() or "its log is empty"


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Kills children that outlived the server, or all processes if a second Ctrl-C interrupted the wait.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
