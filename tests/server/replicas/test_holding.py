"""How long an ingress keeps the replicas that it knows, and tells them that it is there."""

import asyncio
import warnings
from collections import Counter
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from buddy_server.engine.messages import GenerationRequest, SamplingParams

with warnings.catch_warnings(action="ignore"):
    # Ray Serve uses what its libraries no longer recommend.
    from buddy_server.replicas import client
    from buddy_server.replicas.client import EngineReplicas


class Deployment:
    """A handle of a deployment without replicas, which counts what is asked of all."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[object, ...]] = Counter()
        self.generate = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._answer))
        self.answered = asyncio.Event()

    async def _answer(self, *_: object) -> AsyncGenerator[bytes, None]:
        await self.answered.wait()
        for message in ():
            yield message

    def broadcast(self, *call: object) -> Any:
        self.asked[call] += 1

        async def results_async(**_: object) -> list[bytes]:
            return []

        return SimpleNamespace(results_async=results_async)


@pytest.fixture
def deployment(monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setattr(client, "STAY_S", 0.03)
    return Deployment()


def replicas_of(deployment: Deployment) -> EngineReplicas:
    handle: Any = deployment
    ready: Any = SimpleNamespace(info=None)
    member: Any = SimpleNamespace(name="here")
    return EngineReplicas(handle, "version", ready, member, lambda _: None, lambda _: None)


@pytest.mark.parametrize("end", ["drain", "stop"])
def test_replicas_are_held_again_and_again_until_the_ingress_ends(deployment: Deployment, end: str) -> None:
    async def run() -> tuple[int, int]:
        engine = replicas_of(deployment)
        engine.start()
        await asyncio.sleep(0.3)
        while_open = deployment.asked["stay", "here"]
        if end == "drain":
            await engine.drain(1.0)
        else:
            await asyncio.to_thread(engine.stop)
        # One may be on its way.
        await asyncio.sleep(0)
        at_end = deployment.asked["stay", "here"]
        await asyncio.sleep(0.3)
        return while_open, deployment.asked["stay", "here"] - at_end

    while_open, afterwards = asyncio.run(run())
    assert while_open >= 5
    assert afterwards == 0


def test_replicas_are_held_while_the_last_answers_end(deployment: Deployment) -> None:
    async def run() -> tuple[int, int]:
        engine = replicas_of(deployment)
        engine.start()
        request = GenerationRequest("r", "acme", (1,), 4000, SamplingParams(1))
        answer = asyncio.create_task(anext(engine.submit(request)))
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(engine.drain(5.0))
        await asyncio.sleep(0.1)
        begun = deployment.asked["stay", "here"]
        await asyncio.sleep(0.2)
        under_way = deployment.asked["stay", "here"]
        deployment.answered.set()
        await asyncio.gather(answer, draining)
        return begun, under_way

    begun, under_way = asyncio.run(run())
    assert under_way >= begun + 3
