"""Measures the service times of capacity_model.py: CPU time of real processes, which neighbours change little."""

import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import redis.asyncio

from buddy_routing.embedded import MODEL_ID
from buddy_server.bench.http_load import Target, closed_loop, run_undisturbed
from buddy_server.bench.reply import read_reply
from buddy_server.bench.served import served_model
from buddy_server.bench.server_process import ServerBenchError
from buddy_server.engine.messages import StepTime
from buddy_server.fleet.entry import EngineReport, Entry, encode_entry
from buddy_server.fleet.fleet import Fleet
from buddy_server.fleet.redis_board import RedisBoard
from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.limits.limiter import Claim, Limits
from buddy_server.tenancy.limits.redis_limiter import RedisLimiter
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.ledger_store import LedgerStore
from capacity_model import ServiceTimes
from ingress_cost import TICKS_PER_S, cpu_by_part, idle_cores

sys.path.insert(0, str(Path(__file__).parents[1]))
from end_to_end.serve_run import serve_run
from end_to_end.tenant_site import Served, tenants
from postgres_process import Postgres, postgres
from redis_process import redis_process

MONTH = "2026-11"
NUM_TENANTS = 20
FAR_AWAY = 10**12
LIMITS = Limits(FAR_AWAY, FAR_AWAY, FAR_AWAY, FAR_AWAY)
REQUESTS_PER_MINUTE = 12_000
"""Of all tenants, while Redis is measured: what a sliding minute holds."""
NUM_CONNECTIONS = 16
NUM_LEASES = 1000
RENEWALS = 20
MEMBERS = (1, 10, 30, 100)
EXCHANGES = 400
SERVED_TENANTS = 40
BATCHES = (1, 10, 50, 200, 500)
ROWS = 10_000
"""Written in batches of each size."""
CONCURRENCY = 8
PROMPT = "Tell me a story about a dog named Max. " * 40
"""400 tokens of the embedded model, which the engine finds in its cache."""
KEY = "sk-bench"
RAY = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", "RAY_worker_niceness": "0"}
"""As deploy/ray/serve.yaml recommends."""
STOP_TIMEOUT_S = 30
ANSWERS = (1, 500)
"""Tokens of short answers, which have one piece, and of long ones."""
ROUNDS = 4
PER_STREAM = {1: 4, 500: 1}


def measure() -> ServiceTimes:
    """Takes some minutes. Raises ServerBenchError."""
    times: dict[str, float] = {}
    with redis_process() as shared, postgres() as database:
        times |= asyncio.run(_limits(shared.url))
        times |= asyncio.run(_reports(shared.url))
        times |= asyncio.run(_ledger(database))
        times |= _serving(shared.url, database.create_database("served"))
    return ServiceTimes(**{field.name: times[field.name] for field in fields(ServiceTimes)})


