"""What each step computes, without a model: tokens are made up, blocks and lanes are real."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from buddy_server.engine.batch import Work
from buddy_server.engine.fair_share import FairShare
from buddy_server.engine.messages import GenerationRequest, SamplingParams
from buddy_server.engine.pace import BURST_S, Pace
from buddy_server.engine.prefix_keys import PrefixKeys
from buddy_server.engine.scheduler import Scheduler
from buddy_server.engine.sequence import Sequence
from made_up_steps import ROUTE_BLOCK, SUMS, add, commit, make_scheduler
from tiny_engine import SlowPace, new_sequence

TENANTS = ("acme", "hobby")


def names(queue: FairShare) -> list[str]:
    return [sequence.request.request_id for sequence in all_waiting(queue)]


def all_waiting(queue: FairShare) -> list[Sequence]:
    """Tenant by tenant, each in order; they stay."""
    return [sequence for line in queue._lines.values() for sequence in line.waiting]


def request(name: str, num_prompt: int, max_tokens: int = 4) -> GenerationRequest:
    return GenerationRequest(name, "default", (7,) * num_prompt, 2000, SamplingParams(max_tokens))


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step; its work as (request, start, length)."""
    batch = scheduler.schedule()
    seen = [(work.sequence.request.request_id, work.start, work.length) for work in batch.works]
    commit(scheduler, batch)
    return seen


def steps(scheduler: Scheduler) -> Iterator[list[tuple[str, int, int]]]:
    while scheduler.has_work:
        yield step(scheduler)


def test_short_prompt_is_one_segment_then_one_token_a_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, request("a", 5, max_tokens=3))
    assert list(steps(scheduler)) == [[("a", 0, 5)], [("a", 5, 1)], [("a", 6, 1)]]
    assert scheduler.pool.num_free == 100


def test_long_prompt_is_cut_at_absolute_route_blocks_under_the_token_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=20)
    add(scheduler, request("a", 43, max_tokens=1))
    # Two blocks of 8 fit in 20 tokens; the 4 left over hold no third.
    assert list(steps(scheduler)) == [
        [("a", 0, 8), ("a", 8, 8)],
        [("a", 16, 8), ("a", 24, 8)],
        [("a", 32, 8), ("a", 40, 3)],
    ]


def test_newcomers_prefill_beside_those_who_decode_and_decode_comes_first() -> None:
    scheduler = make_scheduler()
    add(scheduler, request("a", 5))
    assert step(scheduler) == [("a", 0, 5)]
    add(scheduler, request("b", 10))
    assert step(scheduler) == [("a", 5, 1), ("b", 0, 8), ("b", 8, 2)]
    assert step(scheduler) == [("a", 6, 1), ("b", 10, 1)]


def test_decode_takes_its_share_of_the_budget_before_prefill() -> None:
    scheduler = make_scheduler(max_sequences=4, max_step_tokens=16)
    for name in ("a", "b", "c"):
        add(scheduler, request(name, 1))
    step(scheduler)
    add(scheduler, request("d", 30))
    # 16 less 3 leaves 13: one route block, not two.
    assert step(scheduler) == [("a", 1, 1), ("b", 1, 1), ("c", 1, 1), ("d", 0, 8)]


def test_who_came_first_is_served_first() -> None:
    scheduler = make_scheduler(max_sequences=2)
    for name in ("a", "b", "c", "d"):
        add(scheduler, request(name, 3, max_tokens=1))
    order = [name for works in steps(scheduler) for name, _, _ in works]
    assert order == ["a", "b", "c", "d"]


def test_tokens_left_over_by_a_long_prompt_go_to_the_next_and_delay_it_by_nothing() -> None:
    scheduler = make_scheduler(max_step_tokens=12)
    add(scheduler, request("long", 24, max_tokens=1))
    add(scheduler, request("short", 2, max_tokens=1))
    assert list(steps(scheduler)) == [
        [("long", 0, 8), ("short", 0, 2)],
        [("long", 8, 8)],
        [("long", 16, 8)],
    ]


