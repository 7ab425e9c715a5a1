"""The command as typed in a shell."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from buddy_process import BUDDY, free_port, serving
from buddy_routing.train.demo_plan import TEXTS
from buddy_server.cli import main
from buddy_server.engine.build import BUILD_ERRORS, build_engine
from buddy_server.engine.settings import EngineSettings


def buddy(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BUDDY, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_version_names_the_distribution() -> None:
    assert buddy("--version").stdout.startswith("buddy-serve ")


def test_a_server_whose_engine_cannot_be_built_says_why_in_one_line() -> None:
    ended = buddy("serve", "--port", str(free_port()), "--model", "no/such/place")
    assert ended.returncode == 1
    assert "model 'no/such/place' is neither a directory nor a hub id" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_replicas_without_ray_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the command sets for Ray is undone.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=re.escape("pip install 'buddy-serve[ray]'")):
        main(["serve", "--replicas", "2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "host '0.0.0.0' is reachable from other machines and no tenant has a key"),
        (["--chat-template", "missing.jinja"], "chat template missing.jinja: No such file"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--port", "99999"], "'99999' is no port, allowed are 1 to 65535"),
        *(
            (["--replicas", text], f"'{text}' is no number of replicas, allowed are a number of 1 and more, or two")
            for text in ("0", "0-3", "3-1", "1-", "-3", "1-2-3", "two")
        ),
    ],
)
def test_what_is_wrong_with_the_command_is_said_before_an_engine_is_built(
    refused: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert message in refused("serve", "--port", str(free_port()), *arguments)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("prior:best", "router 'prior:best' is unknown; allowed: a directory, prior:cosine, prior:ppl"),
        ("missing", "missing is not a router artifact: it has no router_config.json"),
    ],
)
def test_a_router_that_is_none_is_named(router: str, message: str) -> None:
    with pytest.raises(BUILD_ERRORS) as caught:
        build_engine(None, router, EngineSettings(), "cpu", "float32")
    assert message in str(caught.value)


def test_a_port_in_use_is_said_before_a_model_is_loaded(refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("serve", "--port", str(port))
    assert said == f"buddy serve: cannot listen on 127.0.0.1:{port}: Address already in use"


def test_chat_without_a_server_says_so(refused: Callable[..., str]) -> None:
    assert "no answer from http://127.0.0.1:9" in refused("chat", "--url", "http://127.0.0.1:9", "Hello!")


@pytest.mark.slow
@pytest.mark.parametrize("router", ["prior:cosine", "prior:ppl"])
def test_static_priors_serve_too(router: str) -> None:
    with serving("--router", router) as url:
        body = {"model": "buddy-7m", "messages": [{"role": "user", "content": "Hi"}], "budget": 0.5, "max_tokens": 9}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["buddy"]["layers_per_token"] == 8
        assert answer["buddy"]["distinct_paths"] == 1


def test_train_demo_names_a_data_directory_that_is_missing(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"--data {tmp_path} does not hold the texts" in refused("train", "demo", "--data", str(tmp_path))


def test_train_demo_refuses_a_start_that_it_cannot_use(refused: Callable[..., str], tmp_path: Path) -> None:
    for name in TEXTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    common = ("train", "demo", "--data", str(tmp_path))
    told = refused(*common, "--start", str(tmp_path))
    assert f"--start {tmp_path} is no earlier --out; missing: model, router" in told
    assert "--kept-share is 0.4, and there is no --start" in refused(*common, "--kept-share", "0.4")
    for name in ("model", "router"):
        (tmp_path / name).mkdir()
    told = refused(*common, "--start", str(tmp_path), "--out", str(tmp_path))
    assert f"--out {tmp_path} is --start, which it would overwrite" in told
