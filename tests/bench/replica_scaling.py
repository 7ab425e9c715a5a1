"""What autoscaling does under a load that comes and goes:

    .venv/bin/python tests/bench/replica_scaling.py --json tests/bench/replica_scaling.jsonl \\
        --plot tests/bench/replica_scaling.png

`buddy serve --replicas 1-3` with a model of random weights, and answers so long that the engine takes longer than Ray.
Every engine has PLACES places. As many streams as in PHASES each send one request after another: one, then as many as
three replicas have places for, then one again. The replicas share this machine's cores: how fast they are together says
nothing, but who waits for a place, and for how long, does.
"""

import asyncio
import random
import re
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import yaml

from buddy_server.bench.http_load import REQUEST_TIMEOUT_S, Exchange, Target, run_undisturbed
from buddy_server.bench.names import SHAPE_NAMES
from buddy_server.bench.reply import read_reply
from buddy_server.bench.row import commit, machine, write_row
from buddy_server.bench.served import served_shape
from buddy_server.bench.server_process import ServerBenchError, serving, wait_until_answering

SEED = 0
MOST_REPLICAS = 3
PLACES = 8
TARGET_S = 0.5
VOCAB_SIZE = 3072
PROMPT_TOKENS = 64
NEW_TOKENS = 256
PHASES = ((1, 15.0, 2.0), (24, 75.0, 0.0), (1, 240.0, 8.0))
"""Streams, for how many seconds, and the seconds between two requests of a stream."""
SAMPLE_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the metrics say `at_s` seconds after the start. `replicas` are those that take requests."""

    at_s: float
    replicas: int
    waiting_layer_tokens: float


@dataclass(frozen=True, slots=True)
class Answered:
    sent_s: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class ScalingRow:
    """Times to the first token are of the requests sent in each phase; in the second one also of those that were sent
    when there were MOST_REPLICAS. Times of replicas are seconds since the start of the phase."""

    shape: str
    dtype: str
    places: int
    target_queue_s: float
    streams: tuple[int, ...]
    replicas: tuple[int, ...]
    most_replicas_after_s: float | None
    one_replica_after_s: float | None
    ttft_p95_s: tuple[float, ...]
    ttft_p95_most_replicas_s: float | None
    num_requests: int
    num_errors: int
    commit: str
    machine: str


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPE_NAMES, default="16x256", help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file for the results, one object a line")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        checkpoint = served_shape(parsed.shape, work)
        config = work / "config.yaml"
        settings = {"engine": {"max_sequences": PLACES}, "elastic": {"target_queue_s": TARGET_S}}
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        arguments = ["--model", str(checkpoint.directory), "--router", checkpoint.router, "--config", str(config)]
        with serving([*arguments, "--dtype", parsed.dtype, "--replicas", f"1-{MOST_REPLICAS}"]) as server:
            target = Target(server.url, wait_until_answering(server.url, {}))
            (samples, exchanges), _ = run_undisturbed(observed(target))
    answered, errors = read(exchanges)
    row = summary(parsed.shape, parsed.dtype, samples, answered, errors)
    print(row)
    if errors:
        print(errors[0])
    if parsed.json:
        write_row(parsed.json, asdict(row), first=True)
        for sample in samples:
            write_row(parsed.json, asdict(sample), first=False)
        for one in answered:
            write_row(parsed.json, asdict(one), first=False)
    if parsed.plot:
        plot(row, samples, answered, parsed.plot)


def starts_s() -> list[float]:
    """When the phases begin, and when the last one ends."""
    return [float(at_s) for at_s in np.cumsum([0.0, *(seconds for _, seconds, _ in PHASES)])]


async def observed(target: Target) -> tuple[list[Sample], list[tuple[float, Exchange]]]:
    """The phases' load, and samples until the end of the last one. Exchanges come with the time they were sent."""
    start_s, rng = time.perf_counter(), random.Random(SEED)
    exchanges: list[tuple[float, Exchange]] = []

    async def stream(first_s: float, last_s: float, pause_s: float) -> None:
        await asyncio.sleep(start_s + first_s - time.perf_counter())
        while (now_s := time.perf_counter() - start_s) < last_s:
            prompt = tuple(rng.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS))
            exchange = Exchange(target.request(prompt, NEW_TOKENS, 1.0))
            exchanges.append((now_s, exchange))
            await exchange.run(target)
            await asyncio.sleep(pause_s)

    times_s = starts_s()
    async with asyncio.TaskGroup() as tasks:
        for index, (num_streams, _, pause_s) in enumerate(PHASES):
            for _ in range(num_streams):
                tasks.create_task(stream(times_s[index], times_s[index + 1], pause_s))
        sampling = tasks.create_task(sampled(target.url, start_s, times_s[-1]))
    return sampling.result(), exchanges


