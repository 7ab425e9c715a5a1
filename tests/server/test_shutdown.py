"""What SIGTERM does to running streams."""

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


def test_running_stream_is_finished_before_the_server_leaves() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "fakes.streaming_server", str(port)]
    server = subprocess.Popen(command, env={"PYTHONPATH": ":".join(sys.path)})
    try:
        wait_until(lambda: is_alive(url), timeout_s=15)
        body = {"model": INFO.model_id, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=10) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.wait(timeout=5) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