def test_prompt_waits_until_all_its_blocks_are_free() -> None:
    scheduler = make_scheduler(num_blocks=6)
    add(scheduler, request("a", 12, max_tokens=2))
    add(scheduler, request("b", 16, max_tokens=1))
    assert step(scheduler) == [("a", 0, 8), ("a", 8, 4)]
    assert names(scheduler.fair_share) == ["b"]
    assert scheduler.pool.num_free == 3
    assert list(steps(scheduler)) == [[("a", 12, 1)], [("b", 0, 8), ("b", 8, 8)]]


def test_latest_is_preempted_and_computed_anew_when_blocks_run_out() -> None:
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, request("a", 7, max_tokens=6))
    add(scheduler, request("b", 7, max_tokens=6))
    assert step(scheduler) == [("a", 0, 7), ("b", 0, 7)]
    assert step(scheduler) == [("a", 7, 1), ("b", 7, 1)]
    # Both want a third block of 4 and one is free: b gives its two.
    assert step(scheduler) == [("a", 8, 1)]
    b = scheduler.fair_share.peek()
    assert b is not None
    assert len(scheduler.fair_share) == 1
    assert (b.lane, b.num_computed, b.block_table, b.num_output) == (-1, 0, [], 2)
    scheduler.check_idle()
    rest = list(steps(scheduler))
    # Prompt again in its blocks, then the two known outputs as the segments of one they were.
    assert [("b", 0, 7), ("b", 7, 1), ("b", 8, 1)] in rest
    assert scheduler.pool.num_free == 5


def test_preempted_request_goes_before_those_who_never_ran() -> None:
    scheduler = make_scheduler(num_blocks=5, max_sequences=2)
    for name in ("a", "b", "c"):
        add(scheduler, request(name, 7, max_tokens=6))
    for _ in range(3):
        step(scheduler)
    assert names(scheduler.fair_share) == ["b", "c"]


def test_latest_gives_way_itself_when_it_needs_the_block() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, request("a", 8, max_tokens=4))
    add(scheduler, request("b", 4, max_tokens=4))
    assert step(scheduler) == [("a", 0, 8), ("b", 0, 4)]
    batch = scheduler.schedule()
    assert [(work.sequence.request.request_id, work.start) for work in batch.works] == [("a", 8)]
    assert commit(scheduler, batch).stats.num_preemptions == 1
    assert scheduler.pool.num_free == 1


def test_none_starts_unless_each_that_runs_can_have_one_more_block() -> None:
    scheduler = make_scheduler(num_blocks=6)
    for name in ("a", "b", "c"):
        add(scheduler, request(name, 7, max_tokens=2))
    assert step(scheduler) == [("a", 0, 7), ("b", 0, 7)]
    assert scheduler.pool.num_free == 2


def test_none_starts_in_a_step_whose_decodes_had_to_preempt() -> None:
    scheduler = make_scheduler(num_blocks=8)
    add(scheduler, request("a", 8, max_tokens=9))
    add(scheduler, request("b", 20, max_tokens=9))
    step(scheduler)
    add(scheduler, GenerationRequest("c", "other", (7,) * 4, 2000, SamplingParams(4)))
    batch = scheduler.schedule()
    # a took the last block, b gave way; what it had would have been enough for c.
    assert [work.sequence.request.request_id for work in batch.works] == ["a"]
    assert scheduler.pool.num_free == 5
    commit(scheduler, batch)
    assert [work.sequence.request.request_id for work in scheduler.schedule().works] == ["a", "c"]


def test_step_that_failed_after_a_preemption_keeps_nobody_waiting() -> None:
    scheduler = make_scheduler(num_blocks=5)
    sequences = [add(scheduler, request(name, 8, max_tokens=9)) for name in ("a", "b")]
    step(scheduler)
    assert len(scheduler.schedule().works) == 1
    for sequence in sequences:
        scheduler.finish(sequence)
    add(scheduler, request("c", 4))
    assert step(scheduler) == [("c", 0, 4)]


def test_keys_of_a_prompt_are_made_once_if_its_depth_is_limited_before_it_is_added() -> None:
    scheduler = make_scheduler(prefix_cache=True)
    keys = CountingKeys("router", ROUTE_BLOCK)
    scheduler._prefix_keys = keys
    sequence = new_sequence(request("a", 20))
    scheduler.change_depth(sequence, 3000)
    scheduler.add(sequence)
    assert keys.max_costs == [3000]
    assert sequence.prefix_keys == keys.of(sequence.request, 3000)
    scheduler.change_depth(sequence, 2000)
    assert sequence.prefix_keys == keys.of(sequence.request, 2000)


