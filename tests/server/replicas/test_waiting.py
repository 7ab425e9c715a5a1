"""How late requests are, and what waits."""

import pytest

from buddy_server.engine.messages import (
    DepthCount,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    StartEvent,
    StepStats,
    TokenEvent,
    Usage,
)
from buddy_server.replicas.waiting import WINDOW_S, WaitingRequests

FULL_COST = 4000
"""Of a token: four layers."""
TOKEN = TokenEvent(1, "a", b"")


def request(name: str, num_prompt: int = 100, max_tokens: int = 50, max_cost: int = FULL_COST) -> GenerationRequest:
    return GenerationRequest(name, "acme", (0,) * num_prompt, max_cost, SamplingParams(max_tokens))


def steps(layer_tokens: int) -> StepStats:
    return StepStats(1, 1, 1, 4, 0, 0.0, {"acme": DepthCount(executed=layer_tokens * FULL_COST)})


@pytest.fixture
def waiting() -> WaitingRequests:
    return WaitingRequests(FULL_COST)


def test_a_request_that_has_not_begun_waits_with_all_it_may_cost(waiting: WaitingRequests) -> None:
    waiting.add(request("whole"), 0.0)
    waiting.add(request("half", max_cost=FULL_COST // 2), 0.0)
    assert waiting.report(1.0) == (150 + 75, 1.0, 0.0)


def test_one_that_has_begun_waits_with_its_prompt_until_its_first_token(waiting: WaitingRequests) -> None:
    waiting.add(request("one"), 0.0)
    waiting.hear("one", [StartEvent(0.0)], 0.0)
    assert waiting.report(0.0)[0] == 100
    waiting.hear("one", [TOKEN], 1.0)
    assert waiting.report(1.0)[0] == 0


def test_what_a_prompt_takes_itself_is_not_late(waiting: WaitingRequests) -> None:
    waiting.add(request("one"), 0.0)
    waiting.hear("one", [StartEvent(0.0)], 0.0)
    waiting.ran(steps(100))
    waiting.hear("one", [TOKEN], 2.0)
    assert waiting.report(2.0)[1] == 0.0


def test_what_others_run_before_the_first_token_is_late(waiting: WaitingRequests) -> None:
    waiting.ran(steps(1000))
    waiting.add(request("one"), 0.0)
    waiting.hear("one", [StartEvent(0.5)], 0.5)
    waiting.ran(steps(400))
    assert waiting.report(2.0)[1] == pytest.approx(2.0 * 3 / 4)
    waiting.hear("one", [StartEvent(0.0), TOKEN], 4.0)
    assert waiting.report(4.0)[1] == pytest.approx(4.0 * 3 / 4)


def test_the_wait_for_the_first_step_is_late_even_if_nothing_ran(waiting: WaitingRequests) -> None:
    waiting.add(request("one"), 0.0)
    waiting.hear("one", [StartEvent(3.0)], 3.0)
    waiting.ran(steps(100))
    waiting.hear("one", [TOKEN], 4.0)
    assert waiting.report(4.0)[1] == 3.0


def test_a_wait_that_is_over_counts_for_a_while(waiting: WaitingRequests) -> None:
    waiting.add(request("one"), 0.0)
    waiting.hear("one", [StartEvent(2.0)], 2.0)
    waiting.remove("one", 2.0)
    assert waiting.report(2.0 + WINDOW_S)[1] == 2.0
    assert waiting.report(2.1 + WINDOW_S)[1] == 0.0


def test_a_request_that_ends_without_a_token_waits_no_longer(waiting: WaitingRequests) -> None:
    waiting.add(request("gone"), 0.0)
    waiting.hear("gone", [FinishEvent("cancelled", Usage(100))], 1.0)
    waiting.remove("gone", 1.0)
    waiting.remove("gone", 1.0)
    waiting.hear("gone", [TOKEN], 2.0)
    assert waiting.report(2.0)[0] == 0


def test_what_ran_is_told_per_second_since_the_last_report(waiting: WaitingRequests) -> None:
    waiting.ran(steps(1000))
    waiting.report(10.0)
    waiting.ran(steps(300))
    waiting.ran(steps(100))
    assert waiting.report(12.0)[2] == 200
    assert waiting.report(14.0)[2] == 0
