"""What clients see when the engine's process dies, and what signals do to it."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from buddy_process import Running, running
from child_processes import children_of, has_loaded, is_running
from fakes.serving import wait_until

START_TIMEOUT_S = 90.0
NUM_CLIENTS = 16
# No token ends the text before its time: these two would.
ENDLESS = {
    "model": "buddy-7m",
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "stream": True,
    "logit_bias": {"0": -100, "1": -100},
}
SHORT = {"model": "buddy-7m", "prompt": "Once upon a time", "max_tokens": 5}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running("--device", "cpu") as server:
        yield server


@dataclass(frozen=True)
class Stream:
    """The data of a stream, line by line, and when it ended."""

    lines: list[str]
    ended_s: float

    @property
    def error(self) -> dict[str, Any] | None:
        return None if self.lines[-1] == "[DONE]" else json.loads(self.lines[-1])["error"]


def read_stream(url: str, started: threading.Semaphore, max_tokens: int) -> Stream:
    """`started` is released at the first token."""
    lines = []
    body = {**ENDLESS, "max_tokens": max_tokens}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                if len(lines) == 2:
                    started.release()
    return Stream(lines, time.monotonic())


def engine_pid(server: Running) -> int:
    (pid,) = children_of(server.process.pid)
    return pid


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def test_the_server_itself_has_not_loaded_torch(server: Running) -> None:
    assert httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=60).status_code == 200
    assert has_loaded(engine_pid(server), "libtorch")
    assert not has_loaded(server.process.pid, "libtorch")


@pytest.mark.parametrize(("sent", "within_s", "num_restarts"), [(signal.SIGKILL, 5, 1), (signal.SIGSTOP, 10, 2)])
def test_sixteen_clients_hear_of_a_lost_engine_and_the_next_request_works(
    server: Running, sent: signal.Signals, within_s: float, num_restarts: int
) -> None:
    """One that is stopped is noticed by its silence."""
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        streams = [pool.submit(read_stream, server.url, started, 1000) for _ in range(NUM_CLIENTS)]
        for _ in range(NUM_CLIENTS):
            assert started.acquire(timeout=START_TIMEOUT_S)
        pid = engine_pid(server)
        os.kill(pid, sent)
        killed_s = time.monotonic()
        ended = [stream.result() for stream in streams]
    assert max(stream.ended_s for stream in ended) - killed_s < within_s
    errors = [stream.error for stream in ended if stream.error is not None]
    assert errors
    assert {error["code"] for error in errors} == {"not_ready"}
    wait_until(lambda: not is_running(pid))

    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert metric(server.url, "buddy_engine_up") == 0
    refused = httpx.post(f"{server.url}/v1/completions", json=SHORT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    # A load takes several seconds.
    assert int(refused.headers["retry-after"]) >= 2

    wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, START_TIMEOUT_S)
    answer = httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 5
    assert metric(server.url, "buddy_engine_up") == 1
    assert metric(server.url, "buddy_engine_restarts_total") == num_restarts


def test_an_open_budget_is_the_predictors(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={**SHORT, "budget": "auto"}, timeout=60)
    assert answer.json()["buddy"]["decided_by"] == "predictor"


def test_interrupt_from_a_terminal_lets_running_streams_finish(server: Running) -> None:
    """It reaches the whole group, the engine's process too. The last test here: it stops the server."""
    pid = engine_pid(server)
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read_stream, server.url, started, 300)
        assert started.acquire(timeout=START_TIMEOUT_S)
        os.killpg(server.process.pid, signal.SIGINT)
        assert stream.result().error is None
    server.process.wait(timeout=30)
    assert not is_running(pid)
