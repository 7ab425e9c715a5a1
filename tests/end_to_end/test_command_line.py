"""The command as typed in a shell."""

import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from buddy_process import BUDDY, free_port, serving


def buddy(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BUDDY, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_version_names_the_distribution() -> None:
    assert buddy("--version").stdout.startswith("buddy-serve ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/place"], "model 'no/such/place' is neither a directory nor a hub id"),
        (["--router", "prior:best"], "router 'prior:best' is unknown; allowed: a directory, prior:cosine, prior:ppl"),
        (["--router", "missing"], "missing is not a router artifact: it has no router_config.json"),
        (["--host", "0.0.0.0"], "host '0.0.0.0' is reachable from other machines and no tenant has a key"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(arguments: list[str], message: str) -> None:
    ended = buddy("serve", "--port", str(free_port()), *arguments)
    assert ended.returncode == 1
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_said_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = buddy("serve", "--port", str(port))
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [f"buddy serve: cannot listen on 127.0.0.1:{port}: Address already in use"]


def test_a_port_that_is_none_is_named() -> None:
    ended = buddy("serve", "--port", "99999")
    assert ended.returncode == 2
    assert "'99999' is no port, allowed are 1 to 65535" in ended.stderr


def test_chat_shows_the_answer_and_its_layers() -> None:
    with serving() as url:
        ended = buddy("chat", "--url", url, "--budget", "0.5", "Hello!")
        assert ended.stdout.strip()
        assert "8 of 16 layers per token" in ended.stderr
        refused = buddy("chat", "--url", url, "--budget", "7", "Hello!")
        assert refused.returncode == 1
        assert "buddy chat: " in refused.stderr
        assert "7" in refused.stderr


def test_chat_without_a_server_says_so() -> None:
    ended = buddy("chat", "--url", "http://127.0.0.1:9", "Hello!")
    assert ended.returncode == 1
    assert "no answer from http://127.0.0.1:9" in ended.stderr


@pytest.mark.parametrize("router", ["prior:cosine", "prior:ppl"])
def test_static_priors_serve_too(router: str) -> None:
    with serving("--router", router) as url:
        body = {"model": "buddy-7m", "messages": [{"role": "user", "content": "Hi"}], "budget": 0.5, "max_tokens": 9}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["buddy"]["layers_per_token"] == 8
        assert answer["buddy"]["distinct_paths"] == 1


def test_train_demo_names_a_data_directory_that_is_missing(tmp_path: Path) -> None:
    ended = buddy("train", "demo", "--data", str(tmp_path))
    assert ended.returncode == 1
    assert f"--data {tmp_path} does not hold the texts" in ended.stderr
