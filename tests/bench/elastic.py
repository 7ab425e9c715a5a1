"""What elastic budgets keep under twice the load that full depth carries:

    .venv/bin/python tests/bench/elastic.py --shape 16x256 --floor 0.125 --plot tests/bench/elastic.png

Over HTTP, with the embedded model or another shape. First as many streams as the engine has places show how many
requests per second full depth carries. Then requests come at random times: at half of what full depth
carries, at twice that, and at a fifth; once from a tenant whose tier has an elastic floor and once, at the same times,
from one whose tier has none. Targets: in the overload 95 of 100 first tokens come within TARGET_S, nothing is refused,
and budgets are back within a minute after it.
"""

import asyncio
import random
import re
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain, pairwise
from pathlib import Path
from statistics import mean

import httpx
import numpy as np
import yaml

from buddy_routing.embedded import MODEL_ID
from buddy_server.bench.contender import Tokens
from buddy_server.bench.http_load import (
    REQUEST_TIMEOUT_S,
    Exchange,
    Target,
    closed_loop,
    open_loop,
    run_undisturbed,
)
from buddy_server.bench.names import SHAPE_NAMES
from buddy_server.bench.reply import Reply, read_reply
from buddy_server.bench.row import commit, machine, write_row
from buddy_server.bench.served import served_model, served_shape
from buddy_server.bench.server_process import ServerBenchError, serving, wait_until_answering

SEED = 0
TARGET_S = 0.5
VOCAB_SIZE = 3072
PROMPT_TOKENS = 64
NEW_TOKENS = 128, 256
"""Of an answer, at least and at most."""
STREAMS, PER_STREAM = 32, 6
OVERLOAD_START_S, OVERLOAD_END_S = 10.0, 70.0
SETTLING_S = 10.0
PHASES = (
    (0.5, 0.0, OVERLOAD_START_S),
    (2.0, OVERLOAD_START_S, OVERLOAD_END_S),
    (0.2, OVERLOAD_END_S, OVERLOAD_END_S + 60.0),
)
"""Requests per second over those that full depth carries, from and to when in seconds."""
SCRAPE_EVERY_S = 0.5
TIERS = ("elastic", "fixed")


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is due `due_s` seconds after the start of its run."""

    due_s: float
    prompt: Tokens
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """The load of the tenant in `tier`. `replies` and `granted`, the budgets, are in the order of `jobs`; a budget is
    None if the request failed. `limits` are pairs of seconds since the start and the tier's largest budget then."""

    tier: str
    jobs: Sequence[Job]
    replies: Sequence[Reply]
    granted: Sequence[float | None]
    limits: Sequence[tuple[float, float]]

    @property
    def errors(self) -> list[str]:
        return [reply.error for reply in self.replies if reply.error is not None]

    def ttft_p95_s(self, first_s: float, last_s: float) -> float:
        """Of the requests that were due between the two."""
        due = zip(self.jobs, self.replies, strict=True)
        ttfts = [reply.ttft_s for job, reply in due if first_s <= job.due_s < last_s and reply.error is None]
        return float(np.percentile(ttfts, 95))

    def mean_granted(self, first_s: float, last_s: float) -> float:
        due = zip(self.jobs, self.granted, strict=True)
        return mean(budget for job, budget in due if first_s <= job.due_s < last_s and budget is not None)

    def answered_per_s(self, first_s: float, last_s: float) -> float:
        both = zip(self.jobs, self.replies, strict=True)
        return sum(first_s <= job.due_s + reply.duration_s < last_s for job, reply in both) / (last_s - first_s)

    @property
    def restored_after_s(self) -> float | None:
        """Seconds from the end of the overload until budgets were as before; None if they were not."""
        lowered = [at_s for at_s, limit in self.limits if limit < 1]
        if not lowered:
            return 0.0
        return None if lowered[-1] == self.limits[-1][0] else max(0.0, lowered[-1] - OVERLOAD_END_S)


@dataclass(frozen=True, slots=True)
class ElasticRow:
    """`carried_per_s` are the requests per second that full depth carries. `settled` is the overload without its first
    SETTLING_S seconds."""

    tier: str
    shape: str
    elastic_floor: float
    carried_per_s: float
    answered_per_s_settled: float
    num_requests: int
    num_errors: int
    ttft_p95_calm_s: float
    ttft_p95_overload_s: float
    ttft_p95_settled_s: float
    mean_budget_settled: float
    limit_changes: int
    restored_after_s: float | None
    commit: str
    machine: str


