"""Events of one answer become deltas, and all deltas add up to the answer."""

import random

import pytest

from buddy_server.api.fold import Delta, Fold, total
from buddy_server.engine.messages import AnswerEvent, FinishEvent, FinishReason, TokenEvent, Usage
from buddy_server.tools.pieces import CallPiece, TextPiece
from fakes.tool_parser import MarkedCalls

SAID = "So: <add>{1, 2}</> and <sub>{}</>, done"
PIECES = [
    TextPiece("So: "),
    CallPiece(0, "add", "{1, 2}"),
    TextPiece(" and "),
    CallPiece(1, "sub", "{}"),
    TextPiece(", done"),
]


def events_of(text: str, reason: FinishReason = "stop") -> list[AnswerEvent]:
    """One token per character, of which the last comes with the end."""
    return [*(TokenEvent(0, char, b"") for char in text[:-1]), FinishEvent(reason, Usage(0), text[-1])]


def deltas_of(fold: Fold, events: list[AnswerEvent], rng: random.Random) -> list[Delta]:
    """The deltas of `events` in groups of random size."""
    deltas = []
    while events:
        size = rng.randint(1, 9)
        deltas.append(fold.add(events[:size]))
        events = events[size:]
    return deltas


@pytest.mark.parametrize("seed", range(5))
def test_however_events_are_grouped_the_deltas_add_up_to_the_same(seed: int) -> None:
    rng = random.Random(seed)
    plain = total(deltas_of(Fold(), events_of(SAID), rng))
    assert (plain.pieces, plain.finish_reason) == ([TextPiece(SAID)], "stop")
    with_calls = total(deltas_of(Fold(MarkedCalls()), events_of(SAID), rng))
    assert (with_calls.pieces, with_calls.finish_reason) == (PIECES, "tool_calls")


def test_only_the_first_piece_of_a_call_has_its_name() -> None:
    fold = Fold(MarkedCalls())
    pieces = [piece for event in events_of("<f>12</>") for piece in fold.add([event]).pieces]
    assert pieces == [CallPiece(0, "f", ""), CallPiece(0, None, "1"), CallPiece(0, None, "2")]


def test_answer_that_was_cut_off_in_a_call_ends_with_length() -> None:
    assert Fold(MarkedCalls()).add(events_of("<f>{1", "length")).finish_reason == "length"


def test_tools_without_a_call_end_with_stop_and_all_of_the_text() -> None:
    delta = Fold(MarkedCalls()).add(events_of("2 <3"))
    assert (delta.pieces, delta.finish_reason) == ([TextPiece("2 <3")], "stop")
