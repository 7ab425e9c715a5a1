"""What the way through Ray Serve costs, with one replica:

    .venv/bin/python tests/bench/ingress_cost.py --json tests/bench/ingress_cost.jsonl
    .venv/bin/python tests/bench/ingress_cost.py --shape 12x768

Eight streams over HTTP, to a plain server and to one with `--replicas 1`; rounds of the same requests take turns while
the other server idles. Target: 0.85 of the tokens per second.
"""

import os
import random
import sys
import tempfile
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from time import process_time, sleep

from buddy_routing.embedded import MODEL_ID
from buddy_server.bench.contender import Tokens
from buddy_server.bench.http_load import Target, closed_loop, run_undisturbed
from buddy_server.bench.names import SHAPE_NAMES
from buddy_server.bench.reply import Reply, read_reply
from buddy_server.bench.row import commit, machine, write_row
from buddy_server.bench.served import served_model, served_shape
from buddy_server.bench.server_process import ServerBenchError, serving
from buddy_server.bench.site import percentile_ms

sys.path.insert(0, str(Path(__file__).parents[1]))
from child_processes import command_of, descendants_of, is_running

SEED = 0
CONCURRENCY = 8
PROMPT_TOKENS = 32
VOCAB_SIZE = 3072
WARM_UP_ROUNDS = 1
IDLE_LOOK_S = 10.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PARTS = {
    "buddy_server.engine.worker": "engine",
    "EngineReplica": "replica",
    "Ingress": "ingress",
    "ProxyActor": "proxy",
    "haproxy": "proxy",
    "buddy_server.cli": "server",
}
"""What a process is, by words of its command. All others are Ray's."""


@dataclass(frozen=True, slots=True)
class SideRow:
    """One server over all rounds; `tokens_per_s` is their median. Times between tokens are those between pieces of
    text. `cpu_us_per_token` is the CPU time of each kind of process."""

    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    itl_p50_ms: float
    itl_p95_ms: float
    tokens_per_piece: float
    pieces_per_s: float
    cpu_us_per_token: dict[str, float]

    @property
    def cpu_us(self) -> float:
        """Of a token, in all processes."""
        return sum(self.cpu_us_per_token.values())


@dataclass(frozen=True, slots=True)
class IngressRow:
    """`ratio` is the median over rounds of the tokens per second with Ray over those without, `ratio_p25` and
    `ratio_p75` are quartiles. `cpu_ratio` is the same by the CPU time of a token, that of the client included: what a
    machine whose cores are all busy would show. `piece_cpu_ms` is what a piece of an answer takes with Ray, by kind of
    process, the engine aside. `others_share` of the machine's cores had other work during the rounds; `idle_cores` is
    what the server with Ray uses without requests."""

    model: str
    ratio: float
    ratio_p25: float
    ratio_p75: float
    cpu_ratio: float
    piece_cpu_ms: dict[str, float]
    plain: SideRow
    replica: SideRow
    client_cpu_us_per_token: float
    idle_cores: dict[str, float]
    others_share: float
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    commit: str
    machine: str


@dataclass(slots=True)
class Side:
    """One of the two servers, and what its rounds showed."""

    target: Target
    pid: int
    speeds: list[float] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    cpu_s: Counter[str] = field(default_factory=Counter)
    span_s: float = 0.0

    def run(self, prompts: Sequence[Sequence[Tokens]], new_tokens: int) -> float:
        """One round, in which `prompts` has a list for every stream; returns the client's CPU seconds. Raises
        ServerBenchError if a request fails."""
        streams = [[self.target.request(prompt, new_tokens, 1.0) for prompt in stream] for stream in prompts]
        before = cpu_by_part(self.pid)
        exchanges, client_s = run_undisturbed(closed_loop(self.target, streams))
        self.cpu_s.update(cpu_by_part(self.pid) - before)
        replies = [read_reply(exchange, new_tokens) for exchange in exchanges]
        for reply in replies:
            if reply.error is not None:
                raise ServerBenchError(reply.error)
        span_s = max(reply.ended_s for reply in replies) - min(reply.sent_s for reply in replies)
        self.span_s += span_s
        self.speeds.append(len(replies) * new_tokens / span_s)
        self.replies += replies
        return client_s

    def forget(self) -> None:
        self.speeds.clear()
        self.replies.clear()
        self.cpu_s.clear()
        self.span_s = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(reply.num_tokens for reply in self.replies)

    @property
    def num_pieces(self) -> int:
        return sum(len(reply.arrival_times_s) for reply in self.replies)

    def row(self) -> SideRow:
        ttfts = [reply.ttft_s for reply in self.replies]
        gaps = [gap for reply in self.replies for gap in reply.gaps_s]
        return SideRow(
            tokens_per_s=median(self.speeds),
            ttft_p50_ms=percentile_ms(ttfts, 50),
            ttft_p95_ms=percentile_ms(ttfts, 95),
            itl_p50_ms=percentile_ms(gaps, 50),
            itl_p95_ms=percentile_ms(gaps, 95),
            tokens_per_piece=self.num_tokens / self.num_pieces,
            pieces_per_s=self.num_pieces / self.span_s,
            cpu_us_per_token={part: used_s / self.num_tokens * 1e6 for part, used_s in self.cpu_s.items()},
        )


