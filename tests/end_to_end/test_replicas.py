"""Two replicas of the engine on a real Ray: where requests go, and what becomes of everyone when a replica ends."""

import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from buddy_process import NEEDS_RAY
from child_processes import descendants_of, engines_of, is_running, parent_of
from end_to_end.tenant_site import LONG, Served, Streamed, bearer, rows_of, served, tenants
from fakes.serving import wait_until

pytestmark = [NEEDS_RAY, pytest.mark.slow, pytest.mark.timeout(600)]

REPLACED_S = 240.0
"""Within which Ray Serve starts another replica, on a machine that has more to do."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("replicas")
    config = {
        "tiers": {"free": {}, "limited": {"requests_per_minute": 10}},
        "tenants": tenants({"acme": "free", "hobby": "free", "limited": "limited"}),
        "store": {"url": f"sqlite:///{folder}/buddy.db"},
    }
    with served(folder, config, "server", "--replicas", "2", "--device", "cpu") as server:
        yield server


@dataclass
class Told:
    """A stream to its end: what it said, and the error that ended it."""

    got: Streamed = field(default_factory=Streamed)
    error: str | None = None


def engines(site: Served) -> list[int]:
    """Process ids of the replicas' engines."""
    assert site.process is not None
    return engines_of(site.process.pid)


def listen(site: Served, told: Told, **fields: Any) -> None:
    """As Served.stream, for one that may end with an error."""
    try:
        site.stream("sk-acme", told.got, **fields)
    except AssertionError as error:
        told.error = str(error)


def test_a_limit_holds_for_all_replicas_together(site: Served) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: site.ask("sk-limited").status_code, range(20)))
    assert sorted(answers) == [httpx.codes.OK] * 10 + [httpx.codes.TOO_MANY_REQUESTS] * 10


def test_an_answer_has_one_request_id_and_it_is_the_clients(site: Served) -> None:
    body = {"model": "buddy-7m", "prompt": "hi", "max_tokens": 2}
    headers = {**bearer("sk-acme"), "x-request-id": "mine"}
    answer = site.http.post(f"{site.url}/v1/completions", json=body, headers=headers)
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_second_requests_find_the_prefix_of_the_first_while_others_are_answered(site: Served) -> None:
    """Eight clients at a time, each prefix asked for twice, by whichever client comes to it."""
    draw = random.Random(0)
    prompts = [[draw.randrange(100, 1000) for _ in range(900)] for _ in range(24)]

    def cached(prompt: list[int]) -> int:
        body = {"model": "buddy-7m", "prompt": prompt, "max_tokens": 8, "budget": 1.0}
        answer = site.http.post(f"{site.url}/v1/completions", json=body, headers=bearer("sk-acme"))
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(cached, prompts))
        draw.shuffle(prompts)
        second = list(pool.map(cached, prompts))
    assert first == [0] * 24
    assert sum(num == 896 for num in second) >= 0.9 * 24
    # It is not that one replica does it all.
    executed = [site.sample("buddy_layers_executed_total", replica=name) for name in replicas(site)]
    assert min(executed) > 0.2 * sum(executed)


def replicas(site: Served) -> set[str]:
    """The names of the replicas in the metrics."""
    lines = site.http.get(f"{site.url}/metrics").text.splitlines()
    return {line.partition('replica="')[2].partition('"')[0] for line in lines if line.startswith("buddy_engine_up{")}


def cancelled(site: Served) -> dict[str, Any]:
    """The rows of the ledger with this outcome."""
    return {name: row for name, row in rows_of(site.config["store"]["url"]).items() if row.outcome == "cancelled"}


