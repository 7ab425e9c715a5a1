"""The Serve config file, on a Ray of one machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from buddy_process import NEEDS_RAY
from buddy_server.bench.server_process import free_port
from end_to_end.tenant_site import bearer
from fakes.serving import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVE = str(Path(sys.executable).with_name("serve"))
SMALL = {"RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.01", "RAY_USAGE_STATS_ENABLED": "0"}

pytestmark = [NEEDS_RAY, pytest.mark.slow, pytest.mark.timeout(600)]


def test_serve_config_serves_the_example_tenants(tmp_path: Path) -> None:
    config = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (application,) = config["applications"]
    application["args"] |= {"config": str(DEPLOY / "tenants.example.yaml"), "device": "cpu"}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([SERVE, "run", str(file)], stdout=log, stderr=log, env=os.environ | SMALL)
    try:
        wait_until(lambda: process.poll() is not None or is_ready(url), 300, 0.5)
        assert process.poll() is None, (tmp_path / "log").read_text()
        body = {"model": "buddy-7m", "prompt": "Once upon a time", "max_tokens": 5}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == httpx.codes.UNAUTHORIZED
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=bearer("sk-example-hobby"))
        assert answer.json()["buddy"]["budget_granted"] == 0.5
        wait_until(lambda: httpx.get(f"{url}/metrics").text.count("buddy_engine_up{") == 2, 120, 0.5)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