async def _limits(url: str) -> dict[str, float]:
    """Redis, per request and per renewal of a lease. Time passes as fast as the requests come."""
    now_s = [1e9]
    limiter = RedisLimiter(url, 1000, lambda: now_s[0])
    numbers = iter(range(10**9))

    def claim() -> Claim:
        number = next(numbers)
        return Claim(f"{number:032x}", f"tenant-{number % NUM_TENANTS}", 250_000, MONTH, LIMITS)

    async def ask(num: int) -> None:
        for _ in range(num):
            now_s[0] += 60 / REQUESTS_PER_MINUTE
            claimed = claim()
            await limiter.reserve(claimed)
            await limiter.settle(claimed, 200_000)

    async def ask_all() -> None:
        await asyncio.gather(*(ask(REQUESTS_PER_MINUTE // NUM_CONNECTIONS) for _ in range(NUM_CONNECTIONS)))

    async with redis.asyncio.Redis.from_url(url) as client:
        await ask_all()
        request_us = await _redis_us(client, ask_all) / REQUESTS_PER_MINUTE
        open_claims = [claim() for _ in range(NUM_LEASES)]
        for claimed in open_claims:
            await limiter.reserve(claimed)

        async def renew() -> None:
            for _ in range(RENEWALS):
                await limiter.renew(open_claims)

        renewal_us = await _redis_us(client, renew) / (RENEWALS * NUM_LEASES)
    await limiter.close()
    return {"redis_request": request_us, "redis_renewal": renewal_us}


async def _reports(url: str) -> dict[str, float]:
    """A member of a fleet puts its entry on the board and reads all: in Redis, and in its own process."""
    served = {(f"tenant-{index:06}", 0): 10**10 + index for index in range(SERVED_TENANTS)}
    entry = encode_entry(Entry(10**6, EngineReport(True, 32, 32, 0.5, 0.1, StepTime(1e4, 10**6), served)))
    board, own = RedisBoard(url, "bench"), "engine-0"
    in_redis, in_member = [], []
    async with redis.asyncio.Redis.from_url(url) as client:
        for members in MEMBERS:
            await client.delete("buddy:fleet:bench")
            for index in range(members):
                await board.exchange(f"engine-{index}", entry)

            async def exchange() -> None:
                for _ in range(EXCHANGES):
                    # A new one has to read every entry, as all have changed since the last time.
                    fleet = Fleet()
                    fleet.update(await board.exchange(own, entry))
                    fleet.take_served(own)
                    fleet.take_served(own)

            started_s = time.process_time()
            in_redis.append(await _redis_us(client, exchange) / EXCHANGES)
            in_member.append((time.process_time() - started_s) / EXCHANGES * 1e6)
    await board.close()
    redis_entry, redis_report = np.polyfit(MEMBERS, in_redis, 1)
    member_entry, member_report = np.polyfit(MEMBERS, in_member, 1)
    return {
        "redis_report": redis_report,
        "redis_report_entry": redis_entry,
        "reader_report": member_report,
        "reader_report_entry": member_entry,
    }


async def _redis_us(client: "redis.asyncio.Redis", work: Callable[[], Awaitable[None]]) -> float:
    """Redis's CPU time while `work` runs."""

    async def used_s() -> float:
        info = await client.info("cpu")
        return float(info["used_cpu_sys"]) + float(info["used_cpu_user"])

    before_s = await used_s()
    await work()
    return (await used_s() - before_s) * 1e6


async def _ledger(server: Postgres) -> dict[str, float]:
    """Transactions of the ledger: PostgreSQL's CPU time, and how long one lasts."""
    database = Database(server.create_database("measured"))
    await database.migrate()
    store, numbers = LedgerStore(database), iter(range(10**9))
    used_us, passed_us = [], []
    await store.write(_entries(numbers, 500))
    for batch in BATCHES:
        num = min(ROWS // batch, 1000)
        entries = [_entries(numbers, batch) for _ in range(num)]
        before_s, started_s = _cpu_s(server), time.perf_counter()
        for rows in entries:
            await store.write(rows)
        passed_us.append((time.perf_counter() - started_s) / num * 1e6)
        used_us.append((_cpu_s(server) - before_s) / num * 1e6)
    await database.close()
    row, transaction = np.polyfit(BATCHES, used_us, 1)
    passed_row, passed_transaction = np.polyfit(BATCHES, passed_us, 1)
    return {
        "postgres_transaction": max(0.0, transaction),
        "postgres_row": row,
        "ledger_transaction": max(0.0, passed_transaction),
        "ledger_row": passed_row,
    }


def _entries(numbers: Iterator[int], num: int) -> list[LedgerEntry]:
    return [
        LedgerEntry(
            id=f"chatcmpl-{next(numbers):032x}",
            tenant="acme",
            key_id="key",
            model=MODEL_ID,
            layers=16,
            day="2026-11-27",
            started_ms=10**12,
            ended_ms=10**12,
            budget_requested=0.5,
            budget_granted=0.5,
            decided_by="request",
            prompt_tokens=400,
            completion_tokens=250,
            milli_layers=5_200_000,
            outcome="finished",
        )
        for _ in range(num)
    ]


def _cpu_s(server: Postgres) -> float:
    ticks = 0
    for pid in server.pids():
        fields_of = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields_of[11]) + int(fields_of[12])
    return ticks / TICKS_PER_S


@dataclass(frozen=True, slots=True)
class _Round:
    requests: int
    pieces: int
    cpu_s: Counter[str]


def _serving(redis_url: str, store_url: str) -> dict[str, float]:
    """The processes between client and engine, as on a cluster. A piece takes what long answers take more than short
    ones."""
    with tempfile.TemporaryDirectory() as name, _deployed(Path(name), redis_url, store_url) as server:
        assert server.process is not None
        target, pid = Target(server.url, MODEL_ID, KEY), server.process.pid
        for new_tokens in ANSWERS:
            _round(target, pid, new_tokens, {})
        idle = idle_cores(pid)
        rounds = [_round(target, pid, new_tokens, idle) for _ in range(ROUNDS) for new_tokens in ANSWERS]
    counts = np.array([[one.requests, one.pieces] for one in rounds])
    times = {}
    for part in ("ingress", "proxy", "replica"):
        used_us = np.array([one.cpu_s[part] * 1e6 for one in rounds])
        (times[f"{part}_request"], times[f"{part}_piece"]), *_ = np.linalg.lstsq(counts, used_us, rcond=None)
    return times


@contextmanager
def _deployed(folder: Path, redis_url: str, store_url: str) -> Iterator[Served]:
    """One ingress and one replica by the Serve config file that we ship, with limits and a ledger."""
    checkpoint = served_model(None, None, folder)
    limits = ("requests_per_minute", "layer_tokens_per_minute", "max_concurrent_requests", "layer_tokens_per_month")
    config = {
        "tiers": {"bench": dict.fromkeys(limits, 10**9)},
        "tenants": tenants({"bench": "bench"}),
        "store": {"url": store_url, "journal": str(folder)},
        # On a busy machine, Redis may not answer in time.
        "limits": {"url": redis_url, "when_unreachable": "allow"},
    }
    server = serve_run(folder, config, 1, model=str(checkpoint.directory), router=checkpoint.router)
    os.environ |= RAY
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(STOP_TIMEOUT_S)
        server.kill()


def _round(target: Target, pid: int, new_tokens: int, idle: Mapping[str, float]) -> _Round:
    draw = random.Random(new_tokens)
    streams = [
        [
            target.request(f"{PROMPT} {draw.random()}", new_tokens, 1.0)  # type: ignore[arg-type]
            for _ in range(PER_STREAM[new_tokens])
        ]
        for _ in range(CONCURRENCY)
    ]
    before, started_s = cpu_by_part(pid), time.perf_counter()
    exchanges, _ = run_undisturbed(closed_loop(target, streams))
    passed_s = time.perf_counter() - started_s
    used = cpu_by_part(pid) - before
    replies = [read_reply(exchange, new_tokens) for exchange in exchanges]
    for reply in replies:
        if reply.error is not None:
            raise ServerBenchError(reply.error)
    pieces = sum(len(reply.arrival_times_s) for reply in replies)
    return _Round(len(replies), pieces, Counter({part: used[part] - passed_s * idle.get(part, 0.0) for part in used}))