class CountingKeys(PrefixKeys):
    """Remembers the costs of the keys that it made."""

    def __init__(self, router_id: str, route_block: int) -> None:
        super().__init__(router_id, route_block)
        self.max_costs: list[int] = []

    def of(self, request: GenerationRequest, max_cost: int) -> tuple[bytes, ...]:
        self.max_costs.append(max_cost)
        return super().of(request, max_cost)


def test_finish_takes_everything_back_wherever_the_request_stands() -> None:
    scheduler = make_scheduler(max_sequences=2, max_step_tokens=12)
    decoding = add(scheduler, request("decoding", 3))
    step(scheduler)
    prefilling = add(scheduler, request("prefilling", 20))
    step(scheduler)
    waiting = add(scheduler, request("waiting", 3))
    assert 0 < prefilling.num_computed < prefilling.num_prompt
    for sequence in (waiting, prefilling, decoding):
        scheduler.finish(sequence)
        scheduler.check_idle()
    scheduler.finish(decoding)
    assert (scheduler.has_work, scheduler.pool.num_free) == (False, 100)


def test_prompt_goes_on_behind_the_full_blocks_that_another_has_computed() -> None:
    scheduler = make_scheduler(prefix_cache=True)
    add(scheduler, request("a", 20, max_tokens=1))
    assert list(steps(scheduler)) == [[("a", 0, 8), ("a", 8, 8), ("a", 16, 4)]]
    assert (scheduler.pool.num_idle, scheduler.pool.num_free, scheduler.pool.usage_ratio) == (4, 100, 0)
    b = add(scheduler, request("b", 30, max_tokens=1))
    batch = scheduler.schedule()
    assert [(work.start, work.length) for work in batch.works] == [(16, 8), (24, 6)]
    assert (b.num_restored, b.restored_sums) == (16, SUMS)
    scheduler.check_idle()


@pytest.mark.parametrize(("num_prompt", "start"), [(7, 0), (8, 0), (9, 8), (16, 8), (17, 16), (24, 16)])
def test_last_token_of_a_prompt_is_always_computed(num_prompt: int, start: int) -> None:
    scheduler = make_scheduler(prefix_cache=True)
    for name in ("a", "b"):
        add(scheduler, request(name, num_prompt, max_tokens=1))
        last = list(steps(scheduler))
    assert last[0][0] == ("b", start, min(8, num_prompt - start))
    assert sum(length for works in last for _, _, length in works) == num_prompt - start


def test_block_computed_twice_at_the_same_time_is_kept_once() -> None:
    scheduler = make_scheduler(prefix_cache=True)
    # The route block with the last prompt token, which nobody reuses.
    a, b = (add(scheduler, request(name, 8)) for name in ("a", "b"))
    assert step(scheduler) == [("a", 0, 8), ("b", 0, 8)]
    assert a.block_table == b.block_table
    assert scheduler.pool.num_free == 98
    scheduler.check_idle()
    scheduler.finish(a)
    scheduler.check_idle()
    scheduler.finish(b)
    assert (scheduler.pool.num_free, scheduler.pool.num_idle) == (100, 2)


def test_those_who_wait_for_their_turn_find_what_the_first_has_computed_meanwhile() -> None:
    scheduler = make_scheduler(max_step_tokens=20, prefix_cache=True)
    for name in ("a", "b"):
        add(scheduler, request(name, 28, max_tokens=1))
    assert list(steps(scheduler)) == [
        [("a", 0, 8), ("a", 8, 8)],
        [("a", 16, 8), ("a", 24, 4)],
        [("b", 24, 4)],
    ]
    scheduler.check_idle()


def test_of_equal_prompts_that_come_together_the_first_computes_and_the_others_wait() -> None:
    scheduler = make_scheduler(prefix_cache=True)
    for name, token in (("a", 7), ("b", 7), ("other", 8), ("c", 7)):
        add(scheduler, GenerationRequest(name, "default", (token,) * 12, 2000, SamplingParams(2)))
    assert step(scheduler) == [("a", 0, 8), ("a", 8, 4), ("other", 0, 8), ("other", 8, 4)]
    assert step(scheduler) == [("a", 12, 1), ("other", 12, 1), ("b", 8, 4), ("c", 8, 4)]
    assert list(steps(scheduler)) == [[("b", 12, 1), ("c", 12, 1)]]
    scheduler.check_idle()


