"""What one member concludes from the entries of all."""

from collections.abc import Mapping

import pytest

from buddy_server.engine.messages import StepTime
from buddy_server.fleet.entry import Decision, EngineReport, Entry, encode_entry
from buddy_server.fleet.fleet import ALIVE_S, FORGET_S, Fleet
from fakes.clock import Clock


class Members:
    """Entries as members would write them."""

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}
        self._count = 0

    def write(self, name: str, engine: EngineReport | None = None, level: int | None = None) -> None:
        self._count += 1
        decision = None if level is None else Decision(level, {})
        self._entries[name] = encode_entry(Entry(self._count, engine, decision))

    def entries(self) -> Mapping[str, bytes]:
        return dict(self._entries)


def report(
    is_ready: bool = True,
    step_time: StepTime | None = None,
    served: dict[tuple[str, int], int] | None = None,
    waiting: frozenset[tuple[str, int]] = frozenset(),
) -> EngineReport:
    return EngineReport(is_ready, 1, 8, 0.5, 0.25, step_time or StepTime(), served or {}, waiting)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    return Fleet(clock)


@pytest.fixture
def members() -> Members:
    return Members()


def test_member_that_writes_nothing_new_is_gone(fleet: Fleet, members: Members, clock: Clock) -> None:
    members.write("a", report())
    members.write("b", report())
    fleet.update(members.entries())
    clock.now_s += ALIVE_S
    members.write("b", report())
    fleet.update(members.entries())
    assert list(fleet.engines) == ["b"]
    assert fleet.gone == []
    clock.now_s += FORGET_S
    members.write("b", report())
    fleet.update(members.entries())
    assert fleet.gone == ["a"]
    members.write("a", report())
    fleet.update(members.entries())
    assert "a" in fleet.engines


def test_engine_that_is_not_ready_takes_no_work(fleet: Fleet, members: Members) -> None:
    members.write("a", report(is_ready=False))
    fleet.update(members.entries())
    assert (fleet.engines, fleet.gone) == ({}, [])


def test_first_decider_that_is_alive_decides(fleet: Fleet, members: Members, clock: Clock) -> None:
    assert fleet.decision is None
    members.write("0", report())
    members.write("b", level=2)
    members.write("a", level=4)
    fleet.update(members.entries())
    assert fleet.decision == Decision(4, {})
    assert fleet.deciders == ["a", "b"]
    clock.now_s += ALIVE_S
    members.write("b", level=2)
    fleet.update(members.entries())
    assert fleet.decision == Decision(2, {})


def test_what_others_served_is_taken_once_and_not_from_before_they_were_seen(fleet: Fleet, members: Members) -> None:
    def taken(**served: dict[tuple[str, int], int]) -> dict[tuple[str, int], int]:
        for name, costs in served.items():
            members.write(name, report(served=costs))
        fleet.update(members.entries())
        return fleet.take_served("own")

    assert taken(own={("x", 0): 7}, a={("x", 0): 1000}) == {}
    assert taken(own={("x", 0): 9}, a={("x", 0): 1500, ("y", 1): 30}) == {("x", 0): 500, ("y", 1): 30}
    assert taken() == {}
    assert taken(b={("x", 0): 400}) == {}
    assert taken(a={("x", 0): 1600, ("y", 1): 30}, b={("x", 0): 500}) == {("x", 0): 200}
    assert taken(a={("x", 0): 20}) == {("x", 0): 20}


def test_tenants_that_wait_on_other_engines_are_those_of_engines_that_take_work(fleet: Fleet, members: Members) -> None:
    lines = {"own": ("x", 0), "a": ("y", 0), "b": ("z", 1), "loading": ("w", 0)}
    for name, line in lines.items():
        members.write(name, report(is_ready=name != "loading", waiting=frozenset([line])))
    fleet.update(members.entries())
    assert fleet.waiting_tenants("own") == {("y", 0), ("z", 1)}


def test_time_of_a_step_is_the_mean_over_all_engines_and_stays_until_there_is_news(
    fleet: Fleet, members: Members
) -> None:
    for seconds, num_steps in ((0.0, 0), (1.0, 10)):
        members.write("a", report(step_time=StepTime(seconds, num_steps)))
        members.write("b", report(step_time=StepTime(5 * seconds, 3 * num_steps)))
        fleet.update(members.entries())
    assert fleet.inter_token_s == pytest.approx(6.0 / 40)
    fleet.update(members.entries())
    assert fleet.inter_token_s == pytest.approx(6.0 / 40)
    members.write("a", report(step_time=StepTime(1.0, 10)))
    fleet.update(members.entries())
    assert fleet.inter_token_s == 0.0


def test_entry_of_another_version_is_passed_over(
    fleet: Fleet, members: Members, caplog: pytest.LogCaptureFixture
) -> None:
    members.write("a", report())
    for content in (b"", b"\xff"):
        fleet.update({**members.entries(), "b": content})
        assert list(fleet.engines) == ["a"]
    assert caplog.text.count("member of another version") == 1