async def sampled(url: str, start_s: float, end_s: float) -> list[Sample]:
    samples: list[Sample] = []
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
        while (now_s := time.perf_counter() - start_s) < end_s:
            text = (await client.get("/metrics")).raise_for_status().text
            waiting = sum(map(float, re.findall(r"^buddy_waiting_layer_tokens\{.*\} (.*)$", text, re.MULTILINE)))
            samples.append(Sample(now_s, len(re.findall(r"^buddy_engine_up\{.*\} 1\.0$", text, re.MULTILINE)), waiting))
            await asyncio.sleep(SAMPLE_EVERY_S)
    return samples


def read(exchanges: Sequence[tuple[float, Exchange]]) -> tuple[list[Answered], list[str]]:
    """What was answered, in the order it was sent, and the errors of the rest."""
    answered, errors = [], []
    for sent_s, exchange in exchanges:
        reply = read_reply(exchange, NEW_TOKENS)
        if reply.error is None:
            answered.append(Answered(sent_s, reply.ttft_s))
        else:
            errors.append(reply.error)
    return answered, errors


def summary(
    shape: str, dtype: str, samples: Sequence[Sample], answered: Sequence[Answered], errors: Sequence[str]
) -> ScalingRow:
    times_s = starts_s()
    most = [sample.at_s for sample in samples if sample.replicas == MOST_REPLICAS]
    one = [sample.at_s for sample in samples if sample.replicas == 1 and most and sample.at_s > most[0]]
    if not answered:
        raise ServerBenchError("no request was answered")
    return ScalingRow(
        shape=shape,
        dtype=dtype,
        places=PLACES,
        target_queue_s=TARGET_S,
        streams=tuple(num_streams for num_streams, _, _ in PHASES),
        replicas=tuple(samples_before(samples, end_s).replicas for end_s in times_s[1:]),
        most_replicas_after_s=most[0] - times_s[1] if most else None,
        one_replica_after_s=one[0] - times_s[2] if one else None,
        ttft_p95_s=tuple(p95_s(answered, times_s[index], times_s[index + 1]) for index in range(len(PHASES))),
        ttft_p95_most_replicas_s=p95_s(answered, most[0], times_s[2]) if most and most[0] < times_s[2] else None,
        num_requests=len(answered) + len(errors),
        num_errors=len(errors),
        commit=commit(),
        machine=machine(),
    )


def samples_before(samples: Sequence[Sample], end_s: float) -> Sample:
    """The last one before this time."""
    return max((sample for sample in samples if sample.at_s < end_s), key=lambda sample: sample.at_s)


def p95_s(answered: Sequence[Answered], first_s: float, last_s: float) -> float:
    return float(np.percentile([one.ttft_s for one in answered if first_s <= one.sent_s < last_s], 95))


def plot(row: ScalingRow, samples: Sequence[Sample], answered: Sequence[Answered], path: Path) -> None:
    """Above, the time to the first token of every request, when it was sent; then the layer-tokens that wait; below,
    how many replicas take requests, and how many streams there are for each of their places."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="tight")
    first_tokens, waiting, replicas = figure.subplots(3, 1, sharex=True)
    first_tokens.plot([one.sent_s for one in answered], [one.ttft_s for one in answered], ".", markersize=3)
    first_tokens.axhline(TARGET_S, linestyle="--", linewidth=1, color="black", label="target of the wait")
    first_tokens.set(yscale="log", ylabel="time to first token, s")
    first_tokens.yaxis.set_major_formatter("{x:g}")
    first_tokens.set_title(
        f"{row.shape}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {PLACES} places a replica, {row.machine}"
    )
    at_s = [sample.at_s for sample in samples]
    waiting.step(at_s, [sample.waiting_layer_tokens for sample in samples], where="post", label="all replicas")
    waiting.set(ylabel="waiting layer-tokens", ylim=(0, None))
    replicas.step(at_s, [sample.replicas for sample in samples], where="post", color="C1", label="replicas")
    replicas.stairs([num / PLACES for num, _, _ in PHASES], starts_s(), color="grey", label="streams / places of one")
    replicas.set(xlabel="seconds", ylabel="replicas", xlim=(0, starts_s()[-1]), ylim=(0, MOST_REPLICAS + 0.5))
    for axes in (first_tokens, waiting, replicas):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