def random_job(rng: random.Random, due_s: float) -> Job:
    prompt = tuple(rng.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS))
    return Job(due_s, prompt, rng.randint(*NEW_TOKENS))


def arrivals(carried_per_s: float) -> list[Job]:
    rng, jobs = random.Random(SEED), []
    for share, start_s, end_s in PHASES:
        due_s = start_s + rng.expovariate(share * carried_per_s)
        while due_s < end_s:
            jobs.append(random_job(rng, due_s))
            due_s += rng.expovariate(share * carried_per_s)
    return jobs


def carried(target: Target) -> float:
    """Requests per second at full depth while the engine's places are taken. Raises ServerBenchError if one fails."""
    rng = random.Random(SEED)
    streams = [[random_job(rng, 0.0) for _ in range(PER_STREAM)] for _ in range(STREAMS)]
    requests = [[target.request(job.prompt, job.new_tokens, 1.0) for job in stream] for stream in streams]
    exchanges, _ = run_undisturbed(closed_loop(target, requests))
    replies = [read_reply(one, job.new_tokens) for one, job in zip(exchanges, chain(*streams), strict=True)]
    for reply in replies:
        if reply.error is not None:
            raise ServerBenchError(reply.error)
    ended_s = sorted(reply.ended_s for reply in replies)
    # Neither the first requests, which all begin at once, nor the last, when places are free.
    return (len(ended_s) - 2 * STREAMS) / (ended_s[-STREAMS] - ended_s[STREAMS])


def run_load(target: Target, tier: str, jobs: Sequence[Job]) -> Run:
    requests = [target.request(job.prompt, job.new_tokens, 1.0) for job in jobs]
    (exchanges, limits), _ = run_undisturbed(_observed(target, tier, requests, [job.due_s for job in jobs]))
    replies = [read_reply(one, job.new_tokens) for one, job in zip(exchanges, jobs, strict=True)]
    return Run(tier, jobs, replies, [_granted(one) for one in exchanges], limits)


async def _observed(
    target: Target, tier: str, requests: Sequence[bytes], arrivals_s: Sequence[float]
) -> tuple[list[Exchange], list[tuple[float, float]]]:
    """Send the requests, and watch the largest budget until all phases are over and everything is answered."""
    limits: list[tuple[float, float]] = []
    start_s = time.perf_counter()
    async with httpx.AsyncClient(base_url=target.url, timeout=REQUEST_TIMEOUT_S) as client:
        sending = asyncio.create_task(open_loop(target, requests, arrivals_s))
        while not sending.done() or limits[-1][0] < PHASES[-1][2]:
            limit = _limit(await client.get("/metrics"), tier)
            limits.append((time.perf_counter() - start_s, limit))
            await asyncio.sleep(SCRAPE_EVERY_S)
        return await sending, limits


def _limit(metrics: httpx.Response, tier: str) -> float:
    """The largest budget of a tier, which only an elastic one reports."""
    lines = metrics.raise_for_status().text.splitlines()
    name = f'buddy_budget_limit_ratio{{tier="{tier}"}} '
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 1.0)


def _granted(exchange: Exchange) -> float | None:
    found = re.search(rb'"budget_granted":([0-9.]+)', b"".join(data for _, data in exchange.reads))
    return float(found[1]) if found else None


def _wait_until_restored(url: str) -> None:
    while _limit(httpx.get(f"{url}/metrics"), "elastic") < 1:
        time.sleep(SCRAPE_EVERY_S)


def write_tiers(work: Path, floor: float) -> Path:
    """A configuration file with the tenants of TIERS."""
    config = {
        "tiers": {"elastic": {"elastic_floor": floor}, "fixed": {}},
        "tenants": {tier: {"tier": tier, "key_sha256": [sha256(_key(tier).encode()).hexdigest()]} for tier in TIERS},
        "elastic": {"target_queue_s": TARGET_S},
        # Nothing is refused: who cannot be served in time waits.
        "max_waiting": 10**6,
    }
    path = work / "tiers.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _key(tier: str) -> str:
    return f"sk-{tier}"


