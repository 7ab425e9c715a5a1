"""A real HAProxy with the committed configuration, before two real servers that share a ledger and its journals."""

import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from buddy_server.bench.server_process import free_port
from buddy_server.tenancy.tenancy import UPKEEP_EVERY_S
from end_to_end.tenant_site import LONG, Served, Streamed, bearer, rows_of, tenants
from fakes.name_server import name_server
from fakes.serving import wait_until

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy" / "haproxy.cfg"
KEYS = tuple(f"sk-t{index}" for index in range(8))

pytestmark = [
    # Servers are started again, and one waits until the other has taken over its rows.
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        shutil.which("haproxy") is None, reason="NOT TESTED: servers behind HAProxy. apt-get install haproxy"
    ),
]


@dataclass
class Site:
    """`balancer` is asked as a server is; `servers` are behind it."""

    balancer: Served
    servers: tuple[Served, Served]
    store_url: str

    def server_of(self, key: str) -> Served:
        """The one that answers a request with `key` when nothing else runs."""
        before = [num_ended(server) for server in self.servers]
        assert self.balancer.ask(key).status_code == httpx.codes.OK
        changed = [num_ended(server) - count for server, count in zip(self.servers, before, strict=True)]
        assert sorted(changed) == [0, 1]
        return self.servers[changed.index(1)]

    def other(self, server: Served) -> Served:
        return self.servers[1 - self.servers.index(server)]

    def restart(self, server: Served) -> None:
        """Kill it, start it again, and return when the balancer has found it."""
        server.kill()
        server.start()
        wait_until(lambda: {self.server_of(key).port for key in KEYS} == {each.port for each in self.servers}, 20)


def num_ended(server: Served) -> float:
    return server.sample("buddy_requests_total")


def num_running(server: Served) -> float:
    return server.sample("buddy_num_requests_running")


@contextmanager
def haproxy(balancer: Served, changes: dict[str, str]) -> Iterator[None]:
    """HAProxy at the address of `balancer`, with the committed configuration but for `changes`: expressions and what
    stands in their place."""
    text = CONFIG.read_text()
    for pattern, replacement in {"bind :8000": f"bind 127.0.0.1:{balancer.port}", **changes}.items():
        text, count = re.subn(pattern, replacement, text)
        assert count == 1
    file = balancer.folder / "haproxy.cfg"
    file.write_text(text)
    with (balancer.folder / "balancer.log").open("wb") as log:
        process = subprocess.Popen(["haproxy", "-db", "-f", file], stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or is_ready(balancer), 10)
        assert process.poll() is None, balancer.log
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