def test_metrics_of_all_replicas_come_in_one_scrape_and_add_up(site: Served) -> None:
    before = {name: site.sample(f"buddy_{name}_total") for name in ("layers_executed", "layer_tokens")}
    usages = [site.ask("sk-hobby", budget=0.5).json()["buddy"]["layer_tokens"] for _ in range(8)]
    assert len(replicas(site)) == 2
    assert site.sample("buddy_engine_up") == 2
    charged = site.sample("buddy_layer_tokens_total") - before["layer_tokens"]
    assert charged == pytest.approx(sum(usages))
    hobby = site.sample("buddy_layers_executed_total", tenant="hobby", tier="free")
    assert hobby == site.sample("buddy_layers_executed_total") - before["layers_executed"]
    assert hobby - site.sample("buddy_layers_uncharged_total", tenant="hobby") == pytest.approx(16 * sum(usages))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_its_request_in_the_replica(site: Served, streamed: bool) -> None:
    before = cancelled(site)
    if streamed:
        got = Streamed()
        site.stream("sk-acme", got, leave=lambda: got.num_tokens > 20, **LONG)
    else:
        body = {"model": "buddy-7m", "messages": [{"role": "user", "content": "hi"}], **LONG}
        with pytest.raises(httpx.ReadTimeout):
            site.http.post(f"{site.url}/v1/chat/completions", json=body, headers=bearer("sk-acme"), timeout=1)
    wait_until(lambda: site.sample("buddy_num_requests_running") == 0, 10)
    wait_until(lambda: len(cancelled(site)) > len(before), 10)
    (row,) = (row for name, row in cancelled(site).items() if name not in before)
    assert 0 < row.completion_tokens < LONG["n"] * LONG["max_tokens"]
    assert row.milli_layers >= 16000 * row.completion_tokens


@pytest.mark.parametrize("killed", ["the replica", "its engine"])
def test_streams_of_a_lost_replica_end_with_an_error_and_requests_go_elsewhere(site: Served, killed: str) -> None:
    fields = LONG | {"n": 1}
    streams = [Told() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        listening = [
            pool.submit(listen, site, told, **fields, messages=[{"role": "user", "content": f"{index}"}])
            for index, told in enumerate(streams)
        ]
        wait_until(lambda: all(told.got.num_tokens for told in streams), 30)
        engine, others = engines(site)[0], engines(site)[1:]
        os.kill(engine if killed == "its engine" else parent_of(engine), signal.SIGKILL)
        for future in listening:
            future.result()
        lost = [told for told in streams if told.error is not None]
        assert 0 < len(lost) < 8
        assert all("not_ready" in (told.error or "") for told in lost)
        assert all(told.got.num_tokens == fields["max_tokens"] for told in streams if told.error is None)
        assert {pool.submit(site.ask, "sk-acme").result().status_code for _ in range(8)} == {httpx.codes.OK}
    assert not is_running(engine)
    assert all(is_running(pid) for pid in others)
    rows = rows_of(site.config["store"]["url"])
    for told in streams:
        row = rows[told.got.response_id]
        assert row.outcome == ("finished" if told.error is None else "error")
        assert told.got.num_tokens <= row.completion_tokens
    wait_until(lambda: len(engines(site)) == 2 and site.sample("buddy_engine_up") == 2, REPLACED_S, 0.5)


def test_streams_finish_after_sigterm_and_no_process_is_left(site: Served) -> None:
    """The last test here: it stops the server."""
    assert site.process is not None
    # As many tokens as a busy machine generates in the grace period.
    streams, fields = [Streamed() for _ in range(2)], LONG | {"n": 1, "max_tokens": 80}
    processes = descendants_of(site.process.pid)
    with ThreadPoolExecutor(2) as pool:
        streaming = [pool.submit(site.stream, "sk-acme", got, **fields) for got in streams]
        wait_until(lambda: all(got.num_tokens for got in streams), 30)
        site.stop()
        for future in streaming:
            future.result()
    rows = rows_of(site.config["store"]["url"])
    for got in streams:
        assert got.is_done
        row = rows[got.response_id]
        assert (row.outcome, row.completion_tokens) == ("finished", fields["max_tokens"])
        assert round(row.milli_layers / (1000 * row.layers), 3) == got.layer_tokens
    wait_until(lambda: not any(map(is_running, processes)), 10)
