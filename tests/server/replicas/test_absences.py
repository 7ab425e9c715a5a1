"""When an ingress counts as gone."""

from buddy_server.replicas.absences import GONE_S, Absences
from fakes.clock import Clock


def test_only_who_is_missing_at_every_look_for_long_is_gone() -> None:
    clock = Clock()
    absences = Absences(clock)
    names = ["dead", "slow", "here"]
    assert absences.look(names, {"here", "slow"}) == set()
    clock.advance(GONE_S)
    assert absences.look(names, {"here"}) == {"dead"}
    clock.advance(GONE_S / 2)
    assert absences.look(names, {"here", "slow"}) == {"dead"}
    clock.advance(GONE_S / 2)
    assert absences.look(names, {"here"}) == {"dead"}
    clock.advance(GONE_S)
    assert absences.look(names, {"here"}) == {"dead", "slow"}
