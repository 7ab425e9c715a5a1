"""What keys, limits and ledger cost in throughput:

    .venv/bin/python tests/bench/tenancy_cost.py --json tests/bench/tenancy_cost.jsonl

Eight streams over HTTP with the embedded model. One server has no configuration, the other a key, all four limits and a
ledger in SQLite; short rounds with the one and the other take turns while the other one idles. Target: 0.95.
"""

import random
import tempfile
from argparse import ArgumentParser
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median, quantiles

import yaml

from buddy_routing.embedded import MODEL_ID
from buddy_server.bench.contender import Tokens
from buddy_server.bench.http_load import Target, closed_loop, run_undisturbed
from buddy_server.bench.reply import read_reply
from buddy_server.bench.row import commit, machine, write_row
from buddy_server.bench.served import served_model
from buddy_server.bench.server_process import ServerBenchError, serving

SEED = 0
KEY = "sk-bench"
FAR_AWAY = 10**9
CONCURRENCY = 8
PROMPT_TOKENS = 128
VOCAB_SIZE = 3072
ROUND_TOKENS = 512
"""Of every stream in a round."""
WARM_UP_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class CostRow:
    """`ratio` is the median over rounds of the tokens per second with tenancy over those without, `ratio_p25` and
    `ratio_p75` are quartiles; speeds are medians too."""

    new_tokens: int
    plain_tokens_per_s: float
    tenancy_tokens_per_s: float
    ratio: float
    ratio_p25: float
    ratio_p75: float
    concurrency: int
    prompt_tokens: int
    rounds: int
    commit: str
    machine: str


def tokens_per_s(target: Target, prompts: list[list[Tokens]], new_tokens: int) -> float:
    """Of one round, in which `prompts` has a list for every stream. Raises ServerBenchError if a request fails."""
    streams = [[target.request(prompt, new_tokens, 1.0) for prompt in stream] for stream in prompts]
    exchanges, _ = run_undisturbed(closed_loop(target, streams))
    replies = [read_reply(exchange, new_tokens) for exchange in exchanges]
    for reply in replies:
        if reply.error is not None:
            raise ServerBenchError(reply.error)
    span_s = max(reply.ended_s for reply in replies) - min(reply.sent_s for reply in replies)
    return len(replies) * new_tokens / span_s


def measure(plain: Target, tenancy: Target, new_tokens: int, rounds: int) -> CostRow:
    rng = random.Random(SEED)
    speeds: dict[Target, list[float]] = {plain: [], tenancy: []}
    for index in range(WARM_UP_ROUNDS + rounds):
        prompts = [
            [tuple(rng.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS)) for _ in range(ROUND_TOKENS // new_tokens)]
            for _ in range(CONCURRENCY)
        ]
        # Each goes first as often as the other.
        for target in (plain, tenancy) if index % 2 else (tenancy, plain):
            speed = tokens_per_s(target, prompts, new_tokens)
            if index >= WARM_UP_ROUNDS:
                speeds[target].append(speed)
    ratios = [ours / theirs for ours, theirs in zip(speeds[tenancy], speeds[plain], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return CostRow(
        new_tokens=new_tokens,
        plain_tokens_per_s=median(speeds[plain]),
        tenancy_tokens_per_s=median(speeds[tenancy]),
        ratio=middle,
        ratio_p25=low,
        ratio_p75=high,
        concurrency=CONCURRENCY,
        prompt_tokens=PROMPT_TOKENS,
        rounds=rounds,
        commit=commit(),
        machine=machine(),
    )


def write_tenancy(work: Path) -> Path:
    """A configuration file with one tenant."""
    limits = ("requests_per_minute", "layer_tokens_per_minute", "max_concurrent_requests", "layer_tokens_per_month")
    config = {
        "tiers": {"bench": dict.fromkeys(limits, FAR_AWAY)},
        "tenants": {"bench": {"tier": "bench", "key_sha256": [sha256(KEY.encode()).hexdigest()]}},
        "store": {"url": f"sqlite:///{work / 'buddy.db'}"},
    }
    path = work / "tenancy.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def main() -> None:
    parser = ArgumentParser(description="what keys, limits and ledger cost in throughput")
    parser.add_argument("--json", type=Path, help="file for the results, one object a line")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[64, 256], help="of an answer (default: 64 256)")
    parser.add_argument("--rounds", type=int, default=60, help="default: %(default)s")
    parsed = parser.parse_args()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = served_model(None, None, work)
        arguments = ["--model", str(checkpoint.directory), "--router", checkpoint.router]
        plain = stack.enter_context(serving(arguments))
        tenancy = stack.enter_context(serving([*arguments, "--config", str(write_tenancy(work))]))
        targets = Target(plain.url, MODEL_ID), Target(tenancy.url, MODEL_ID, KEY)
        print(f"commit {commit() or 'unknown'}, {machine()}, {CONCURRENCY} streams, {parsed.rounds} rounds")
        for index, new_tokens in enumerate(parsed.new_tokens):
            row = measure(*targets, new_tokens, parsed.rounds)
            if parsed.json:
                write_row(parsed.json, asdict(row), first=index == 0)
            print(
                f"answers of {new_tokens} tokens: {row.plain_tokens_per_s:.0f} tokens/s without, "
                f"{row.tenancy_tokens_per_s:.0f} with tenancy, ratio {row.ratio:.3f} "
                f"(quartiles {row.ratio_p25:.3f} to {row.ratio_p75:.3f})"
            )


if __name__ == "__main__":
    main()
