"""How much goes beside answers, from made-up times."""

import pytest

from buddy_server.engine.batch import Batch, BatchResult, Work
from buddy_server.engine.messages import GenerationRequest, SamplingParams
from buddy_server.engine.pace import BURST_S, FEWEST_ROWS, SLOWDOWN, STRETCH, Pace
from tiny_engine import new_sequence

MOST = 512


def answer() -> Work:
    sequence = new_sequence(GenerationRequest("a", "default", (1, 2), 2000, SamplingParams(9)))
    sequence.tokens.append(3)
    return Work(sequence, 2, 1, 2000)


def prefill(length: int) -> Work:
    return Work(new_sequence(GenerationRequest("p", "default", (1,) * 1000, 2000, SamplingParams(9))), 0, length, 2000)


def observe(pace: Pace, works: list[Work], num_steps: int, seconds: float) -> None:
    num_prefill = sum(work.length for work in works if not work.is_decode)
    pace.observe(Batch(works, num_prefill), BatchResult([], num_steps, 0, 0.0, seconds))


def test_nothing_is_held_back_while_nothing_is_known() -> None:
    pace = Pace()
    assert pace.prefill_rows(MOST, in_bursts=True) == MOST
    observe(pace, [prefill(128)], 1, 0.128)
    assert pace.prefill_rows(MOST, in_bursts=True) == MOST
    assert pace.burst_steps(64) == 64


@pytest.mark.parametrize("in_bursts", [True, False])
@pytest.mark.parametrize("num_steps", [1, 16])
def test_a_step_with_prefill_takes_the_allowed_stretch_of_a_gap(num_steps: int, in_bursts: bool) -> None:
    """Which is one step of answers, or the steps that reach the clients together."""
    pace = Pace()
    observe(pace, [prefill(128)], 1, 0.0128)
    observe(pace, [answer()], num_steps, 0.032)
    rows = pace.prefill_rows(MOST, in_bursts)
    assert rows % FEWEST_ROWS == 0
    gap_s = max(BURST_S, 0.032 / num_steps) if in_bursts else 0.032 / num_steps
    step_s = 0.032 / num_steps + rows * 0.0001
    assert STRETCH * gap_s - FEWEST_ROWS * 0.0001 <= step_s <= STRETCH * gap_s


def test_rows_that_grow_dearer_become_fewer_but_prefill_goes_on() -> None:
    pace = Pace()
    observe(pace, [answer()], 1, 0.010)
    observe(pace, [answer(), prefill(8)], 1, 0.012)
    before = pace.prefill_rows(MOST, in_bursts=True)
    for _ in range(20):
        observe(pace, [answer(), prefill(8)], 1, 0.018)
    assert FEWEST_ROWS <= pace.prefill_rows(MOST, in_bursts=True) < before
    for _ in range(50):
        observe(pace, [answer(), prefill(8)], 1, 10.0)
    assert pace.prefill_rows(MOST, in_bursts=True) == FEWEST_ROWS
    assert pace.prefill_rows(3, in_bursts=True) == 3


def test_one_outlier_changes_little() -> None:
    pace = Pace()
    observe(pace, [prefill(100)], 1, 0.1)
    observe(pace, [answer()], 1, 0.1)
    before = pace.prefill_rows(MOST, in_bursts=True)
    observe(pace, [answer()], 1, 100.0)
    assert pace.prefill_rows(MOST, in_bursts=True) <= 1.5 * before


def test_a_burst_may_come_to_twice_the_steps_that_fit() -> None:
    pace = Pace()
    observe(pace, [answer()], 4, 4 * BURST_S / 2.2)
    assert pace.burst_steps(64) == 5
    assert pace.burst_steps(3) == 3


def test_rows_beyond_a_fair_share_add_little_to_a_step() -> None:
    pace = Pace()
    assert pace.decode_rows(fair=8, wanted=64) == 64
    for _ in range(20):
        observe(pace, [answer()] * 20, 4, 4 * 0.42)
        observe(pace, [*[answer()] * 20, prefill(32)], 1, 0.42 + 32 * 0.001)
    assert pace.decode_rows(fair=18, wanted=64) == 18 + int(SLOWDOWN * 420)
    assert pace.decode_rows(fair=18, wanted=20) == 20
    observe(pace, [*[answer()] * 20, prefill(32)], 1, 100.0)
    assert pace.decode_rows(fair=18, wanted=64) > 18


def test_rows_that_cost_nothing_are_all_decoded() -> None:
    pace = Pace()
    for _ in range(40):
        observe(pace, [answer()] * 20, 1, 0.01)
        observe(pace, [*[answer()] * 20, prefill(32)], 1, 0.01)
    assert pace.decode_rows(fair=18, wanted=64) == 64