def test_scored_prompt_is_computed_whole_and_fills_the_cache() -> None:
    scheduler = make_scheduler(prefix_cache=True)
    for _ in range(2):
        scored = GenerationRequest("s", "default", (7,) * 20, 2000, SamplingParams(1, prompt_logprobs=0))
        add(scheduler, scored)
        assert list(steps(scheduler)) == [[("s", 0, 8), ("s", 8, 8), ("s", 16, 4)]]
    add(scheduler, request("b", 20, max_tokens=1))
    assert list(steps(scheduler)) == [[("b", 16, 4)]]


def test_preempted_request_comes_back_to_its_own_blocks() -> None:
    scheduler = make_scheduler(num_blocks=6, prefix_cache=True)
    add(scheduler, request("a", 7, max_tokens=6))
    add(scheduler, GenerationRequest("b", "default", (8,) * 12, 2000, SamplingParams(6)))
    seen = list(steps(scheduler))
    # Of its prompt the full block was still there; the rest, and the outputs known by then, are computed again.
    assert [("b", 8, 4), ("b", 12, 1), ("b", 13, 1)] in seen
    assert scheduler.pool.num_free == 6


def test_idle_blocks_never_keep_a_request_out() -> None:
    scheduler = make_scheduler(num_blocks=6, prefix_cache=True)
    for token in range(5):
        sequence = add(scheduler, GenerationRequest("r", "default", (token,) * 23, 2000, SamplingParams(1)))
        assert step(scheduler) == [("r", 0, 8), ("r", 8, 8), ("r", 16, 7)]
        assert sequence not in scheduler.running
        scheduler.check_idle()


def test_request_that_cannot_be_let_in_yet_holds_nothing() -> None:
    scheduler = make_scheduler(num_blocks=7, prefix_cache=True)
    add(scheduler, request("a", 9, max_tokens=9))
    step(scheduler)
    waiting = add(scheduler, request("b", 24, max_tokens=1))
    # It shares 2 of its 6 blocks and needs 4; a holds 3 of 7, and soon more.
    scheduler.pool.grow(scheduler.running[0].block_table, 16)
    assert step(scheduler) == [("a", 9, 1)]
    assert (waiting.block_table, waiting.num_computed, waiting.num_restored) == ([], 0, 0)
    scheduler.check_idle()
    assert [works[0][0] for works in steps(scheduler)][-1] == "b"


def test_route_block_of_no_whole_blocks_cannot_be_cached() -> None:
    with pytest.raises(ValueError, match="route_block 8 cannot be cached: allowed are multiples of block_size 3"):
        make_scheduler(block_size=3, prefix_cache=True)


def test_tokens_are_charged_once_however_often_they_are_computed() -> None:
    sequence = new_sequence(request("a", 10))
    assert sequence.charge(0, 8, 2000) == 16000
    assert sequence.charge(0, 8, 2000) == 0
    assert sequence.charge(8, 2, 3000) == 6000
    sequence.tokens += [7, 7]
    assert sequence.charge(10, 1, 4000) == 4000
    assert sequence.charge(10, 1, 4000) == 0
    assert (sequence.usage.prompt_cost, sequence.usage.output_cost) == (22000, 4000)
    assert [Work(sequence, start, 1, 2000).makes_token for start in (10, 11)] == [False, True]


def test_step_budget_too_small_for_a_full_batch_and_a_route_block_is_refused() -> None:
    make_scheduler(max_sequences=4, max_step_tokens=12)
    with pytest.raises(ValueError, match=r"max_step_tokens 11 is too small.*max_sequences 4 \+ route_block 8"):
        make_scheduler(max_sequences=4, max_step_tokens=11)


def test_request_larger_than_the_cache_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="can never fit"):
        add(make_scheduler(num_blocks=4), request("a", 13, max_tokens=4))


