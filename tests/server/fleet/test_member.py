"""Members that hear of each other, on a board of each kind."""

from collections.abc import AsyncIterator, Callable

import pytest

from buddy_server.config import LimitSettings
from buddy_server.fleet.board import Board, MemoryBoard
from buddy_server.fleet.build import make_board
from buddy_server.fleet.entry import Decision
from buddy_server.fleet.member import FleetMember
from buddy_server.fleet.redis_board import RedisBoard
from fakes.engine import INFO, FakeEngine
from redis_process import RedisProcess, needs_redis

pytestmark = pytest.mark.anyio

Boards = Callable[[], Board]


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
async def boards(request: pytest.FixtureRequest) -> AsyncIterator[Boards]:
    """Gives one board to every member: the same, or a connection of its own to the same Redis."""
    made: list[Board] = []

    def make() -> Board:
        if request.param == "memory":
            made.append(made[0] if made else MemoryBoard())
        else:
            made.append(RedisBoard(request.getfixturevalue("redis").url, request.node.name))
        return made[-1]

    yield make
    for board in made:
        await board.close()


async def test_engines_hear_what_tenants_get_from_the_others(boards: Boards) -> None:
    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    members = [FleetMember(boards(), f"m{index}", engine) for index, engine in enumerate(engines)]
    for cost in (1000, 1500, 1500):
        engines[0].served = {("acme", 0): cost}
        engines[1].served = {("acme", 0): 10 * cost, ("hobby", 1): cost}
        for member in members:
            await member.exchange()
    for member in members:
        await member.exchange()
    assert engines[0].served_elsewhere == {("acme", 0): 5000, ("hobby", 1): 500}
    assert engines[1].served_elsewhere == {("acme", 0): 500}
    assert engines[2].served_elsewhere == {("acme", 0): 5500, ("hobby", 1): 500}


async def test_engines_hear_who_waits_on_the_others_until_nobody_does(boards: Boards) -> None:
    engines = [FakeEngine(), FakeEngine()]
    members = [FleetMember(boards(), f"m{index}", engine) for index, engine in enumerate(engines)]
    for waiting in (frozenset([("acme", 0)]), frozenset[tuple[str, int]]()):
        engines[0].waiting_tenants = waiting
        for member in members:
            await member.exchange()
        assert [engine.waiting_elsewhere for engine in engines] == [frozenset(), waiting]


async def test_one_member_decides_for_all_and_another_when_it_has_left(boards: Boards) -> None:
    engine = FakeEngine()
    replica = FleetMember(boards(), "0", engine)
    first, second = (FleetMember(boards(), name) for name in ("1", "2"))
    first.decide(Decision(4, {"free": 4000}))
    second.decide(Decision(8, {"free": 2000}))
    for member in (first, second, replica):
        await member.exchange()
    assert engine.limits == {"free": 4000}
    assert list(second.fleet.engines) == []
    await second.exchange()
    assert list(second.fleet.engines) == ["0"]
    await first.leave()
    await replica.exchange()
    assert engine.limits == {"free": 2000}


async def test_limits_stay_while_there_is_nobody_to_decide(boards: Boards) -> None:
    engine = FakeEngine()
    replica, ingress = FleetMember(boards(), "0", engine), FleetMember(boards(), "1")
    ingress.decide(Decision(4, {"free": 4000}))
    await ingress.exchange()
    await replica.exchange()
    await ingress.leave()
    await replica.exchange()
    assert engine.limits == {"free": 4000}


@needs_redis
async def test_while_redis_is_away_a_server_decides_for_itself(redis: RedisProcess) -> None:
    server = FakeEngine()
    other = FleetMember(RedisBoard(redis.url, "away"), "0")
    member = FleetMember(RedisBoard(redis.url, "away"), "1", server)
    other.decide(Decision(4, {"free": 4000}))
    member.decide(Decision(8, {"free": 2000}))
    await other.exchange()
    await member.exchange()
    assert (server.limits, member.is_reachable) == ({"free": 4000}, True)
    redis.kill()
    await member.exchange()
    assert (server.limits, member.is_reachable) == ({"free": 2000}, False)
    redis.start()
    for late in (other, member, other):
        await late.exchange()
    assert (server.limits, member.is_reachable) == ({"free": 4000}, True)
    assert list(other.fleet.engines) == ["1"]
    redis.kill()
    await other.exchange()
    assert list(other.fleet.engines) == ["1"], "without an engine of its own, it still knows those of the others"
    redis.start()
    await other.leave()
    await member.leave()


def test_servers_with_one_redis_share_a_board() -> None:
    assert isinstance(make_board(LimitSettings(), INFO), MemoryBoard)
    assert isinstance(make_board(LimitSettings("redis://127.0.0.1:1"), INFO), RedisBoard)
