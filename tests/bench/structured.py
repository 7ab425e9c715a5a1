"""What a JSON schema costs in throughput:

    .venv/bin/python tests/bench/structured.py --json tests/bench/structured.jsonl

Eight streams over HTTP with the embedded model, of the same length with and without a schema. `all`: those of eight
with one, relative to eight without. `neighbours`: those of four without beside four with one, relative to the same
beside four without. Rounds of the one and the other take turns. Targets: 0.85 and 0.9.
"""

import asyncio
import random
import tempfile
from argparse import ArgumentParser
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from buddy_routing.embedded import MODEL_ID
from buddy_server.bench.http_load import Exchange, Target, closed_loop, run_undisturbed
from buddy_server.bench.reply import tokens_per_s
from buddy_server.bench.row import commit, machine, write_row
from buddy_server.bench.served import served_model
from buddy_server.bench.server_process import serving

SEED = 0
CONCURRENCY = 8
PROMPT_TOKENS = 64
NEW_TOKENS = 256
VOCAB_SIZE = 3072
WARM_UP_ROUNDS = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "kind": {"enum": ["dog", "cat", "bird"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
FIELDS: dict[bool, dict[str, Any]] = {
    False: {"temperature": 1},
    # Never complete, so that answers have the requested length.
    True: {"temperature": 1, "guided_json": {"type": "array", "items": PERSON, "minItems": 10_000}},
}


@dataclass(frozen=True, slots=True)
class StructuredRow:
    """`ratio` is the median over rounds of the tokens per second with schemas over those without, `ratio_p25` and
    `ratio_p75` are quartiles; speeds are medians too."""

    compared: str
    budget: float
    plain_tokens_per_s: float
    structured_tokens_per_s: float
    ratio: float
    ratio_p25: float
    ratio_p75: float
    concurrency: int
    new_tokens: int
    rounds: int
    commit: str
    machine: str


async def exchanged(target: Target, measured: list[bytes], beside: list[bytes]) -> list[Exchange]:
    """The exchanges of the measured requests, with others beside them that take longer."""
    others = [asyncio.create_task(Exchange(request).run(target)) for request in beside]
    if others:
        await asyncio.sleep(0.05)
    exchanges = await closed_loop(target, [[request] for request in measured])
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return exchanges


def speed(target: Target, measured: list[bytes], beside: list[bytes]) -> float:
    """Of the measured requests together. Raises ServerBenchError if one fails."""
    exchanges, _ = run_undisturbed(exchanged(target, measured, beside))
    return tokens_per_s(exchanges, NEW_TOKENS)


def measure(target: Target, compared: str, budget: float, rounds: int) -> StructuredRow:
    rng = random.Random(SEED)
    num_measured = CONCURRENCY if compared == "all" else CONCURRENCY // 2
    speeds: dict[bool, list[float]] = {False: [], True: []}

    def requests(count: int, new_tokens: int, structured: bool) -> list[bytes]:
        prompts = [tuple(rng.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS)) for _ in range(count)]
        return [target.request(prompt, new_tokens, budget, **FIELDS[structured]) for prompt in prompts]

    for index in range(WARM_UP_ROUNDS + rounds):
        # Each goes first as often as the other.
        for structured in (False, True) if index % 2 else (True, False):
            measured = requests(num_measured, NEW_TOKENS, structured and compared == "all")
            beside = requests(CONCURRENCY - num_measured, 2 * NEW_TOKENS, structured)
            speeds[structured].append(speed(target, measured, beside))
    plain, with_schema = (speeds[structured][WARM_UP_ROUNDS:] for structured in (False, True))
    low, middle, high = quantiles([ours / theirs for ours, theirs in zip(with_schema, plain, strict=True)], n=4)
    return StructuredRow(
        compared=compared,
        budget=budget,
        plain_tokens_per_s=median(plain),
        structured_tokens_per_s=median(with_schema),
        ratio=middle,
        ratio_p25=low,
        ratio_p75=high,
        concurrency=CONCURRENCY,
        new_tokens=NEW_TOKENS,
        rounds=rounds,
        commit=commit(),
        machine=machine(),
    )


def main() -> None:
    parser = ArgumentParser(description="what a JSON schema costs in throughput")
    parser.add_argument("--json", type=Path, help="file for the results, one object a line")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.5], help="default: 1.0 0.5")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        served = served_model(None, None, Path(directory))
        with serving(["--model", str(served.directory), "--router", served.router]) as server:
            target = Target(server.url, MODEL_ID)
            print(f"commit {commit() or 'unknown'}, {machine()}, {CONCURRENCY} streams, {parsed.rounds} rounds")
            first = True
            for compared in ("all", "neighbours"):
                for budget in parsed.budgets:
                    row = measure(target, compared, budget, parsed.rounds)
                    if parsed.json:
                        write_row(parsed.json, asdict(row), first=first)
                        first = False
                    print(
                        f"{compared}, budget {budget:g}: {row.plain_tokens_per_s:.0f} tokens/s without, "
                        f"{row.structured_tokens_per_s:.0f} with schemas, ratio {row.ratio:.3f} "
                        f"(quartiles {row.ratio_p25:.3f} to {row.ratio_p75:.3f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
