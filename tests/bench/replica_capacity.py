"""How far replicas on Ray Serve go, and what is full first:

    .venv/bin/python tests/bench/replica_capacity.py --measure tests/bench/service_times.json
    .venv/bin/python tests/bench/replica_capacity.py --json tests/bench/replica_capacity.jsonl

The first command measures service times on this machine, the second one calculates with them.
"""

import json
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path

from buddy_server.bench.row import commit, machine, write_row
from capacity_model import FEWEST_STREAMS, Fleet, ServiceTimes, Traffic, bottleneck, fewest_ingresses, loads

TIMES = Path(__file__).with_name("service_times.json")
MOST_USED = 0.7
"""Of an ingress, where one more is due: above it, queues grow quickly."""


def main() -> None:
    parser = ArgumentParser(description="how far replicas on Ray Serve go")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="only measure the service times, into this file")
    parser.add_argument(
        "--times", type=Path, default=TIMES, help="measured service times (default: the committed ones)"
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 3, 10, 30, 100])
    parser.add_argument("--ingresses", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--proxies", type=int, help="of Ray's, one for each node (default: as many as ingresses)")
    parser.add_argument("--requests", type=float, default=8, help="a second, of a replica (default: %(default)g)")
    parser.add_argument("--tokens", type=float, default=2000, help="a second, of a replica (default: %(default)g)")
    parser.add_argument("--streams", type=float, default=50, help="at once, of a replica (default: %(default)g)")
    parser.add_argument("--postgres-cores", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file for the results, one object a line")
    parsed = parser.parse_args()
    if parsed.streams < FEWEST_STREAMS:
        parser.error(
            f"--streams: {parsed.streams:g}; allowed is {FEWEST_STREAMS:g} or more: pieces must grow with streams"
        )
    if parsed.measure:
        from service_times import measure

        row = {**asdict(measure()), "commit": commit(), "machine": machine()}
        parsed.measure.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        return
    measured = json.loads(parsed.times.read_text(encoding="utf-8"))
    print(f"service times of commit {measured.pop('commit')}, {measured.pop('machine')}, in microseconds:")
    times = ServiceTimes(**measured)
    print("  " + ", ".join(f"{name} {value:.0f}" for name, value in asdict(times).items()))
    traffic = Traffic(parsed.requests, parsed.tokens, parsed.streams)
    print(
        f"each replica: {traffic.requests_per_s:g} requests/s, {traffic.tokens_per_s:g} tokens/s, "
        f"{traffic.streams:g} streams, so {traffic.pieces_per_s:g} pieces/s; "
        f"{parsed.postgres_cores} cores for PostgreSQL\n"
    )
    names = [load.resource for load in loads(times, traffic, Fleet(1))]
    print(f"| replicas | ingresses | {' | '.join(names)} | full first | at requests/s | tokens/s |")
    print(f"|---:|---:|{'---:|' * len(names)}---|---:|---:|")
    first = True
    for replicas in parsed.replicas:
        needed = fewest_ingresses(times, traffic, replicas, MOST_USED)
        for ingresses in sorted({*parsed.ingresses, *([needed] if needed else [])}):
            fleet = Fleet(replicas, ingresses, parsed.proxies or ingresses, parsed.postgres_cores)
            all_loads = loads(times, traffic, fleet)
            full = bottleneck(all_loads)
            requests = full.room * replicas * traffic.requests_per_s
            tokens = full.room * replicas * traffic.tokens_per_s
            used = " | ".join(f"{load.utilisation:.2f}" for load in all_loads)
            mark = " *" if ingresses == needed else ""
            print(f"| {replicas} | {ingresses}{mark} | {used} | {full.resource} | {requests:.0f} | {tokens:.0f} |")
            if parsed.json:
                row = {
                    **asdict(fleet),
                    **asdict(traffic),
                    "utilisation": {load.resource: load.utilisation for load in all_loads},
                    "bottleneck": full.resource,
                    "full_at_requests_per_s": requests,
                    "full_at_tokens_per_s": tokens,
                }
                write_row(parsed.json, row, first)
                first = False
    print(f"\n* the fewest ingresses of which none is used more than {MOST_USED:.0%}")


if __name__ == "__main__":
    main()