def test_prefill_beside_answers_is_cut_into_pieces_that_keep_their_pace() -> None:
    scheduler = make_scheduler()
    scheduler.pace = SlowPace()
    add(scheduler, request("a", 5, max_tokens=9))
    assert step(scheduler) == [("a", 0, 5)]
    add(scheduler, request("b", 10))
    batch = scheduler.schedule()
    assert [(w.start, w.length, w.ahead, w.continues) for w in batch.works[1:]] == [(0, 3, 5, False)]
    commit(scheduler, batch)
    batch = scheduler.schedule()
    assert [(w.start, w.length, w.ahead, w.continues) for w in batch.works[1:]] == [(3, 3, 0, True)]
    commit(scheduler, batch)
    # The end of one block, and the beginning of the next, which is the prompt's last.
    batch = scheduler.schedule()
    assert [(w.start, w.length, w.ahead, w.continues) for w in batch.works[1:]] == [(6, 2, 0, True), (8, 1, 1, False)]
    commit(scheduler, batch)
    assert step(scheduler) == [("a", 8, 1), ("b", 9, 1)]


@pytest.mark.parametrize("pace", [Pace, SlowPace])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_every_request_ends_and_all_blocks_come_back_whatever_happens(
    seed: int, prefix_cache: bool, pace: type[Pace]
) -> None:
    rng = random.Random(seed)
    num_blocks, max_sequences = rng.randint(4, 30), rng.randint(1, 6)
    max_step_tokens = max_sequences + ROUTE_BLOCK + rng.randint(0, 20)
    scheduler = make_scheduler(num_blocks, 4, max_sequences, max_step_tokens, prefix_cache)
    scheduler.pace = pace()
    to_come = [
        forked(rng, str(index), num_prompt, rng.randint(1, num_blocks * 4 - num_prompt))
        for index, num_prompt in enumerate(rng.choices(range(1, num_blocks * 4), k=40))
    ]
    memory = Memory()
    alive: list[Sequence] = []
    num_steps = 0
    while to_come or scheduler.has_work:
        while to_come and (not scheduler.has_work or rng.random() < 0.3):
            alive.append(add(scheduler, to_come.pop()))
        if alive and rng.random() < 0.02:
            scheduler.finish(alive.pop(rng.randrange(len(alive))))
        batch = scheduler.schedule()
        check_step(scheduler, batch.works, max_sequences, max_step_tokens)
        memory.compute(batch.works)
        commit(scheduler, batch)
        alive = [sequence for sequence in alive if not sequence.has_ended]
        num_steps += 1
        assert num_steps < 40 * num_blocks * 4 * 4, "no end in sight"
    assert not alive
    assert scheduler.pool.num_free == num_blocks
    scheduler.check_idle()


def forked(rng: random.Random, name: str, num_prompt: int, max_tokens: int) -> GenerationRequest:
    """Two tenants' prompts, of which many begin alike."""
    fork = rng.randint(0, num_prompt)
    prompt = (7,) * fork + (rng.randint(1, 2),) * (num_prompt - fork)
    return GenerationRequest(name, rng.choice(TENANTS), prompt, 2000, SamplingParams(max_tokens))


