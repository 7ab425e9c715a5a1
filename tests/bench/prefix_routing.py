"""What routing by cached prefix does for replicas:

    .venv/bin/python tests/bench/prefix_routing.py --json tests/bench/prefix_routing.jsonl

Two replicas of a tiny random model on Ray Serve, once with our router and once with Ray Serve's own, the power of two
choices. Eight clients ask for every prefix of 2048 tokens once, then for each of them again, in another order and with
another end. Target: 0.9 of the second requests find it.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import monotonic

import httpx

from buddy_server.bench.row import commit, machine, write_row
from buddy_server.bench.server_process import free_port

TESTS = Path(__file__).parents[1]
SEED = 0
NUM_PREFIXES = 60
PREFIX_TOKENS = 2048
END_TOKENS = 60
NEW_TOKENS = 16
CONCURRENCY = 8
VOCAB_SIZE = 97
CONTEXT = 4096
START_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class RoutingRow:
    """`found_share` of the second requests found the whole prefix. Times are medians of whole requests."""

    router: str
    replicas: int
    found_share: float
    first_s: float
    second_s: float
    concurrency: int
    prefix_tokens: int
    commit: str
    machine: str


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--serve", nargs=3, help="used by this script: the router, the model, the port")
    parsed = parser.parse_args()
    if parsed.serve:
        serve(*parsed.serve, parsed.replicas)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model")
        for index, router in enumerate(("placement", "ray")):
            row = measure(router, model, parsed.replicas)
            times = f"{row.first_s:.2f} s the first time, {row.second_s:.2f} s the second"
            print(f"{router:10} {row.found_share:.2f} found, {times}")
            if parsed.json:
                write_row(parsed.json, asdict(row), first=index == 0)


def serve(router: str, model: str, port: str, num_replicas: int) -> None:
    """`buddy serve --replicas`, with the router of that name."""
    from ray.serve.config import RequestRouterConfig

    from buddy_server.replicas import application
    from buddy_server.replicas.local import serve_replicas
    from buddy_server.serve import ServeOptions

    if router == "ray":
        application.RequestRouterConfig = lambda **_: RequestRouterConfig()
    serve_replicas(ServeOptions(model=model, port=int(port), device="cpu", dtype="float32"), num_replicas, num_replicas)


def save_model(directory: Path) -> Path:
    """A model of random weights, whose context holds the prompts, and which no token ends."""
    sys.path.insert(0, str(TESTS))
    from tiny_engine import save_tiny_model

    save_tiny_model("llama", directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}))
    return directory


def measure(router: str, model: Path, num_replicas: int) -> RoutingRow:
    port = free_port()
    command = [sys.executable, __file__, "--replicas", str(num_replicas), "--serve", router, str(model), str(port)]
    process = subprocess.Popen(command, process_group=0)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            wait_until_ready(http, process)
            (model_id,) = (entry["id"] for entry in http.get("/v1/models").json()["data"])
            draw = random.Random(SEED)
            prefixes = [tuple(draw.randrange(VOCAB_SIZE) for _ in range(PREFIX_TOKENS)) for _ in range(NUM_PREFIXES)]
            first = ask_all(http, model_id, prefixes, draw)
            draw.shuffle(prefixes)
            second = ask_all(http, model_id, prefixes, draw)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return RoutingRow(
        router=router,
        replicas=num_replicas,
        found_share=sum(found for _, found in second) / len(second),
        first_s=median(seconds for seconds, _ in first),
        second_s=median(seconds for seconds, _ in second),
        concurrency=CONCURRENCY,
        prefix_tokens=PREFIX_TOKENS,
        commit=commit(),
        machine=machine(),
    )


def wait_until_ready(http: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    deadline_s = monotonic() + START_TIMEOUT_S
    while True:
        try:
            if http.get("/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or monotonic() > deadline_s:
            raise RuntimeError("the server did not start")


def ask_all(
    http: httpx.Client, model_id: str, prefixes: Sequence[tuple[int, ...]], draw: random.Random
) -> list[tuple[float, bool]]:
    """For each prefix the seconds that its request took, and whether all of the prefix was found."""
    prompts = [[*prefix, *(draw.randrange(VOCAB_SIZE) for _ in range(END_TOKENS))] for prefix in prefixes]

    def ask(prompt: list[int]) -> tuple[float, bool]:
        started_s = monotonic()
        body = {"model": model_id, "prompt": prompt, "max_tokens": NEW_TOKENS, "budget": 1.0}
        usage = http.post("/v1/completions", json=body).raise_for_status().json()["usage"]
        return monotonic() - started_s, usage["prompt_tokens_details"]["cached_tokens"] >= PREFIX_TOKENS

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(ask, prompts))


if __name__ == "__main__":
    main()
