"""How long an ingress keeps the replicas that it knows."""

import asyncio
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

with warnings.catch_warnings(action="ignore"):
    # Ray Serve uses what its libraries no longer recommend.
    from buddy_server.replicas import client
    from buddy_server.replicas.client import EngineReplicas


class Deployment:
    """A handle of a deployment without replicas, which counts what is asked of all."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.generate = SimpleNamespace(options=lambda **_: None)

    def broadcast(self, method: str, *_: object) -> Any:
        self.asked[method] += 1

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
    member: Any = None
    return EngineReplicas(handle, "version", ready, member, lambda _: None, lambda _: None)


@pytest.mark.parametrize("end", ["drain", "stop"])
def test_replicas_are_held_again_and_again_until_the_ingress_ends(deployment: Deployment, end: str) -> None:
    async def run() -> tuple[int, int]:
        engine = replicas_of(deployment)
        engine.start()
        await asyncio.sleep(0.3)
        while_open = deployment.asked["stay"]
        if end == "drain":
            await engine.drain(1.0)
        else:
            await asyncio.to_thread(engine.stop)
        # One may be on its way.
        await asyncio.sleep(0)
        at_end = deployment.asked["stay"]
        await asyncio.sleep(0.3)
        return while_open, deployment.asked["stay"] - at_end

    while_open, afterwards = asyncio.run(run())
    assert while_open >= 5
    assert afterwards == 0
