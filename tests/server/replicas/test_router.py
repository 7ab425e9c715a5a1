"""Which replicas a router knows while they come and go."""

import asyncio
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from buddy_server.engine.messages import GenerationRequest, SamplingParams
from buddy_server.replicas.wire import VERSION

pytest.importorskip("ray")

with warnings.catch_warnings(action="ignore"):
    # Ray Serve uses what its libraries no longer recommend.
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID

    from buddy_server.replicas.router import PlacementRouter


@dataclass
class Replica:
    """What Ray Serve says of a replica."""

    replica_id: str
    version: str = "old"
    replica_metadata: dict[str, str] = field(init=False)
    max_ongoing_requests: int = 10

    def __post_init__(self) -> None:
        self.replica_metadata = {VERSION: self.version}


class Router:
    """A PlacementRouter of version "old", which asks replicas nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.router = PlacementRouter(DeploymentID("EngineReplica"), DeploymentHandleSource.REPLICA, event_loop=loop)
        self.router.initialize_state(version="old")
        self.router._probe_queue_lens = self._nothing  # type: ignore[method-assign]

    async def _nothing(self, *_: object) -> list[Any]:
        return []

    def update(self, *replicas: Replica) -> set[str]:
        """The ids of the replicas that the router knows, when Ray Serve runs these."""

        async def update() -> None:
            self.router.update_replicas(list(replicas))

        self._loop.run_until_complete(update())
        return set(self.router.curr_replicas)

    def send(self, method: str, argument: object, call_id: str = "") -> str:
        """The id of the replica that a call goes to."""
        metadata = SimpleNamespace(call_method=method, internal_request_id=call_id)
        call: Any = SimpleNamespace(metadata=metadata, args=[argument], future=Future())
        known = list(self.router.curr_replicas.values())
        first, *_ = self._loop.run_until_complete(self.router.choose_replicas(known, call))
        return str(first[0].replica_id)


def request(name: str) -> GenerationRequest:
    return GenerationRequest(name, "acme", (1, 2, 3), 4000, SamplingParams(5))


A, B, NEW = Replica("a"), Replica("b"), Replica("c", "new")


@pytest.fixture
def router() -> Iterator[Router]:
    loop = asyncio.new_event_loop()
    yield Router(loop)
    loop.close()


def test_replicas_of_another_version_are_not_known(router: Router) -> None:
    assert router.update(NEW) == set()
    assert router.update(A, NEW) == {"a"}


def test_a_replica_that_leaves_is_known_as_long_as_it_has_requests(router: Router) -> None:
    router.update(A)
    assert router.send("generate", request("one"), "call") == "a"
    assert router.update(B) == {"a", "b"}
    router.router.on_request_completed("a", "another call")
    assert set(router.router.curr_replicas) == {"a", "b"}
    router.router.on_request_completed("a", "call")
    assert set(router.router.curr_replicas) == {"b"}


def test_requests_avoid_a_replica_that_leaves_and_their_cancellation_finds_it(router: Router) -> None:
    router.update(A)
    router.send("generate", request("one"), "call")
    router.update(B)
    assert {router.send("generate", request(f"{index}"), f"{index}") for index in range(20)} == {"b"}
    assert router.send("cancel", "one") == "a"


def test_the_last_replicas_of_a_version_go_on_while_the_next_takes_over(router: Router) -> None:
    router.update(A, B)
    assert router.update(B, NEW) == {"b"}
    assert router.update(NEW) == {"b"}
    assert router.send("generate", request("one"), "call") == "b"
    router.router.on_request_completed("b", "call")
    assert set(router.router.curr_replicas) == {"b"}
    router.router.on_replica_actor_died("b")
    assert set(router.router.curr_replicas) == set()


def test_an_idle_replica_that_ends_without_a_successor_is_not_kept(router: Router) -> None:
    router.update(A)
    assert router.update() == set()