def cpu_by_part(pid: int) -> Counter[str]:
    """CPU seconds of a server's processes until now."""
    used_s: Counter[str] = Counter()
    for process in (pid, *descendants_of(pid)):
        if is_running(process):
            command = command_of(process)
            part = next((part for word, part in PARTS.items() if word in command), "Ray")
            # User and system time, after the name in parentheses; proc(5).
            fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            used_s[part] += (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return used_s


@dataclass(slots=True)
class Machine:
    """What the cores did since the last `begin`, besides this process and the servers."""

    pids: tuple[int, ...]
    _own_s: float = 0.0
    _busy_s: float = 0.0
    _all_s: float = 0.0

    def begin(self) -> None:
        self._own_s, self._busy_s, self._all_s = self._now()

    def others_share(self) -> float:
        own_s, busy_s, all_s = self._now()
        others_s = busy_s - self._busy_s - (own_s - self._own_s)
        return max(0.0, others_s / (all_s - self._all_s))

    def _now(self) -> tuple[float, float, float]:
        # User, nice, system, idle, waiting, two kinds of interrupts, stolen; proc(5).
        fields = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0].split()[1:9]
        ticks = list(map(int, fields))
        own_s = process_time() + sum(cpu_by_part(pid).total() for pid in self.pids)
        return own_s, (sum(ticks) - ticks[3] - ticks[4]) / TICKS_PER_S, sum(ticks) / TICKS_PER_S


def measure(plain: Side, replica: Side, model: str, new_tokens: int, per_stream: int, rounds: int) -> IngressRow:
    rng, cores = random.Random(SEED), Machine((plain.pid, replica.pid))
    client_s = 0.0
    for index in range(WARM_UP_ROUNDS + rounds):
        if index == WARM_UP_ROUNDS:
            plain.forget()
            replica.forget()
            client_s = 0.0
            cores.begin()
        prompts = [
            [tuple(rng.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS)) for _ in range(per_stream)]
            for _ in range(CONCURRENCY)
        ]
        # Each goes first as often as the other.
        for side in (plain, replica) if index % 2 else (replica, plain):
            client_s += side.run(prompts, new_tokens)
    others_share = cores.others_share()
    ratios = [theirs / ours for theirs, ours in zip(replica.speeds, plain.speeds, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    client_us = client_s / (plain.num_tokens + replica.num_tokens) * 1e6
    without, with_ray = plain.row(), replica.row()
    return IngressRow(
        model=model,
        ratio=middle,
        ratio_p25=low,
        ratio_p75=high,
        cpu_ratio=(client_us + without.cpu_us) / (client_us + with_ray.cpu_us),
        piece_cpu_ms=piece_cpu_ms(with_ray),
        plain=without,
        replica=with_ray,
        client_cpu_us_per_token=client_us,
        idle_cores=idle_cores(replica.pid),
        others_share=others_share,
        concurrency=CONCURRENCY,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=new_tokens,
        rounds=rounds,
        commit=commit(),
        machine=machine(),
    )


def piece_cpu_ms(row: SideRow) -> dict[str, float]:
    """CPU time of a piece of an answer, with its share of the request, by kind of process."""
    return {
        part: used_us * row.tokens_per_piece / 1000
        for part, used_us in row.cpu_us_per_token.items()
        if part != "engine"
    }


def idle_cores(pid: int) -> dict[str, float]:
    """What each kind of a server's processes uses while it has nothing to do."""
    before = cpu_by_part(pid)
    sleep(IDLE_LOOK_S)
    return {part: used_s / IDLE_LOOK_S for part, used_s in (cpu_by_part(pid) - before).items()}


def main() -> None:
    parser = ArgumentParser(description="what the way through Ray Serve costs")
    parser.add_argument("--shape", choices=SHAPE_NAMES, help="of random weights (default: the embedded model)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=4, help="of every stream in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file for the results")
    parsed = parser.parse_args()
    print(f"commit {commit() or 'unknown'}, {machine()}, {CONCURRENCY} streams, {parsed.rounds} rounds", flush=True)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shape = parsed.shape
        checkpoint = served_model(None, None, work) if shape is None else served_shape(shape, work)
        arguments = ["--model", str(checkpoint.directory), "--router", checkpoint.router, "--dtype", "bfloat16"]
        sides = []
        for more in ([], ["--replicas", "1"]):
            server = stack.enter_context(serving([*arguments, *more]))
            sides.append(Side(Target(server.url, checkpoint.directory.name), server.pid))
        row = measure(*sides, shape or MODEL_ID, parsed.new_tokens, parsed.answers, parsed.rounds)
    if parsed.json:
        write_row(parsed.json, asdict(row), first=True)
    print(f"{row.model}, answers of {row.new_tokens} tokens, other work on {row.others_share:.0%} of the cores")
    print(
        f"ratio {row.ratio:.3f} (quartiles {row.ratio_p25:.3f} to {row.ratio_p75:.3f}), by CPU time {row.cpu_ratio:.3f}"
    )
    print(f"client {row.client_cpu_us_per_token:.0f} us/token, cores without requests {_shown(row.idle_cores, 3)}")
    for name, side in (("plain", row.plain), ("replica", row.replica)):
        print(
            f"{name:8} {side.tokens_per_s:.0f} tokens/s, TTFT {side.ttft_p50_ms:.0f} ms (p95 {side.ttft_p95_ms:.0f}), "
            f"between pieces {side.itl_p50_ms:.1f} ms (p95 {side.itl_p95_ms:.1f}), "
            f"{side.tokens_per_piece:.1f} tokens a piece, {side.pieces_per_s:.0f} pieces/s, "
            f"us/token {_shown(side.cpu_us_per_token, 0)}; ms/piece {_shown(piece_cpu_ms(side), 2)}"
        )


def _shown(parts: Mapping[str, float], digits: int) -> str:
    return ", ".join(f"{part} {value:.{digits}f}" for part, value in sorted(parts.items()))


if __name__ == "__main__":
    main()
