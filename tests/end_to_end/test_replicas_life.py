"""Replicas that come and go on a real Ray: with the load, and by an update of the application."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
LONGEST = 8000
"""Tokens of an answer, which the context holds."""
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

    def complete(self, index: int, answer: Answer, max_tokens: int, leave: Event | None = None) -> Answer:
        """Receive the completion of a prompt of its own, to its end or until the client leaves."""
        body = {
            "model": SHAPE,
            "prompt": [index % VOCAB_SIZE] * 8,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        url = f"{self.url}/v1/completions"
        with self.http.stream("POST", url, json=body, headers=bearer("sk-acme"), timeout=120) as response:
            if response.status_code != httpx.codes.OK:
                answer.error = response.read().decode()
            for line in response.iter_lines():
                answer.take(line)
                if leave is not None and leave.is_set():
                    break
        return answer

    def rows_of(self, answers: Sequence[Answer]) -> list[Any]:
        """Their rows of the ledger, which come to the store a moment later."""
        url, ids = self.config["store"]["url"], [answer.response_id for answer in answers]
        wait_until(lambda: set(ids) <= set(rows_of(url)), 10)
        rows = rows_of(url)
        return [rows[response_id] for response_id in ids]

    def num_tokens_in(self, seconds: float, pool: ThreadPoolExecutor, num: int) -> int:
        """How many tokens each of `num` streams gets in this time, on this machine now."""
        began_s = monotonic()
        for stream in self.streams(pool, num, 100):
            stream.result()
        return min(int(100 * seconds / (monotonic() - began_s)), LONGEST)

    def streams(self, pool: ThreadPoolExecutor, num: int, max_tokens: int) -> "list[Future[Answer]]":
        """Streams that have begun."""
        answers = [Answer() for _ in range(num)]
        futures = [pool.submit(self.complete, 1000 + index, one, max_tokens) for index, one in enumerate(answers)]
        wait_until(lambda: all(one.text or one.error for one in answers), 60)
        return futures


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
    enough = Event()

    def ask_again(client: int) -> None:
        for index in count():
            answer = site.complete(2000 + 100 * client + index, Answer(), 500, leave=enough)
            assert answer.error is None
            if enough.is_set():
                return

    with ThreadPoolExecutor(4 * NUM_PLACES) as pool:
        num_tokens = site.num_tokens_in(20.0, pool, 4)
        asking = [pool.submit(ask_again, client) for client in range(3 * NUM_PLACES)]
        wait_until(lambda: site.sample("buddy_engine_up") >= 2, REPLICA_S, 0.5)
        enough.set()
        for one in asking:
            one.result()
        wait_until(lambda: site.sample("buddy_num_requests_running") == 0, 30)
        # On both replicas, of which one is enough for them.
        streams = site.streams(pool, 4, num_tokens)
        wait_until(lambda: site.sample("buddy_num_requests_running") == 4, 10)
        assert [site.sample("buddy_num_requests_running", replica=name) for name in site.replicas] == [2, 2]
        wait_until(lambda: site.num_engines == 1, REPLICA_S, 0.5)
        ended = [stream.result() for stream in streams]
    assert all(answer.num_tokens == num_tokens and answer.is_done for answer in ended), ended


def test_an_update_under_streams_loses_none_and_new_requests_are_answered(site: Site) -> None:
    enough = Event()

    asked: list[tuple[Answer, int]] = []
    """Answers to new requests, and how many streams were still under way then."""

    def ask_meanwhile() -> None:
        while not enough.is_set():
            answer = site.complete(len(asked), Answer(), 4)
            asked.append((answer, sum(not stream.done() for stream in streams)))

    with ThreadPoolExecutor(NUM_STREAMS + 1) as pool:
        num_tokens = site.num_tokens_in(60.0, pool, NUM_STREAMS)
        streams = site.streams(pool, NUM_STREAMS, num_tokens)
        meanwhile = pool.submit(ask_meanwhile)
        site.update("bfloat16")
        ended = [stream.result() for stream in streams]
        wait_until(lambda: len({answer.fingerprint for answer, _ in list(asked)}) == 2, REPLICA_S)
        enough.set()
        meanwhile.result()
    assert all(answer.num_tokens == num_tokens and answer.is_done for answer in ended), ended
    assert all(answer.num_tokens == 4 and answer.is_done for answer, _ in asked), asked
    before, after = ended[0].fingerprint, asked[-1][0].fingerprint
    assert before != after
    assert {answer.fingerprint for answer in ended} == {before}
    # The new engine answered while all streams were still on the old one.
    assert NUM_STREAMS in {num_left for answer, num_left in asked if answer.fingerprint == after}
    assert {answer.fingerprint for answer, _ in asked} == {before, after}
    rows = site.rows_of([*ended, *(answer for answer, _ in asked)])
    assert {row.outcome for row in rows} == {"finished"}
    assert [row.completion_tokens for row in rows[:NUM_STREAMS]] == [num_tokens] * NUM_STREAMS
    wait_until(lambda: site.num_engines == 1, REPLICA_S, 0.5)


def test_a_tenant_in_another_tier_keeps_its_streams_and_its_next_request_has_the_tier(site: Site) -> None:
    def granted() -> float:
        body = {"model": SHAPE, "prompt": [1, 2, 3], "max_tokens": 1}
        answer = site.http.post(f"{site.url}/v1/completions", json=body, headers=bearer("sk-acme"))
        return float(answer.json()["buddy"]["budget_granted"])

    with ThreadPoolExecutor(4) as pool:
        num_tokens = site.num_tokens_in(15.0, pool, 4)
        streams = site.streams(pool, 4, num_tokens)
        assert granted() == 1.0
        site.config["tenants"] = tenants({"acme": "half"})
        site.write_config()
        wait_until(lambda: granted() == 0.5, 10)
        assert not any(stream.done() for stream in streams)
        ended = [stream.result() for stream in streams]
    assert all(answer.num_tokens == num_tokens and answer.is_done for answer in ended), ended
    assert all(row.milli_layers == 1000 * row.layers * (8 + num_tokens - 1) for row in site.rows_of(ended))