def plot(runs: Mapping[str, Run], rows: Sequence[ElasticRow], path: Path) -> None:
    """Above, the time to the first token of every request, when it was due; below, the largest budget, and the requests
    that came each second as a multiple of what full depth carries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="tight")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for tier, label in (("fixed", "without elastic floor"), ("elastic", "with elastic floor")):
        run = runs[tier]
        answered = [
            (job.due_s, reply.ttft_s) for job, reply in zip(run.jobs, run.replies, strict=True) if reply.error is None
        ]
        upper.plot(*zip(*answered, strict=True), ".", markersize=2, label=label)
    upper.axhline(TARGET_S, linestyle="--", linewidth=1, color="black", label="target")
    upper.set(yscale="log", ylabel="time to first token, s")
    upper.yaxis.set_major_formatter("{x:g}")
    row = rows[0]
    upper.set_title(f"{row.shape}, {PROMPT_TOKENS} + {NEW_TOKENS[0]} to {NEW_TOKENS[1]} tokens, {row.machine}")
    lower.step(*zip(*runs["elastic"].limits, strict=True), where="post", color="C1", label="largest budget")
    starts_s, ends_s = [phase[1] for phase in PHASES], PHASES[-1][2]
    lower.stairs([phase[0] for phase in PHASES], [*starts_s, ends_s], color="grey", label="load over full depth's")
    lower.set(xlabel="seconds", ylabel="share", xlim=(0, ends_s), ylim=(0, None))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def summary(run: Run, shape: str, floor: float, carried_per_s: float) -> ElasticRow:
    settled_s = OVERLOAD_START_S + SETTLING_S
    budgets = [budget for _, budget in run.limits]
    return ElasticRow(
        tier=run.tier,
        shape=shape,
        elastic_floor=floor,
        carried_per_s=carried_per_s,
        answered_per_s_settled=run.answered_per_s(settled_s, OVERLOAD_END_S),
        num_requests=len(run.jobs),
        num_errors=len(run.errors),
        ttft_p95_calm_s=run.ttft_p95_s(0, OVERLOAD_START_S),
        ttft_p95_overload_s=run.ttft_p95_s(OVERLOAD_START_S, OVERLOAD_END_S),
        ttft_p95_settled_s=run.ttft_p95_s(settled_s, OVERLOAD_END_S),
        mean_budget_settled=run.mean_granted(settled_s, OVERLOAD_END_S),
        limit_changes=sum(one != other for one, other in pairwise(budgets)),
        restored_after_s=run.restored_after_s,
        commit=commit(),
        machine=machine(),
    )


def report(run: Run, row: ElasticRow) -> None:
    back = "never" if row.restored_after_s is None else f"after {row.restored_after_s:.1f} s"
    print(
        f"{row.tier}: TTFT p95 {row.ttft_p95_calm_s:.3f} s before the overload, {row.ttft_p95_overload_s:.3f} s in it; "
        f"after its first {SETTLING_S:g} s {row.ttft_p95_settled_s:.3f} s, {row.answered_per_s_settled:.1f} answers/s "
        f"at a mean budget of {row.mean_budget_settled:.2f}; {row.limit_changes} changes, budgets back {back}; "
        f"{row.num_errors} of {row.num_requests} requests failed",
        *run.errors[:1],
        flush=True,
    )


def measure(url: str, shape: str, floor: float) -> Iterator[tuple[Run, ElasticRow]]:
    model = wait_until_answering(url, {"Authorization": f"Bearer {_key('fixed')}"})
    targets = {tier: Target(url, model, _key(tier)) for tier in TIERS}
    # The first answers of a server take longer.
    _, carried_per_s = carried(targets["fixed"]), carried(targets["fixed"])
    print(f"full depth carries {carried_per_s:.1f} requests/s", flush=True)
    jobs = arrivals(carried_per_s)
    for tier in TIERS:
        _wait_until_restored(url)
        run = run_load(targets[tier], tier, jobs)
        yield run, summary(run, shape, floor, carried_per_s)


def main() -> None:
    parser = ArgumentParser(description="what elastic budgets keep under twice the load that full depth carries")
    parser.add_argument("--shape", choices=SHAPE_NAMES, help="a model with random weights (default: the embedded one)")
    parser.add_argument("--floor", type=float, default=0.25, help="elastic floor (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results, one object a line")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parsed = parser.parse_args()
    runs: dict[str, Run] = {}
    rows: list[ElasticRow] = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        checkpoint = served_shape(parsed.shape, work) if parsed.shape else served_model(None, None, work)
        arguments = ["--model", str(checkpoint.directory), "--router", checkpoint.router]
        with serving([*arguments, "--config", str(write_tiers(work, parsed.floor))]) as server:
            print(f"commit {commit() or 'unknown'}, {machine()}")
            for run, row in measure(server.url, parsed.shape or MODEL_ID, parsed.floor):
                runs[row.tier] = run
                rows.append(row)
                report(run, row)
                if parsed.json:
                    write_row(parsed.json, asdict(row), first=len(rows) == 1)
    if parsed.plot:
        plot(runs, rows, parsed.plot)


if __name__ == "__main__":
    main()
