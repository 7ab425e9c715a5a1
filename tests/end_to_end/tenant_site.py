"""`buddy serve` with tenants, limits and a ledger, as a process that tests may kill and start again."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select

from buddy_process import BUDDY
from buddy_server.bench.server_process import free_port
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.tables import ledger
from child_processes import children_of
from fakes.serving import wait_until

ADMIN_KEY = "admin-key-of-the-tests-0123456789"
KEY_SECRET = "server-secret-of-the-tests-0123456789"
START_TIMEOUT_S = 300.0
LONG: dict[str, Any] = {"max_tokens": 900, "n": 8, "budget": 1.0, "logit_bias": {"0": -100, "1": -100}}
"""Fields of a request that takes seconds: no answer may end before its last token."""


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def tenants(tiers: dict[str, str]) -> dict[str, Any]:
    """The `tenants` of a configuration: each in its tier, with the key `sk-<name>`."""
    return {name: {"tier": tier, "key_sha256": [digest(f"sk-{name}")]} for name, tier in tiers.items()}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def rows_of(url: str) -> dict[str, Any]:
    """The ledger in the store at `url`, by id."""

    async def read() -> dict[str, Any]:
        database = Database(url)
        try:
            async with database.reading() as connection:
                return {row.id: row for row in await connection.execute(select(ledger))}
        finally:
            await database.close()

    return asyncio.run(read())


@dataclass
class Streamed:
    """What a client has received of a streamed response."""

    response_id: str = ""
    num_tokens: int = 0
    layer_tokens: float | None = None
    is_done: bool = False

    def take(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.is_done = True
        elif data != line:
            chunk = json.loads(data)
            assert "error" not in chunk, chunk
            self.response_id = chunk["id"]
            for choice in chunk["choices"]:
                self.num_tokens += len((choice["logprobs"] or {}).get("content") or [])
            if "buddy" in chunk:
                self.layer_tokens = chunk["buddy"]["layer_tokens"]


def _client() -> httpx.Client:
    """It keeps no connection, which a server that is killed would break."""
    return httpx.Client(timeout=60, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass
class Served:
    """A server process. Its log is in `folder`, as is its configuration, which may be rewritten."""

    folder: Path
    config: dict[str, Any]
    name: str = "server"
    admin_key: str | None = ADMIN_KEY
    arguments: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    command: tuple[str, ...] = ()
    """In place of `buddy serve`."""
    process: "subprocess.Popen[bytes] | None" = None
    http: httpx.Client = field(default_factory=_client, repr=False)

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
        environment["BUDDY_KEY_SECRET"] = KEY_SECRET
        if self.admin_key is not None:
            environment["BUDDY_ADMIN_KEY"] = self.admin_key
        serve = (BUDDY, "serve", "--port", str(self.port), "--config", str(self.config_file), *self.arguments)
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(self.command or serve, stderr=log, process_group=0, env=environment)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            try:
                if self.http.get(f"{self.url}/ready").status_code == httpx.codes.OK:
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
        wait_until(lambda: self.http.get(f"{self.url}/ready").status_code != httpx.codes.OK)
        self.wait_until_ready()

    def kill(self) -> None:
        """Of both processes, and at once, unless it has ended."""
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        """As an operator would."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)
        assert "Traceback" not in self.log, self.log

    def admin(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return self.http.request(method, f"{self.url}/admin{path}", headers=bearer(ADMIN_KEY), **arguments)

    def ask(self, key: str, **fields: Any) -> httpx.Response:
        """A chat completion that is not streamed, with `fields` over the smallest body."""
        return self.http.post(f"{self.url}/v1/chat/completions", json=_body(fields), headers=bearer(key))

    def stream(self, key: str, got: Streamed, leave: Callable[[], bool] = lambda: False, **fields: Any) -> None:
        """Receive a streamed chat completion into `got`, as far as it comes or until `leave` says so."""
        body = _body(fields) | {"stream": True, "logprobs": True}
        url, headers = f"{self.url}/v1/chat/completions", bearer(key)
        with self.http.stream("POST", url, json=body, headers=headers) as response:
            assert response.status_code == httpx.codes.OK, response.read()
            for line in response.iter_lines():
                got.take(line)
                if leave():
                    return

    def sample(self, name: str, **labels: str) -> float:
        """The sum of a metric over the series that have `labels`."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.http.get(f"{self.url}/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def _body(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "buddy-7m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | fields


@contextmanager
def served(folder: Path, config: dict[str, Any], name: str = "server", *arguments: str) -> Iterator[Served]:
    """A ready server, stopped at the end. `arguments` go to `buddy serve`."""
    site = Served(folder, config, name, arguments=arguments)
    site.start()
    try:
        yield site
        site.stop()
    finally:
        site.kill()
