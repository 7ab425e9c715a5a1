"""`buddy serve` with tenants, limits and a ledger, as a process that tests may kill and start again."""

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from buddy_process import BUDDY
from buddy_server.bench.server_process import free_port
from child_processes import children_of
from fakes.serving import wait_until

ADMIN_KEY = "admin-key-of-the-tests-0123456789"
KEY_SECRET = "server-secret-of-the-tests-0123456789"
START_TIMEOUT_S = 90.0


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def tenants(tiers: dict[str, str]) -> dict[str, Any]:
    """The `tenants` of a configuration: each in its tier, with the key `sk-<name>`."""
    return {name: {"tier": tier, "key_sha256": [digest(f"sk-{name}")]} for name, tier in tiers.items()}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@dataclass
class Served:
    """A server process. Its log is in `folder`, as is its configuration, which may be rewritten."""

    folder: Path
    config: dict[str, Any]
    name: str = "server"
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def config_file(self) -> Path:
        return self.folder / f"{self.name}.yaml"

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    def write_config(self) -> None:
        self.config_file.write_text(yaml.safe_dump(self.config))

    def start(self) -> None:
        """Return when it is ready."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        self.write_config()
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {"BUDDY_ADMIN_KEY": ADMIN_KEY, "BUDDY_KEY_SECRET": KEY_SECRET}
        command = [BUDDY, "serve", "--port", str(self.port), "--config", str(self.config_file)]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, process_group=0, env=environment)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            try:
                if httpx.get(f"{self.url}/ready").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"the server was not ready within {START_TIMEOUT_S} s:\n{self.log}")

    @property
    def engine_pid(self) -> int:
        assert self.process is not None
        return children_of(self.process.pid)[0]

    def replace_engine(self) -> None:
        """Kill the engine's process, and return when there is another."""
        os.kill(self.engine_pid, signal.SIGKILL)
        wait_until(lambda: httpx.get(f"{self.url}/ready").status_code != httpx.codes.OK)
        self.wait_until_ready()

    def kill(self) -> None:
        """Of both processes, and at once."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """As an operator would."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)
        assert "Traceback" not in self.log, self.log

    def admin(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}/admin{path}", headers=bearer(ADMIN_KEY), timeout=10, **arguments)

    def ask(self, key: str, **fields: Any) -> httpx.Response:
        """A chat completion that is not streamed, with `fields` over the smallest body."""
        body = {"model": "buddy-7m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | fields
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=bearer(key), timeout=60)


@contextmanager
def served(folder: Path, config: dict[str, Any], name: str = "server") -> Iterator[Served]:
    """A ready server, stopped at the end."""
    site = Served(folder, config, name)
    site.start()
    try:
        yield site
        site.stop()
    finally:
        if site.process is not None and site.process.poll() is None:
            site.kill()
