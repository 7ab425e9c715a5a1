"""What four greedy streams lose beside one with penalties and one with log probabilities:

    .venv/bin/python tests/bench/neighbours.py

The embedded model over HTTP, six streams side by side; rounds with and without the features take turns. Target: 0.85.
"""

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from buddy_server.bench.row import commit, machine
from buddy_server.bench.served import served_model
from buddy_server.bench.server_process import serving

NUM_ROUNDS = 11
NUM_GREEDY = 4
NEW_TOKENS = 600
PLAIN: list[dict[str, Any]] = [{}, {}]
FEATURES: list[dict[str, Any]] = [{"presence_penalty": 0.5, "frequency_penalty": 0.5}, {"logprobs": 5}]


async def tokens_per_s(client: httpx.AsyncClient, neighbours: list[dict[str, Any]]) -> float:
    """Of the greedy streams together, beside neighbours that outlive them."""

    async def stream(max_tokens: int, **fields: Any) -> int:
        body = {"model": "buddy-7m", "prompt": "Once upon a time", "temperature": 0, "stream": True, **fields}
        num_bytes = 0
        async with client.stream("POST", "/v1/completions", json={**body, "max_tokens": max_tokens}) as response:
            response.raise_for_status()
            async for part in response.aiter_raw():
                num_bytes += len(part)
        return num_bytes

    beside = [asyncio.create_task(stream(4 * NEW_TOKENS // 3, **fields)) for fields in neighbours]
    await asyncio.sleep(0.05)
    started_s = time.perf_counter()
    await asyncio.gather(*(stream(NEW_TOKENS) for _ in range(NUM_GREEDY)))
    passed_s = time.perf_counter() - started_s
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    return NUM_GREEDY * NEW_TOKENS / passed_s


async def measure(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await tokens_per_s(client, PLAIN)
        rounds = [(await tokens_per_s(client, PLAIN), await tokens_per_s(client, FEATURES)) for _ in range(NUM_ROUNDS)]
    print(f"commit {commit() or 'unknown'}, {machine()}, {NUM_ROUNDS} rounds")
    print(f"greedy tokens/s beside plain streams {median(plain for plain, _ in rounds):.0f}")
    print(f"beside penalties and logprobs=5      {median(other for _, other in rounds):.0f}")
    print(f"ratio                                {median(other / plain for plain, other in rounds):.2f}")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        served = served_model(None, None, Path(directory))
        with serving(["--model", str(served.directory), "--router", served.router]) as server:
            asyncio.run(measure(server.url))


if __name__ == "__main__":
    main()
