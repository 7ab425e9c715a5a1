"""`buddy bench server`: from the command line to JSON lines, tables and a plot."""

import asyncio
import os
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

from buddy_server.bench.command import (
    add_output_arguments,
    budgets,
    check_counts,
    check_plot,
    counts,
    dtypes,
)
from buddy_server.bench.names import SHAPE_NAMES


def add_server_arguments(parser: ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="PATH_OR_ID", help="model directory or hub id (default: the embedded model)")
    source.add_argument("--shape", choices=SHAPE_NAMES, help="layers x width of a model with random weights instead")
    source.add_argument(
        "--url", type=_url, help="a running server instead; nothing to compare it with is measured then"
    )
    parser.add_argument("--router", metavar="DIR", help="as for buddy serve, with a --model")
    parser.add_argument("--api-key", help="with --url; default: the environment variable BUDDY_API_KEY")
    parser.add_argument("--dtype", type=dtypes, default="bf16", help="of fp32, bf16, int8 (default: %(default)s)")
    parser.add_argument("--budgets", type=budgets, default="1.0,0.5", help="default: %(default)s")
    parser.add_argument("--concurrency", type=counts, default="1,2,4,8,16,32", help="streams (default: %(default)s)")
    parser.add_argument("--per-stream", type=int, default=2, help="requests a stream and round (default: %(default)s)")
    parser.add_argument("--rate", type=_rates, default="", help="Poisson arrivals, requests a second (default: none)")
    parser.add_argument("--arrivals", type=int, default=50, help="requests a rate and round (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--long-prompt", type=int, default=0, metavar="N", help="N tokens come in beside the streams")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="prompts that begin with the same N")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="server's memory over N short requests")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that all take part in (default: %(default)s)")
    add_output_arguments(parser)


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(map(float, text.split(","))) if text else ()
    if not all(0 < rate < float("inf") for rate in rates):
        raise ArgumentTypeError(f"{text!r} has a rate that is not more than 0")
    return rates


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme != "http" or not parts.hostname:
        raise ArgumentTypeError(f"{text!r} is not allowed: give one like http://127.0.0.1:8000")
    # Accepts the base_url of an openai client, which people copy.
    return text.rstrip("/").removesuffix("/v1")


def run_server(parsed: Namespace) -> None:
    """Raises ValueError for the model, the server and answers that do not match their requests; OSError for files."""
    from buddy_server.bench.plots import plot_server
    from buddy_server.bench.row import conditions, write_row
    from buddy_server.bench.server_bench import ServerBenchPlan, bench_server
    from buddy_server.bench.server_row import ServerRow, flat, markdown_tables

    check_counts(parsed, ("per_stream", "arrivals", "prompt", "new_tokens", "rounds"))
    check_counts(parsed, ("long_prompt", "shared_prefix", "memory"), least=0)
    check_plot(parsed.plot)
    if parsed.url and parsed.memory:
        raise ValueError("--memory measures a server that this command starts; allowed is one of --memory and --url")
    if parsed.router and not parsed.model:
        raise ValueError("--router is for a --model; the embedded model and shapes have theirs")
    plan = ServerBenchPlan(
        model=parsed.model,
        shape=parsed.shape,
        router=parsed.router,
        url=parsed.url,
        api_key=parsed.api_key or os.environ.get("BUDDY_API_KEY", ""),
        dtypes=parsed.dtype,
        budgets=parsed.budgets,
        concurrency=parsed.concurrency,
        rates_per_s=parsed.rate,
        prompt_tokens=parsed.prompt,
        new_tokens=parsed.new_tokens,
        per_stream=parsed.per_stream,
        arrivals=parsed.arrivals,
        long_prompt=parsed.long_prompt,
        shared_prefix=parsed.shared_prefix,
        memory=parsed.memory,
        rounds=parsed.rounds,
    )
    rows: list[ServerRow] = []
    try:
        with _ending_on_signals(), closing(bench_server(plan)) as measured:
            for row in measured:
                rows.append(row)
                if parsed.json:
                    write_row(parsed.json, flat(row), first=len(rows) == 1)
    finally:
        # Also prints what was measured before a failure: the rows count the failed requests.
        if rows:
            chosen = ((row.facts.dtype, row.facts.arithmetic) for row in rows)
            print(f"{conditions(chosen)}\n\n{markdown_tables(rows)}")
    if parsed.plot:
        plot_server(rows, parsed.plot)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the bench and its server at any point. asyncio would turn the first signal into a
    cancellation, and loses it if the work has just finished. An event loop that runs is ended by a call of its own:
    uvloop keeps to itself what a handler raises in the middle of a protocol's method."""
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        sys.exit(128 + number)
    loop.call_soon_threadsafe(sys.exit, 128 + number)
