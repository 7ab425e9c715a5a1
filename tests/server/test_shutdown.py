"""What SIGTERM does to running streams."""

import json
import signal
import socket
import subprocess
import sys

import httpx

from fakes.engine import INFO
from fakes.serving import wait_until


def is_alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def lines_around_sigterm(grace_period_s: float) -> list[str]:
    """The lines of a stream of about 1.2 s whose server gets SIGTERM after the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "fakes.streaming_server", str(port), str(grace_period_s)]
    server = subprocess.Popen(command, env={"PYTHONPATH": ":".join(sys.path)})
    try:
        wait_until(lambda: is_alive(url), timeout_s=30)
        body = {"model": INFO.model_id, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=10) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert server.wait(timeout=5) in (0, -signal.SIGTERM)
        return rest
    finally:
        server.kill()
        server.wait()


def test_running_stream_is_finished_before_the_server_leaves() -> None:
    assert lines_around_sigterm(grace_period_s=5)[-1] == "data: [DONE]"


def test_stream_that_outlasts_the_grace_period_ends_with_an_error() -> None:
    error = json.loads(lines_around_sigterm(grace_period_s=0.2)[-1].removeprefix("data: "))["error"]
    assert error["code"] == "not_ready"
