"""Replicas that come and go on a real Ray: with the load, and by an update of the application."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import httpx
import pytest

from buddy_process import NEEDS_RAY
from buddy_server.bench.served import served_shape
from child_processes import engines_of
from end_to_end.tenant_site import KEY_SECRET, Served, bearer, rows_of, tenants
from fakes.serving import wait_until

pytestmark = [NEEDS_RAY, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

SHAPE = "16x256"
VOCAB_SIZE = 4096
PROMPT_TOKENS = 8
LONGEST = 8000
"""Tokens of an answer, which the context holds."""
STREAM_S = 5.0
"""How long a stream takes, about: it slows down as it grows, and when others join it."""
LOOK_S = 0.25
FEW = 4
REPLICA_S = 120.0
"""Within which Ray Serve starts or ends a replica, on a machine that has more to do."""
NUM_STREAMS = 16
NUM_PLACES = 24
"""Of each engine: so that only the load that is meant to waits."""


@dataclass
class Answer:
    """A streamed completion, as far as it has come."""

    response_id: str = ""
    fingerprint: str = ""
    text: str = ""
    num_tokens: int | None = None
    is_done: bool = False
    error: str | None = None
    wanted: int = 0
    """Tokens that were asked for."""

    @property
    def is_whole(self) -> bool:
        return self.is_done and self.error is None and self.num_tokens == self.wanted

    def take(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.is_done = True
        elif data != line:
            chunk = json.loads(data)
            if "error" in chunk:
                self.error = chunk["error"]["message"]
                return
            self.response_id, self.fingerprint = chunk["id"], chunk["system_fingerprint"]
            self.text += "".join(choice["text"] for choice in chunk["choices"])
            if chunk.get("usage"):
                self.num_tokens = chunk["usage"]["completion_tokens"]


@dataclass
class Site(Served):
    """A server whose application can be updated (replicas_process.py)."""

    model: str = ""
    router: str = ""

    def launch(self) -> None:
        self.write_config()
        script = str(Path(__file__).parents[1] / "replicas_process.py")
        command = [sys.executable, script, "1", "2", str(self.config_file), str(self.port), self.model, self.router]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                process_group=0,
                env=environment | {"BUDDY_KEY_SECRET": KEY_SECRET},
            )

    def kill(self) -> None:
        super().kill()
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()

    def update(self, dtype: str) -> None:
        """Begin to update the application."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(f"{dtype}\n".encode())
        self.process.stdin.flush()

    @property
    def replicas(self) -> set[str]:
        """Names of those in the metrics."""
        return set(
            re.findall(r'^buddy_engine_up\{replica="(.*)"\}', self.http.get(f"{self.url}/metrics").text, re.MULTILINE)
        )

    @property
    def num_engines(self) -> int:
        assert self.process is not None
        return len(engines_of(self.process.pid))

    @property
    def running(self) -> list[float]:
        """Requests of each replica."""
        text = self.http.get(f"{self.url}/metrics").text
        return [float(num) for num in re.findall(r"^buddy_num_requests_running\{.*\} (.*)$", text, re.MULTILINE)]

    def complete(self, index: int, answer: Answer) -> None:
        """Receive the completion of a prompt of its own."""
        body = {
            "model": SHAPE,
            "prompt": [index % VOCAB_SIZE] * PROMPT_TOKENS,
            "max_tokens": answer.wanted,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        url = f"{self.url}/v1/completions"
        with self.http.stream("POST", url, json=body, headers=bearer("sk-acme"), timeout=120) as response:
            if response.status_code != httpx.codes.OK:
                answer.error = response.read().decode()
            for line in response.iter_lines():
                answer.take(line)

    def rows_of(self, answers: Sequence[Answer]) -> list[Any]:
        """Their rows of the ledger, which come to the store a moment later."""
        url, ids = self.config["store"]["url"], [answer.response_id for answer in answers]
        wait_until(lambda: set(ids) <= set(rows_of(url)), 10)
        rows = rows_of(url)
        return [rows[response_id] for response_id in ids]

    def num_tokens_in(self, seconds: float, num: int) -> int:
        """How many tokens each of `num` streams gets in this time, on this machine now."""
        began_s = monotonic()
        with Clients(self, num, 100):
            pass
        return min(int(100 * seconds / (monotonic() - began_s)), LONGEST)


class Clients:
    """So many at once, each with one stream after another. At the end of the context, those under way are received to
    their ends. The last client's answers have `num_tokens`, the first one's half of that, so that they do not all end
    together."""

    def __init__(self, site: Site, num: int, num_tokens: int) -> None:
        self._site, self._num, self._num_tokens = site, num, num_tokens
        self._enough = Event()
        self._asking = ThreadPoolExecutor(num)
        self.answers: list[Answer] = []
        """In the order they were asked for."""

    @property
    def num_begun(self) -> int:
        """Streams of which something has come, so that they have what they were admitted with."""
        return sum(bool(answer.response_id) for answer in list(self.answers))

    def __enter__(self) -> "Clients":
        self._futures = [self._asking.submit(self._ask, client) for client in range(self._num)]
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for future in self._futures:
            future.result()
        self._asking.shutdown()

    def _ask(self, client: int) -> None:
        wanted = self._num_tokens * (self._num + client + 1) // (2 * self._num)
        for index in count():
            self.answers.append(answer := Answer(wanted=wanted))
            self._site.complete(100 * client + index, answer)
            if self._enough.is_set():
                return


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("life")
    checkpoint = served_shape(SHAPE, folder)
    config = {
        "tiers": {"whole": {"default_budget": 1.0}, "half": {"max_budget": 0.5, "default_budget": 0.5}},
        "tenants": tenants({"acme": "whole"}),
        "store": {"url": f"sqlite:///{folder}/buddy.db"},
        "engine": {"max_sequences": NUM_PLACES, "kv_cache_gib": 1.0},
    }
    server = Site(folder, config, model=str(checkpoint.directory), router=checkpoint.router)
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.kill()


def test_replicas_come_with_the_load_and_go_without_losing_streams(site: Site) -> None:
    assert site.num_engines == 1
    num_tokens = site.num_tokens_in(STREAM_S, FEW)
    with Clients(site, 3 * NUM_PLACES, 100) as crowd:
        wait_until(lambda: site.sample("buddy_engine_up") >= 2, REPLICA_S, LOOK_S)
    with Clients(site, FEW, num_tokens) as few:
        # On both replicas, of which one is enough for them.
        wait_until(lambda: len(running := site.running) == 2 and min(running) > 0, REPLICA_S, LOOK_S)
        wait_until(lambda: site.num_engines == 1, REPLICA_S, LOOK_S)
    assert [answer for answer in crowd.answers + few.answers if not answer.is_whole] == []


def test_an_update_under_streams_loses_none_and_new_requests_are_answered(site: Site) -> None:
    num_tokens = site.num_tokens_in(STREAM_S, NUM_STREAMS)
    with Clients(site, NUM_STREAMS, num_tokens) as clients:
        wait_until(lambda: clients.num_begun >= NUM_STREAMS, REPLICA_S, LOOK_S)
        before = clients.answers[0].fingerprint
        site.update("float32")
        wait_until(lambda: {answer.fingerprint for answer in clients.answers} - {"", before}, REPLICA_S, LOOK_S)
        # The new engine answers while there are streams on the old one, which ends after them.
        assert [answer for answer in clients.answers if answer.fingerprint == before and not answer.is_done]
        wait_until(lambda: site.num_engines == 1, REPLICA_S, LOOK_S)
    assert [answer for answer in clients.answers if not answer.is_whole] == []
    after = clients.answers[-1].fingerprint
    assert {answer.fingerprint for answer in clients.answers} == {before, after}
    rows = site.rows_of(clients.answers)
    assert {row.outcome for row in rows} == {"finished"}
    assert [row.completion_tokens for row in rows] == [answer.wanted for answer in clients.answers]


def test_a_tenant_in_another_tier_keeps_its_streams_and_its_next_request_has_the_tier(site: Site) -> None:
    def granted() -> float:
        body = {"model": SHAPE, "prompt": [1, 2, 3], "max_tokens": 1}
        answer = site.http.post(f"{site.url}/v1/completions", json=body, headers=bearer("sk-acme"))
        return float(answer.json()["buddy"]["budget_granted"])

    with Clients(site, FEW, site.num_tokens_in(2 * STREAM_S, FEW)) as clients:
        wait_until(lambda: clients.num_begun >= FEW, REPLICA_S, LOOK_S)
        assert granted() == 1.0
        begun = [answer for answer in clients.answers if answer.response_id]
        site.config["tenants"] = tenants({"acme": "half"})
        site.write_config()
        wait_until(lambda: granted() == 0.5, 10, LOOK_S)
        kept = [answer for answer in begun if not answer.is_done]
    assert kept
    assert [answer for answer in clients.answers if not answer.is_whole] == []
    for answer, row in zip(kept, site.rows_of(kept), strict=True):
        assert row.milli_layers == 1000 * row.layers * (PROMPT_TOKENS + answer.wanted - 1)
