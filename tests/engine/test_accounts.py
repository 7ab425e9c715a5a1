"""Every request leaves exactly one account, whatever ended it, and they add up to what the engine says it ran."""

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import aclosing

import pytest

from buddy_server.engine.messages import Account, StepStats, TokenEvent
from buddy_server.engine.process import EngineProcess
from buddy_server.engine.settings import EnginePlan, EngineSettings
from buddy_server.engine.worker_process import WorkerProcess
from tiny_engine import TinySite, make_request

NUM_REQUESTS = 500
KILL_AFTER = (120, 300)
"""Requests that have been sent."""
TIMEOUT_S = 400.0


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_accounts_add_up_over_cancels_and_a_process_killed_twice(tiny: TinySite, anyio_backend: str) -> None:
    rng = random.Random(0)
    plan = EnginePlan(str(tiny.model), str(tiny.router), EngineSettings(max_sequences=8), "cpu", "float32")
    accounts: list[Account] = []
    steps: list[StepStats] = []
    worker = WorkerProcess(plan)
    engine = EngineProcess(plan, worker, worker.wait_until_ready(), steps.append, settle=accounts.append)
    engine.start()
    received: Counter[str] = Counter()

    async def ask(index: int) -> None:
        request = make_request(
            f"r{index}", rng.randint(1, 150), rng.choice((3, 4, 6)), index, f"t{index % 3}", max_tokens=250
        )
        most = rng.randint(1, 180) if index % 3 == 0 else None
        async with aclosing(engine.submit(request)) as events:
            async for together in events:
                received[request.request_id] += sum(isinstance(event, TokenEvent) for event in together)
                if most is not None and received[request.request_id] >= most:
                    return

    async with asyncio.timeout(TIMEOUT_S):
        asked: list[asyncio.Task[None]] = []
        for index in range(NUM_REQUESTS):
            while not engine.is_ready or sum(not one.done() for one in asked) > 30:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            if index in KILL_AFTER:
                while engine.num_running < 8:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                pid = engine.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            asked.append(asyncio.create_task(ask(index)))
        await asyncio.gather(*asked)
        while len(accounts) < NUM_REQUESTS:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.to_thread(engine.stop)

    assert Counter(account.request_id for account in accounts) == Counter(f"r{i}" for i in range(NUM_REQUESTS))
    reasons = Counter(account.reason for account in accounts)
    assert reasons["length"] > 200
    assert reasons["cancelled"] > 80
    assert reasons["lost"] > 8
    for tenant in ("t0", "t1", "t2"):
        counts = [step.depth[tenant] for step in steps if tenant in step.depth]
        charged = sum(account.usage.cost for account in accounts if account.tenant == tenant)
        assert charged == sum(count.executed - count.uncharged for count in counts) > 0
        assert engine.served[tenant, 0] == charged
    for account in accounts:
        assert account.usage.completion_tokens >= received[account.request_id]
