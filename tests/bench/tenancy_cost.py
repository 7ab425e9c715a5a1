"""What keys, limits and ledger cost in throughput:

    .venv/bin/python tests/bench/tenancy_cost.py --json tests/bench/tenancy_cost.jsonl

Eight streams over HTTP with the embedded model. One server has no configuration, the other a key, all four limits and a
ledger in SQLite; short rounds with the one and the other take turns while the other one idles. Target: 0.95.
"""

import os
import random
import tempfile
from argparse import ArgumentParser
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median, quantiles

import yaml

from buddy_routing.embedded import MODEL_ID
from buddy_server.bench.contender import Tokens
from buddy_server.bench.http_load import Target, closed_loop, run_undisturbed
from buddy_server.bench.reply import tokens_per_s
from buddy_server.bench.row import commit, machine, write_row
from buddy_server.bench.served import served_model
from buddy_server.bench.server_process import serving

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
    `ratio_p75` are quartiles; speeds are medians too. `*_cpu_us_per_token` is the CPU time of the process that speaks
    HTTP, over all rounds: neighbours on the machine hardly change it."""

    new_tokens: int
    plain_tokens_per_s: float
    tenancy_tokens_per_s: float
    ratio: float
    ratio_p25: float
    ratio_p75: float
    plain_cpu_us_per_token: float
    tenancy_cpu_us_per_token: float
    concurrency: int
    prompt_tokens: int
    rounds: int
    commit: str
    machine: str


@dataclass(slots=True)
class Contender:
    """One of the two servers, with the tokens per second of its rounds. `begin` forgets what came before."""

    target: Target
    pid: int
    speeds: list[float] = field(default_factory=list)
    _used_s: float = 0.0

    def begin(self) -> None:
        self.speeds.clear()
        self._used_s = self._total_cpu_s

    @property
    def cpu_s(self) -> float:
        """What its HTTP process has used since it began."""
        return self._total_cpu_s - self._used_s

    @property
    def _total_cpu_s(self) -> float:
        # User and system time, after the name in parentheses; proc(5).
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def speed(target: Target, prompts: list[list[Tokens]], new_tokens: int) -> float:
    """Of one round, in which `prompts` has a list for every stream. Raises ServerBenchError if a request fails."""
    streams = [[target.request(prompt, new_tokens, 1.0) for prompt in stream] for stream in prompts]
    exchanges, _ = run_undisturbed(closed_loop(target, streams))
    return tokens_per_s(exchanges, new_tokens)


def measure(plain: Contender, tenancy: Contender, new_tokens: int, rounds: int) -> CostRow:
    rng = random.Random(SEED)
    for index in range(WARM_UP_ROUNDS + rounds):
        if index == WARM_UP_ROUNDS:
            for contender in (plain, tenancy):
                contender.begin()
        prompts = [
            [tuple(rng.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS)) for _ in range(ROUND_TOKENS // new_tokens)]
            for _ in range(CONCURRENCY)
        ]
        # Each goes first as often as the other.
        for contender in (plain, tenancy) if index % 2 else (tenancy, plain):
            contender.speeds.append(speed(contender.target, prompts, new_tokens))
    ratios = [ours / theirs for ours, theirs in zip(tenancy.speeds, plain.speeds, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    num_tokens = rounds * CONCURRENCY * ROUND_TOKENS
    return CostRow(
        new_tokens=new_tokens,
        plain_tokens_per_s=median(plain.speeds),
        tenancy_tokens_per_s=median(tenancy.speeds),
        ratio=middle,
        ratio_p25=low,
        ratio_p75=high,
        plain_cpu_us_per_token=plain.cpu_s / num_tokens * 1e6,
        tenancy_cpu_us_per_token=tenancy.cpu_s / num_tokens * 1e6,
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
    parser.add_argument("--rounds", type=int, default=100, help="default: %(default)s")
    parsed = parser.parse_args()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = served_model(None, None, work)
        arguments = ["--model", str(checkpoint.directory), "--router", checkpoint.router]
        plain = stack.enter_context(serving(arguments))
        tenancy = stack.enter_context(serving([*arguments, "--config", str(write_tenancy(work))]))
        contenders = (
            Contender(Target(plain.url, MODEL_ID), plain.pid),
            Contender(Target(tenancy.url, MODEL_ID, KEY), tenancy.pid),
        )
        print(f"commit {commit() or 'unknown'}, {machine()}, {CONCURRENCY} streams, {parsed.rounds} rounds")
        for index, new_tokens in enumerate(parsed.new_tokens):
            row = measure(*contenders, new_tokens, parsed.rounds)
            if parsed.json:
                write_row(parsed.json, asdict(row), first=index == 0)
            print(
                f"answers of {new_tokens} tokens: {row.plain_tokens_per_s:.0f} tokens/s without, "
                f"{row.tenancy_tokens_per_s:.0f} with tenancy, ratio {row.ratio:.3f} "
                f"(quartiles {row.ratio_p25:.3f} to {row.ratio_p75:.3f}), HTTP process "
                f"{row.plain_cpu_us_per_token:.1f} and {row.tenancy_cpu_us_per_token:.1f} us/token",
                flush=True,
            )


if __name__ == "__main__":
    main()