@contextmanager
def ready_server(address: str, port: int) -> Iterator[None]:
    """A server that answers every GET with its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(address)))
            self.end_headers()
            # The balancer has read enough of a health check once it has the status.
            with suppress(ConnectionError):
                self.wfile.write(address.encode())

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer((address, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@contextmanager
def streaming(site: Site, streams: list[Streamed]) -> Iterator[None]:
    """Long streams of one key, which their clients leave at the end."""
    leave = threading.Event()
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(site.balancer.stream, KEYS[0], got, leave.is_set, **LONG) for got in streams]
        try:
            yield
        finally:
            leave.set()
        for future in asked:
            future.result()
    wait_until(lambda: not any(num_running(server) for server in site.servers), 20)


def is_ready(balancer: Served) -> bool:
    try:
        return balancer.http.get(f"{balancer.url}/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("balanced")
    store_url = f"sqlite:///{folder}/buddy.db"
    config = {
        "tiers": {"free": {}},
        "tenants": tenants({key.removeprefix("sk-"): "free" for key in KEYS}),
        "store": {"url": store_url, "journal": str(folder / "journals")},
    }
    with ExitStack() as stack:
        servers = (Served(folder, config, "a"), Served(folder, config, "b"))
        for server in servers:
            server.launch()
            stack.callback(server.kill)
        for server in servers:
            server.wait_until_ready()
        balancer = Served(folder, {}, "balancer")
        lines = [f"server {server.name} 127.0.0.1:{server.port}" for server in servers]
        stack.enter_context(haproxy(balancer, {"server-template .*": "\n    ".join(lines)}))
        yield Site(balancer, servers, store_url)
        for server in servers:
            server.stop()


def test_haproxy_takes_the_committed_configuration() -> None:
    checked = subprocess.run(["haproxy", "-c", "-f", str(CONFIG)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_servers_come_and_go_with_the_answers_of_the_dns(tmp_path: Path) -> None:
    balancer, port = Served(tmp_path, {}, "balancer"), free_port()
    with name_server() as names, ExitStack() as stack:
        for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
            stack.enter_context(ready_server(address, port))
        names.addresses = ["127.0.0.2", "127.0.0.3"]
        changes = {"parse-resolv-conf": f"nameserver fake 127.0.0.1:{names.port}", "server:8000": f"server:{port}"}
        stack.enter_context(haproxy(balancer, changes))

        def found() -> set[str]:
            answers = [balancer.http.get(balancer.url, headers=bearer(str(key))) for key in range(20)]
            return {answer.text for answer in answers}

        for addresses in (["127.0.0.2", "127.0.0.3"], ["127.0.0.2", "127.0.0.3", "127.0.0.4"], ["127.0.0.4"]):
            names.addresses = addresses
            wait_until(lambda wanted=set(addresses): found() == wanted, 20, 0.2)


@pytest.mark.slow
def test_first_token_arrives_while_the_server_makes_the_others(site: Site) -> None:
    got = Streamed()
    with streaming(site, [got]):
        wait_until(lambda: got.num_tokens, 20)
        assert got.num_tokens < LONG["n"] * LONG["max_tokens"] / 2
        wait_until(lambda: any(num_running(server) for server in site.servers))


@pytest.mark.slow
def test_server_knows_of_a_client_that_leaves_a_stream(site: Site) -> None:
    server, got = site.server_of(KEYS[0]), Streamed()
    cancelled = server.sample("buddy_requests_total", outcome="cancelled")
    site.balancer.stream(KEYS[0], got, lambda: got.num_tokens > 0, **LONG)
    wait_until(lambda: server.sample("buddy_requests_total", outcome="cancelled") == cancelled + 1, 20)
    wait_until(lambda: num_running(server) == 0)


@pytest.mark.slow
def test_server_knows_of_a_client_that_leaves_before_its_answer(site: Site) -> None:
    server = site.server_of(KEYS[0])
    cancelled = server.sample("buddy_requests_total", outcome="cancelled")
    body = {"model": "buddy-7m", "messages": [{"role": "user", "content": "hi"}], **LONG}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{site.balancer.url}/v1/chat/completions", json=body, headers=bearer(KEYS[0]), timeout=0.5)
    wait_until(lambda: server.sample("buddy_requests_total", outcome="cancelled") == cancelled + 1, 20)
    wait_until(lambda: num_running(server) == 0)


@pytest.mark.slow
def test_metrics_are_not_shown(site: Site) -> None:
    for path in ("metrics", "%6detrics", "metrics?all"):
        assert site.balancer.http.get(f"{site.balancer.url}/{path}").status_code == httpx.codes.NOT_FOUND


@pytest.mark.slow
def test_key_keeps_its_server_and_keys_are_spread(site: Site) -> None:
    first = {key: site.server_of(key).port for key in KEYS}
    assert {key: site.server_of(key).port for key in KEYS} == first
    assert len(set(first.values())) == 2


@pytest.mark.slow
def test_key_with_many_requests_gets_both_servers(site: Site) -> None:
    with streaming(site, [Streamed() for _ in range(4)]):
        wait_until(lambda: all(num_running(server) for server in site.servers), 20)


@pytest.mark.slow
def test_stream_of_a_killed_server_ends_and_its_row_is_taken_over_by_the_other(site: Site) -> None:
    got = Streamed()
    with killed_while_asked(site, lambda: site.balancer.stream(KEYS[0], got, **LONG)) as lost:
        assert isinstance(lost.exception(), httpx.RemoteProtocolError)
        assert got.num_tokens
        assert not got.is_done
        wait_until(lambda: got.response_id in rows_of(site.store_url), UPKEEP_EVERY_S + 10, 1)
        assert rows_of(site.store_url)[got.response_id].outcome == "error"


@pytest.mark.slow
def test_request_that_a_killed_server_had_is_not_repeated(site: Site) -> None:
    with killed_while_asked(site, lambda: site.balancer.ask(KEYS[0], **LONG)) as lost:
        answer = lost.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (httpx.codes.BAD_GATEWAY, "internal_error")


@contextmanager
def killed_while_asked(site: Site, ask: Callable[[], object]) -> Iterator["Future[Any]"]:
    """The server that works on `ask` is killed. The next request is answered by the other one, and nothing else is."""
    killed = site.server_of(KEYS[0])
    other = site.other(killed)
    before = num_ended(other)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            wait_until(lambda: num_running(killed) == LONG["n"], 20)
            # Long enough for a token to reach the client.
            time.sleep(0.5)
            killed.kill()
            assert site.balancer.ask(KEYS[0]).status_code == httpx.codes.OK
            yield asked
        assert num_ended(other) == before + 1
        assert num_running(other) == 0
    finally:
        site.restart(killed)


@pytest.mark.slow
def test_server_that_is_stopped_finishes_its_stream_and_gets_no_more(site: Site) -> None:
    stopped, got = site.server_of(KEYS[0]), Streamed()
    assert stopped.process is not None
    with ThreadPoolExecutor(1) as pool:
        # Short enough for the grace period.
        streamed = pool.submit(site.balancer.stream, KEYS[0], got, **LONG | {"n": 1, "max_tokens": 300})
        wait_until(lambda: got.num_tokens, 20)
        stopped.process.send_signal(signal.SIGTERM)
        while not streamed.done():
            assert site.balancer.ask(KEYS[0]).status_code == httpx.codes.OK
        streamed.result()
    assert got.is_done
    stopped.stop()
    site.restart(stopped)


@pytest.mark.slow
def test_without_a_server_the_error_is_in_the_format_of_the_api(site: Site) -> None:
    for server in site.servers:
        server.stop()
    answer = site.balancer.ask(KEYS[0])
    assert (answer.status_code, answer.headers["retry-after"]) == (httpx.codes.SERVICE_UNAVAILABLE, "1")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["code"] == "not_ready"
