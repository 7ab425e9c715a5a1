"""200 mixed requests while processes are killed, what their clients received, and that the ledger says the same."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from end_to_end.tenant_site import Served, bearer

NUM_REQUESTS = 200
LAYERS = 16
BUDGETS = {0.25: 4, 0.5: 8, 1.0: 16}
"""And the layers that each runs."""
MOST_AT_ONCE = 24
WORDS = ("dog", "cat", "seven", "river", "green", "house", "and", "story")


@dataclass
class Received:
    """What one client saw. `num_tokens` arrived; the other two are None unless the response has ended well."""

    tenant: str
    budget: float
    response_id: str = ""
    num_tokens: int = 0
    layer_tokens: float | None = None
    usage: dict[str, int] | None = None


async def ask(http: httpx.AsyncClient, site: Served, index: int, received: list[Received]) -> None:
    """One of: a whole stream, a stream that the client leaves, a plain response, a bad request."""
    rng = random.Random(index)
    got = Received(f"t{index % 3}", rng.choice(list(BUDGETS)))
    received.append(got)
    kind = rng.choice(("stream", "stream", "leave", "plain", "bad"))
    body: dict[str, Any] = {
        "model": "buddy-7m",
        "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))}],
        "budget": -1 if kind == "bad" else got.budget,
        "max_tokens": rng.randint(1, 350),
        "stream": kind in ("stream", "leave"),
        "stream_options": {"include_usage": True} if kind in ("stream", "leave") else None,
        "logprobs": True,
        "logit_bias": {"0": -100, "1": -100},
        "seed": index,
    }
    headers = bearer(f"sk-{got.tenant}")
    try:
        if kind in ("plain", "bad"):
            answer = (await http.post(f"{site.url}/v1/chat/completions", json=body, headers=headers)).json()
            take(got, answer)
            return
        async with http.stream("POST", f"{site.url}/v1/chat/completions", json=body, headers=headers) as response:
            most = rng.randint(1, 100) if kind == "leave" else None
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    take(got, json.loads(line.removeprefix("data: ")))
                if most is not None and got.num_tokens >= most:
                    return
    except (httpx.TransportError, json.JSONDecodeError):
        """The server was killed; what arrived before counts. Ray Serve's proxy says "Internal Server Error" for it."""


def take(got: Received, answer: dict[str, Any]) -> None:
    """Record a chunk of a stream, or a whole response."""
    if "error" in answer:
        return
    got.response_id = answer["id"]
    for choice in answer["choices"]:
        got.num_tokens += len((choice["logprobs"] or {}).get("content") or [])
    if answer.get("usage"):
        got.usage = answer["usage"]
    if "buddy" in answer:
        got.layer_tokens = answer["buddy"]["layer_tokens"]


async def exchange(site: Served, kills: Sequence[tuple[int, Callable[[], None]]]) -> list[Received]:
    """Send all requests. When as many as each of `kills` says have ended, it is called, and no more are sent until it
    returns."""
    received: list[Received] = []
    left = list(kills)
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        tasks: list[asyncio.Task[None]] = []
        for index in range(NUM_REQUESTS):
            while sum(not task.done() for task in tasks) >= MOST_AT_ONCE:
                await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
            if left and sum(task.done() for task in tasks) >= left[0][0]:
                await asyncio.to_thread(left.pop(0)[1])
            tasks.append(asyncio.create_task(ask(http, site, index, received)))
        await asyncio.gather(*tasks)
    assert not left
    return received


def check_ledger(rows: Mapping[str, Any], received: Sequence[Received], most_under_way: int) -> None:
    """`most_under_way` are tokens of a stream that were computed and had not reached its client."""
    begun = [got for got in received if got.response_id]
    finished = [got for got in begun if got.layer_tokens is not None]
    # Nothing that was begun is missing, and nothing is there that no client sent.
    assert {got.response_id for got in begun} <= set(rows)
    assert len(rows) <= sum(not _is_bad(index) for index in range(NUM_REQUESTS))
    for got in finished:
        row = rows[got.response_id]
        assert got.usage is not None
        assert (row.outcome, row.tenant) == ("finished", got.tenant)
        assert row.completion_tokens == got.usage["completion_tokens"]
        assert row.prompt_tokens == got.usage["prompt_tokens"]
        assert round(row.milli_layers / (1000 * LAYERS), 3) == got.layer_tokens
    for got in begun:
        row = rows[got.response_id]
        assert got.num_tokens <= row.completion_tokens <= got.num_tokens + most_under_way
        if row.completion_tokens:
            # Every token but the answer's last and cached ones has run exactly the layers of its budget.
            num_run = row.prompt_tokens - row.cached_tokens + row.completion_tokens - 1
            assert row.milli_layers == 1000 * BUDGETS[got.budget] * num_run
    outcomes = Counter(row.outcome for row in rows.values())
    # A row is written before the response's end, which a killed server may then not send.
    assert 80 < len(finished) <= outcomes["finished"] <= len(finished) + MOST_AT_ONCE
    assert outcomes["cancelled"] > 5
    assert outcomes["error"] > 5


def _is_bad(index: int) -> bool:
    rng = random.Random(index)
    rng.choice(list(BUDGETS))
    return rng.choice(("stream", "stream", "leave", "plain", "bad")) == "bad"
