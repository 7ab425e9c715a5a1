"""`buddy bench server` against servers that are there already, some of which fail."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buddy_server.api.app import create_app
from buddy_server.bench.http_load import Exchange
from buddy_server.cli import main
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from fakes.engine import FakeEngine
from fakes.serving import listening
from fakes.streaming_server import NoTokenizer
from fakes.tenancy import tenancy_of

SMALL = ("--concurrency", "2", "--budgets", "0.5", "--prompt", "9", "--new-tokens", "6", "--rounds", "2")


@pytest.fixture
def serve() -> Iterator[Callable[[FakeEngine], str]]:
    with listening() as server:

        def start(engine: FakeEngine) -> str:
            config = ServerConfig()
            metrics = Metrics(engine.info, config.tenants)
            server.app = create_app(config, engine, NoTokenizer(), metrics, tenancy_of(engine, config, metrics))
            return server.url

        yield start


def test_a_running_server_is_measured_without_an_engine_beside_it(
    serve: Callable[[FakeEngine], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, engine = tmp_path / "rows.jsonl", FakeEngine(delay_s=0.01)
    main(
        [
            "bench",
            "server",
            "--url",
            f"{serve(engine)}/v1",
            *SMALL,
            "--rate",
            "50",
            "--arrivals",
            "3",
            "--json",
            str(out),
        ]
    )
    closed, poisson = [json.loads(line) for line in out.read_text().splitlines()]
    assert (closed["measured"], closed["concurrency"], closed["num_requests"]) == ("closed loop", 2, 8)
    assert (poisson["measured"], poisson["rate_per_s"], poisson["num_requests"]) == ("poisson", 50, 6)
    assert closed["share_of_engine"] is None
    assert closed["ttft_p50_ms"] > 10
    assert closed["e2e_p50_ms"] > 50
    assert {len(request.prompt_tokens) for request in engine.requests} == {9}
    assert {request.max_cost for request in engine.requests} == {4000}
    assert "| tiny/fake-8l |  | 2 |  | 0.5 |" in capsys.readouterr().out


def test_requests_that_fail_are_counted_and_fail_the_bench(
    serve: Callable[[FakeEngine], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Faltering(FakeEngine):
        """Fails every fifth request, its warm-up not."""

        @property
        def fail_at(self) -> int | None:
            return 2 if len(self.requests) % 5 == 0 else None

        @fail_at.setter
        def fail_at(self, _: int | None) -> None:
            pass

    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match="of 8 requests failed; the first: in mid-stream: "):
        main(["bench", "server", "--url", serve(Faltering()), *SMALL, "--json", str(out)])
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < row["num_errors"] < row["num_requests"] == 8
    assert "| num errors |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompt", "250"), "not one of 2 requests was answered: 400 Bad Request: The request needs"),
        (("--budgets", "0.01"), "budget 0.01 is outside the allowed range"),
        (("--long-prompt", "50"), "a stream ended before the long prompt's prefill did: it needs more tokens"),
    ],
)
def test_a_server_that_cannot_do_it_is_told_from_one_that_can(
    serve: Callable[[FakeEngine], str], arguments: tuple[str, ...], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "server", "--url", serve(FakeEngine()), *SMALL, *arguments])
    assert told in str(ended.value.code)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--url", "http://127.0.0.1:9"), "no server is ready at http://127.0.0.1:9"),
        (("--url", "http://127.0.0.1:9", "--memory", "9"), "allowed is one of --memory and --url"),
        (("--router", "prior:ppl"), "--router is for a --model"),
        (("--rounds", "0"), "--rounds is 0, allowed is 1 or more"),
        (("--plot", "rows.txt"), "--plot rows.txt is no picture; allowed are names that end with ."),
        (("--prompt", "1000"), "prompt and new tokens make 1128 tokens, the model allows 1024"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "server", *arguments])
    assert told in str(ended.value.code)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--url", "https://example.com"), "'https://example.com' is not allowed"),
        (("--rate", "0"), "'0' has a rate that is not more than 0"),
        (("--concurrency", "0"), "'0' has a number under 1"),
        (("--url", "http://a", "--shape", "16x256"), "not allowed with argument"),
    ],
)
def test_a_flag_that_is_wrong_is_named(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "server", *arguments])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_ctrl_c_in_the_middle_of_a_read_ends_the_bench(
    serve: Callable[[FakeEngine], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Exchange, "buffer_updated", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "server", "--url", serve(FakeEngine()), *SMALL])
    assert ended.value.code == 128 + signal.SIGINT
