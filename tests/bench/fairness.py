"""What a small tenant gets beside another that floods the server, and what weights of 3 to 1 give:

    .venv/bin/python tests/bench/fairness.py --json tests/bench/fairness.jsonl

The embedded model over HTTP, closed loops of streams with short random prompts, at full depth. The small tenant runs 2
streams: alone; beside 16 of another tenant, which holds itself to its fair share of the 32 that run side by side; and
beside 64. Rounds take turns. Then two tenants with weights 3 and 1 run 64 streams each.
"""

import argparse
import asyncio
import gc
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from buddy_server.bench.http_load import Exchange, Target
from buddy_server.bench.reply import Reply, read_reply
from buddy_server.bench.row import conditions, write_row
from buddy_server.bench.served import served_model
from buddy_server.bench.server_process import serving
from buddy_server.bench.site import percentile_ms

WEIGHTS = {"small": 1.0, "other": 1.0, "heavy": 3.0}
PROMPT_TOKENS = (16, 32)
NEW_TOKENS = (64, 128)
WARM_UP_S = 2.0
CONDITIONS = {"alone": {"small": 2}, "fair share": {"small": 2, "other": 16}, "flood": {"small": 2, "other": 64}}
WEIGHTED = {"heavy": 64, "other": 64}


@dataclass(frozen=True, slots=True)
class FairnessRow:
    """One tenant in one condition: medians of rounds, latencies over all of them."""

    condition: str
    tenant: str
    weight: float
    streams: int
    layer_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    itl_p50_ms: float
    num_replies: int
    preemptions: int
    rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One tenant in one round."""

    layer_tokens_per_s: float
    preemptions: int
    replies: list[Reply]


class Site:
    """The server and its tenants."""

    def __init__(self, url: str, vocab_size: int, num_layers: int) -> None:
        self.url = url
        self.num_layers = num_layers
        self._vocab_size = vocab_size
        self._rng = random.Random(0)
        self._targets = {tenant: Target(url, "buddy-7m", key_of(tenant)) for tenant in WEIGHTS}

    def request(self, tenant: str) -> tuple[bytes, int]:
        """A request that no other equals, and its number of new tokens."""
        prompt = tuple(self._rng.choices(range(self._vocab_size), k=self._rng.randint(*PROMPT_TOKENS)))
        new_tokens = self._rng.randint(*NEW_TOKENS)
        return self._targets[tenant].request(prompt, new_tokens, 1.0), new_tokens

    async def run(self, streams: dict[str, int], seconds: float) -> dict[str, Measured]:
        """Each tenant's streams side by side, for `seconds` after a warm-up."""
        exchanges: dict[str, list[tuple[Exchange, int]]] = {tenant: [] for tenant in streams}

        async def stream(tenant: str) -> None:
            while True:
                request, new_tokens = self.request(tenant)
                exchange = Exchange(request)
                exchanges[tenant].append((exchange, new_tokens))
                await exchange.run(self._targets[tenant])

        tasks = [asyncio.create_task(stream(tenant)) for tenant, count in streams.items() for _ in range(count)]
        await asyncio.sleep(WARM_UP_S)
        start_s, before = time.perf_counter(), await self.counters()
        await asyncio.sleep(seconds)
        passed_s, after = time.perf_counter() - start_s, await self.counters()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [error for error in ended if not isinstance(error, asyncio.CancelledError)]
        assert not failed, failed
        preemptions = round(after["preemptions"] - before["preemptions"])
        return {
            tenant: Measured(
                (after[tenant] - before[tenant]) / self.num_layers / passed_s,
                preemptions,
                [read(one, count) for one, count in sent if one.sent_s >= start_s and (one.reads or not one.cut)],
            )
            for tenant, sent in exchanges.items()
        }

    async def counters(self) -> dict[str, float]:
        """The layers that each tenant was charged, and the server's preemptions."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{self.url}/metrics")).raise_for_status().text
        counters = dict.fromkeys(("preemptions", *WEIGHTS), 0.0)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                tenant = sample.labels.get("tenant", "")
                if sample.name == "buddy_preemptions_total":
                    counters["preemptions"] = sample.value
                elif sample.name == "buddy_layers_executed_total":
                    counters[tenant] += sample.value
                elif sample.name == "buddy_layers_uncharged_total":
                    counters[tenant] -= sample.value
        return counters


def read(exchange: Exchange, new_tokens: int) -> Reply:
    """The answer as far as it has come."""
    reply = read_reply(exchange, new_tokens)
    assert reply.error is None, reply.error
    return reply


def key_of(tenant: str) -> str:
    return f"sk-bench-{tenant}"


def config(path: Path) -> Path:
    """Write a configuration with a tier and a key for each tenant."""
    tenants = {
        tenant: {"tier": tenant, "key_sha256": [hashlib.sha256(key_of(tenant).encode()).hexdigest()]}
        for tenant in WEIGHTS
    }
    tiers = {tenant: {"weight": weight} for tenant, weight in WEIGHTS.items()}
    path.write_text(yaml.safe_dump({"tiers": tiers, "tenants": tenants}), encoding="utf-8")
    return path


def row(condition: str, streams: dict[str, int], tenant: str, rounds: list[Measured], seconds: float) -> FairnessRow:
    replies = [reply for measured in rounds for reply in measured.replies]
    ttfts = [reply.ttft_s for reply in replies if reply.arrival_times_s]
    gaps = [(late - early) for reply in replies for early, late in pairwise(reply.arrival_times_s)]
    return FairnessRow(
        condition=condition,
        tenant=tenant,
        weight=WEIGHTS[tenant],
        streams=streams[tenant],
        layer_tokens_per_s=median(measured.layer_tokens_per_s for measured in rounds),
        ttft_p50_ms=percentile_ms(ttfts, 50),
        ttft_p95_ms=percentile_ms(ttfts, 95),
        itl_p50_ms=percentile_ms(gaps, 50),
        num_replies=len(replies),
        preemptions=sum(measured.preemptions for measured in rounds),
        rounds=len(rounds),
        seconds=seconds,
    )


def measure(site: Site, num_rounds: int, seconds: float, weighted_s: float) -> Iterator[FairnessRow]:
    rounds: dict[str, list[dict[str, Measured]]] = {condition: [] for condition in CONDITIONS}
    for _ in range(num_rounds):
        for condition, streams in CONDITIONS.items():
            rounds[condition].append(undisturbed(site, streams, seconds))
    for condition, streams in CONDITIONS.items():
        for tenant in streams:
            yield row(condition, streams, tenant, [one[tenant] for one in rounds[condition]], seconds)
    if weighted_s:
        measured = undisturbed(site, WEIGHTED, weighted_s)
        for tenant in WEIGHTED:
            yield row("weights", WEIGHTED, tenant, [measured[tenant]], weighted_s)


def undisturbed(site: Site, streams: dict[str, int], seconds: float) -> dict[str, Measured]:
    """A garbage collection of the client would look like a pause of the server."""
    gc.disable()
    try:
        return asyncio.run(site.run(streams, seconds))
    finally:
        gc.enable()


def summary(rows: list[FairnessRow]) -> str:
    by_name = {(one.condition, one.tenant): one for one in rows}
    fair, flood = by_name["fair share", "small"], by_name["flood", "small"]
    totals = [by_name[condition, "small"].layer_tokens_per_s + by_name[condition, "other"].layer_tokens_per_s
              for condition in ("fair share", "flood")]  # fmt: skip
    lines = [
        "",
        "the small tenant beside the flood, relative to its fair share:",
        f"  TTFT median {flood.ttft_p50_ms / fair.ttft_p50_ms:.2f}, p95 {flood.ttft_p95_ms / fair.ttft_p95_ms:.2f}",
        f"  layer-tokens/s {flood.layer_tokens_per_s / fair.layer_tokens_per_s:.2f}",
        f"  of both tenants {totals[1] / totals[0]:.2f}",
    ]
    if ("weights", "heavy") in by_name:
        heavy, light = by_name["weights", "heavy"], by_name["weights", "other"]
        lines.append(f"weights 3 to 1: layer-tokens/s {heavy.layer_tokens_per_s / light.layer_tokens_per_s:.2f} to 1")
    return "\n".join(lines)


def table(rows: list[FairnessRow]) -> str:
    names = ["condition", "tenant", "streams", "layer-tokens/s", "TTFT p50 ms", "p95", "ITL p50 ms", "preemptions"]
    lines = [f"| {' | '.join(names)} |", f"|---|---|{'---:|' * (len(names) - 2)}"]
    for one in rows:
        figures = (one.ttft_p50_ms, one.ttft_p95_ms, one.itl_p50_ms)
        cells = [one.condition, one.tenant, str(one.streams), f"{one.layer_tokens_per_s:.0f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{ms:.1f}' for ms in figures), str(one.preemptions)])} |")
    return "\n".join(lines)


@contextmanager
def started() -> Iterator[Site]:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        served = served_model(None, None, work)
        model = json.loads((served.directory / "config.json").read_text(encoding="utf-8"))
        arguments = ["--model", str(served.directory), "--router", served.router, "--config"]
        with serving([*arguments, str(config(work / "config.yaml"))]) as server:
            yield Site(server.url, model["vocab_size"], model["num_hidden_layers"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each condition in a round")
    parser.add_argument("--weighted-s", type=float, default=60.0, help="of the tenants with weights; 0 leaves them out")
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    rows: list[FairnessRow] = []
    with started() as site:
        for one in measure(site, parsed.rounds, parsed.seconds, parsed.weighted_s):
            rows.append(one)
            if parsed.json:
                write_row(parsed.json, asdict(one), first=len(rows) == 1)
    print(f"{conditions([])}, {parsed.rounds} rounds of {parsed.seconds:g} s\n\n{table(rows)}\n{summary(rows)}")


if __name__ == "__main__":
    main()