class Memory:
    """What the blocks contain: for each slot the tenant and all tokens up to the one whose K/V is there."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    def compute(self, works: list[Work]) -> None:
        """Write the works' rows, which may see nothing but their own past."""
        for work in works:
            table, tokens, tenant = work.sequence.block_table, work.sequence.tokens, work.sequence.request.tenant
            for position in range(work.start + work.length):
                slot = (table[position // 4], position % 4)
                content = (tenant, tuple(tokens[: position + 1]))
                if position >= work.start:
                    self._slots[slot] = content
                assert self._slots[slot] == content, f"row {position} of {work.sequence.request.request_id}"


def check_step(scheduler: Scheduler, works: list[Work], max_sequences: int, max_step_tokens: int) -> None:
    assert works or not scheduler.has_work, "work to do and nothing scheduled"
    assert sum(work.length for work in works) <= max_step_tokens
    lanes = [sequence.lane for sequence in scheduler.running]
    assert len(set(lanes)) == len(lanes) <= max_sequences
    assert all(0 <= lane < max_sequences for lane in lanes)
    waiting = all_waiting(scheduler.fair_share)
    assert all(sequence.lane == -1 and not sequence.block_table for sequence in waiting)
    for tenant in TENANTS:
        order = [int(s.request.request_id) for s in (*scheduler.running, *waiting) if s.request.tenant == tenant]
        assert order == sorted(order, reverse=True), "someone was overtaken by a request of the same tenant"
    next_start: dict[Sequence, int] = {}
    for work in works:
        sequence = work.sequence
        assert sequence in scheduler.running
        assert work.start == next_start.get(sequence, sequence.num_computed), "a gap in the cache"
        next_start[sequence] = end = work.start + work.length
        assert len(sequence.block_table) * 4 >= end
        if work.start < sequence.num_prompt:
            assert work.continues == (work.start % ROUTE_BLOCK > 0)
            block_end = min((work.start // ROUTE_BLOCK + 1) * ROUTE_BLOCK, sequence.num_prompt)
            assert end <= block_end
            assert work.ahead == (0 if work.continues else block_end - end)
        else:
            assert (work.length, work.ahead, work.continues) == (1, 0, False)
    scheduler.check_idle()


def answering(scheduler: Scheduler, name: str, num_prompt: int) -> None:
    """A request of which the prompt is computed and 16 tokens are to come."""
    sampling = SamplingParams(17)
    add(scheduler, GenerationRequest(name, "default", (9,) * num_prompt, 2000, sampling))
    step(scheduler)


@pytest.mark.parametrize("cached", [0, 32])
def test_decodes_take_several_steps_in_blocks_that_nobody_runs_in(cached: int) -> None:
    scheduler = make_scheduler(num_blocks=10, max_step_tokens=64, prefix_cache=True, multi_step=True)
    if cached:
        add(scheduler, request("gone", cached, max_tokens=1))
        step(scheduler)
    assert scheduler.pool.num_idle == cached // 4
    answering(scheduler, "a", 7)
    batch = scheduler.schedule()
    assert (batch.most_steps, batch.most_s) == (16, BURST_S)
    assert scheduler.pool.num_free == 10 - 6
    commit(scheduler, batch, num_steps=1)
    assert scheduler.pool.num_free == 10 - 3
    scheduler.check_idle()


@pytest.mark.parametrize(
    ("num_blocks", "num_steps", "num_free"), [(6, 4, 0), (7, 4, 1), (8, 8, 0), (11, 8, 3), (12, 16, 0)]
)
def test_decodes_take_fewer_steps_rather_than_blocks_of_others(num_blocks: int, num_steps: int, num_free: int) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks, multi_step=True)
    answering(scheduler, "a", 7)
    answering(scheduler, "b", 7)
    assert scheduler.schedule().most_steps == num_steps
    assert scheduler.pool.num_free == num_free
    scheduler.check_idle()


def test_decodes_take_as_many_steps_as_a_burst_may_come_to() -> None:
    scheduler = make_scheduler(multi_step=True)
    answering(scheduler, "a", 7)
    commit(scheduler, scheduler.schedule(), seconds=BURST_S / 1.5)
    assert scheduler.schedule().most_steps == 3


def test_one_that_needs_few_tokens_does_not_hold_back_the_others() -> None:
    scheduler = make_scheduler(multi_step=True)
    add(scheduler, request("short", 7, max_tokens=3))
    add(scheduler, request("long", 7, max_tokens=30))
    step(scheduler)
    batch = scheduler.schedule()
    assert batch.most_steps == 29
    tables = {work.sequence.request.request_id: len(work.sequence.block_table) for work in batch.works}
    assert tables == {"short": 3, "long": 9}


@pytest.mark.parametrize("sampling", [{"presence_penalty": 0.5}, {"logit_bias": {1: 2.0}}, {"top_logprobs": 0}])
def test_penalties_bias_and_log_probabilities_hold_nobody_back(sampling: dict[str, Any]) -> None:
    scheduler = make_scheduler(multi_step=True)
    add(scheduler, GenerationRequest("a", "default", (9,) * 7, 2000, SamplingParams(17, **sampling)))
    step(scheduler)
    assert scheduler.schedule().most_steps == 16


def test_decodes_take_one_step_where_the_runner_does() -> None:
    scheduler = make_scheduler(multi_step=False)
    answering(scheduler, "a", 7)
    assert scheduler.schedule().most_steps == 1
