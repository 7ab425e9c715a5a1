"""The whole engine on a tiny model: budgets are exact, seeds repeat, accounts add up, whatever the circumstances."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from buddy_kernels.arithmetics import arithmetics
from buddy_routing.router import NEVER
from buddy_server.engine import scheduler
from buddy_server.engine.build import build_engine
from buddy_server.engine.messages import FinishEvent, GenerationRequest, StartEvent, TokenEvent
from buddy_server.engine.served_model import EngineBuildError, check_fits
from buddy_server.engine.settings import EngineSettings
from sparse_decode import NATIVE
from tiny_engine import (
    BLOCK_SIZE,
    NUM_LAYERS,
    ROUTE_BLOCK,
    Answer,
    Run,
    SlowPace,
    TinySite,
    build_tiny_engine,
    make_request,
    run_engine,
    save_random_router,
)

BUDGETS = (3, 4, 6)
KINDS = [("float32", False), ("float32", True), ("bfloat16", True), ("int8", True)]
"""dtype, and whether the step is the native one: plain torch rounds bfloat16 by what else is in the batch."""


@pytest.fixture(params=["learned", "prior:cosine"])
def router(request: pytest.FixtureRequest, tiny: TinySite) -> Path | str:
    return tiny.router if request.param == "learned" else request.param


def sixteen() -> list[GenerationRequest]:
    """Mixed budgets, lengths and tenants."""
    return [
        make_request(f"r{i}", 3 + 7 * i, BUDGETS[i % 3], seed=i, tenant=f"t{i % 2}", max_tokens=8 + i)
        for i in range(16)
    ]


def same(one: Answer, other: Answer) -> bool:
    return (one.tokens, one.finish) == (other.tokens, other.finish)


def check_accounts(run: Run, requests: list[GenerationRequest]) -> None:
    """Every token but the last of an answer was run, at what its request may cost; and the engine's own counters say
    the same, less what it ran again after preemptions."""
    for request in requests:
        end = run.answers[request.request_id].end
        usage = end.usage
        assert (end.reason, end.error) == ("length", None)
        assert usage.prompt_tokens == len(request.prompt_tokens)
        assert usage.completion_tokens == request.sampling.max_tokens == len(run.answers[request.request_id].tokens)
        assert usage.prompt_cost == usage.prompt_tokens * request.max_cost
        assert usage.output_cost == (usage.completion_tokens - 1) * request.max_cost
    counts = [count for step in run.steps for count in step.stats.depth.values()]
    charged = sum(count.executed - count.uncharged for count in counts)
    assert charged == sum(answer.end.usage.cost for answer in run.answers.values())
    assert (sum(count.uncharged for count in counts) > 0) == (run.num_preemptions > 0)


@pytest.mark.parametrize("num_run", BUDGETS)
def test_every_token_runs_exactly_its_budget_with_the_first_and_last_layer(
    tiny: TinySite, router: Path | str, num_run: int
) -> None:
    request = make_request(num_prompt=40, num_run=num_run, max_tokens=40)
    run = run_engine(build_tiny_engine(tiny.model, router).engine, [request])
    answer = run.answers["r"]
    for path in answer.paths:
        assert len(path) == num_run
        assert path == tuple(sorted(set(path)))
        assert (path[0], path[-1]) == (0, NUM_LAYERS - 1)
    if num_run < NUM_LAYERS:
        assert (len(set(answer.paths)) > 1) == isinstance(router, Path), "only the learned router changes its mind"
    check_accounts(run, [request])


@pytest.mark.parametrize(("dtype", "native"), KINDS)
def test_same_seed_says_the_same_alone_and_among_fifteen_others(tiny: TinySite, dtype: str, native: bool) -> None:
    requests = sixteen()
    together = run_engine(build_tiny_engine(tiny.model, tiny.router, dtype, native=native).engine, requests)
    check_accounts(together, requests)
    alone = build_tiny_engine(tiny.model, tiny.router, dtype, native=native).engine
    for request in requests:
        answer = run_engine(alone, [request]).answers[request.request_id]
        assert same(answer, together.answers[request.request_id]), request.request_id
    assert len({tuple(answer.token_ids) for answer in together.answers.values()}) == 16


@pytest.mark.parametrize(("dtype", "native"), KINDS)
def test_requests_preempted_for_lack_of_blocks_say_the_same_and_cost_the_same(
    tiny: TinySite, dtype: str, native: bool
) -> None:
    requests = [make_request(f"r{i}", 5 + 3 * i, BUDGETS[i % 3], seed=i, max_tokens=30) for i in range(8)]
    plenty = run_engine(build_tiny_engine(tiny.model, tiny.router, dtype, native=native).engine, requests)
    scarce = run_engine(
        build_tiny_engine(
            tiny.model, tiny.router, dtype, num_blocks=24 * 4 // (16 if native else 4), native=native
        ).engine,
        requests,
    )
    assert (plenty.num_preemptions, scarce.num_preemptions > 2) == (0, True)
    for name, answer in plenty.answers.items():
        assert same(answer, scarce.answers[name]), name
    check_accounts(scarce, requests)


@pytest.mark.parametrize(("dtype", "native"), KINDS)
def test_prompt_cut_into_many_steps_takes_the_same_paths_to_the_same_tokens(
    tiny: TinySite, dtype: str, native: bool
) -> None:
    requests = [make_request(f"r{i}", 150 + 20 * i, num_run, seed=i) for i, num_run in enumerate(BUDGETS)]
    narrow = build_tiny_engine(
        tiny.model, tiny.router, dtype, max_sequences=3, max_step_tokens=3 + ROUTE_BLOCK, native=native
    )
    wide = build_tiny_engine(tiny.model, tiny.router, dtype, max_sequences=3, max_step_tokens=1000, native=native)
    cut, whole = run_engine(narrow.engine, requests), run_engine(wide.engine, requests)
    assert len(cut.steps) > len(whole.steps) + 20
    for name, answer in whole.answers.items():
        assert same(answer, cut.answers[name]), name
    check_accounts(cut, requests)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("native", [False, True])
def test_prefill_in_pieces_beside_answers_says_the_same(tiny: TinySite, native: bool, temperature: float) -> None:
    requests = [
        # One more than pieces of three: the last piece is a row that looks like an answer.
        make_request(f"r{i}", 5 + 40 * i, num_run, seed=i, max_tokens=60, temperature=temperature)
        for i, num_run in enumerate(BUDGETS)
    ]
    sizes = {"max_sequences": 3, "max_step_tokens": 3 + ROUTE_BLOCK, "native": native}
    at_once, in_pieces = (build_tiny_engine(tiny.model, tiny.router, **sizes).engine for _ in range(2))
    in_pieces.scheduler.pace = SlowPace()
    whole, cut = run_engine(at_once, requests), run_engine(in_pieces, requests)
    assert len(cut.steps) > len(whole.steps) + 20
    for name, answer in whole.answers.items():
        assert same(answer, cut.answers[name]), name
    check_accounts(cut, requests)


SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 9, "min_p": 0.1},
)


def test_answers_go_on_by_themselves_and_say_the_same(tiny: TinySite, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        *(
            make_request(f"r{i}", 5 + 9 * i, num_run, seed=i, max_tokens=30 + 7 * i, **sampling)
            for i, (num_run, sampling) in enumerate(product(BUDGETS, SAMPLINGS))
        ),
        make_request("stopped", 8, seed=5, max_tokens=40, temperature=0.0, stop=("a", "e", "7", " ")),
        make_request("ended", 8, seed=6, max_tokens=40, temperature=0.0, stop_token_ids=tuple(range(20, 60))),
    ]
    in_a_row = run_engine(build_tiny_engine(tiny.model, tiny.router, native=True).engine, requests)
    monkeypatch.setattr(scheduler, "MOST_STEPS", 1)
    one_by_one = run_engine(build_tiny_engine(tiny.model, tiny.router, native=True).engine, requests)
    assert len(in_a_row.steps) < len(one_by_one.steps) / 2
    for name, answer in one_by_one.answers.items():
        assert same(answer, in_a_row.answers[name]), name


def test_prompt_scored_in_pieces_and_again_after_preemption_is_scored_once(tiny: TinySite) -> None:
    requests = [
        make_request("answers", 5, seed=1, max_tokens=60),
        make_request("scored", 70, seed=2, max_tokens=40, prompt_logprobs=0, top_logprobs=0),
    ]
    plenty = run_engine(build_tiny_engine(tiny.model, tiny.router, max_step_tokens=32).engine, requests)
    engine = build_tiny_engine(tiny.model, tiny.router, num_blocks=28, max_step_tokens=32).engine
    engine.scheduler.pace = SlowPace()
    scarce = run_engine(engine, requests)
    assert scarce.num_preemptions > 0
    expected, seen = (run.answers["scored"].prompts for run in (plenty, scarce))
    assert len(seen) == len(expected) == 1
    assert [token.token_id for token in seen[0].logprobs] == list(requests[1].prompt_tokens[1:])
    for one, other in zip(seen[0].logprobs, expected[0].logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "presence_penalty": 0.5},
        {"temperature": 0.0, "frequency_penalty": 1.5},
        {"temperature": 0.0, "top_logprobs": 2},
        {"temperature": 0.7, "logit_bias": {1: 2.0, 5: -3.0}, "top_logprobs": 0},
    ],
)
def test_penalties_bias_and_log_probabilities_go_on_by_themselves_and_say_the_same(
    tiny: TinySite, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(max_tokens=40, **sampling)
    in_a_row = run_engine(build_tiny_engine(tiny.model, tiny.router, native=True).engine, [request])
    monkeypatch.setattr(scheduler, "MOST_STEPS", 1)
    one_by_one = run_engine(build_tiny_engine(tiny.model, tiny.router, native=True).engine, [request])
    assert len(in_a_row.steps) < 20 < 40 == len(one_by_one.steps)
    assert same(in_a_row.answers["r"], one_by_one.answers["r"])
    plain = run_engine(build_tiny_engine(tiny.model, tiny.router).engine, [request]).answers["r"]
    assert plain.token_ids == one_by_one.answers["r"].token_ids, "plain torch is the reference"


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("num_prompt", [5, 60])
def test_depth_changes_in_mid_answer_and_what_ran_is_charged(tiny: TinySite, num_prompt: int, native: bool) -> None:
    changes = {4: 6000, 9: 3000, 10: 5000, 20: 4000}
    request = replace(make_request(num_prompt=num_prompt, num_run=6, max_tokens=30), tier="free")
    engine = build_tiny_engine(tiny.model, tiny.router, native=native).engine

    def run() -> Answer:
        engine.limit_depth({"free": 4000})
        engine.add(request)
        answer = Answer()
        while engine.has_work:
            for _, event in engine.step().events:
                if isinstance(event, TokenEvent):
                    answer.tokens.append(event)
                elif isinstance(event, FinishEvent):
                    answer.finish = event
            if (cost := changes.get(len(answer.tokens))) is not None:
                engine.limit_depth({"free": cost})
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "MOST_STEPS", 1)
        first, again = run(), run()
    assert same(first, again) or again.end.usage.cached_tokens
    depths = [len(path) for path in first.paths]
    assert depths == [4] * 4 + [6] * 5 + [3] + [5] * 10 + [4] * 10
    assert first.end.usage.output_cost == 1000 * sum(depths[1:])
    assert first.end.usage.prompt_cost == 4000 * num_prompt
    assert first.end.max_cost == 3000


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("reroute_every", [4, NEVER])
def test_path_that_is_kept_ends_with_the_depth_it_was_chosen_for(
    tiny: TinySite, reroute_every: int, native: bool, tmp_path: Path
) -> None:
    save_random_router(tiny.model, tmp_path, reroute_every=reroute_every)
    engine = build_tiny_engine(tiny.model, tmp_path, native=native, prefix_cache=False).engine
    answers: list[list[TokenEvent]] = []
    for _ in range(2):
        engine.limit_depth({})
        engine.add(replace(make_request(num_prompt=9, num_run=6, max_tokens=40), tier="free"))
        tokens: list[TokenEvent] = []
        while engine.has_work:
            tokens += [event for _, event in engine.step().events if isinstance(event, TokenEvent)]
            if len(tokens) == 1:
                engine.limit_depth({"free": 3000})
        answers.append(tokens)
    assert [sum(event.path) for event in answers[0]] == [6] + [3] * 39
    assert answers[0] == answers[1]
    paths = [event.path for event in answers[0][1:]]
    changes = [index for index in range(1, len(paths)) if paths[index] != paths[index - 1]]
    assert all((index + 1) % reroute_every == 0 for index in changes), "the path is kept as before"


def test_depth_changed_in_mid_prompt_takes_effect_at_the_next_route_block_and_caches_nothing_wrong(
    tiny: TinySite,
) -> None:
    sizes = {"max_sequences": 1, "max_step_tokens": 1 + ROUTE_BLOCK}
    engine = build_tiny_engine(tiny.model, tiny.router, **sizes).engine
    engine.add(replace(make_request(num_prompt=4 * ROUTE_BLOCK + 3, num_run=6, max_tokens=3), tier="free"))
    for _ in range(2):
        engine.step()
    engine.limit_depth({"free": 3000})
    usages = [usage for _ in range(3) for _, usage in engine.step().usages]
    assert usages[-1].prompt_cost == 2 * ROUTE_BLOCK * 6000 + (2 * ROUTE_BLOCK + 3) * 3000
    while engine.has_work:
        engine.step()
    fresh = build_tiny_engine(tiny.model, tiny.router, **sizes).engine
    for num_run, cached in ((6, 2 * ROUTE_BLOCK), (3, 0)):
        other = make_request(num_prompt=4 * ROUTE_BLOCK + 3, num_run=num_run, max_tokens=9)
        answer = run_engine(engine, [other]).answers["r"]
        assert answer.end.usage.cached_tokens == cached
        assert answer.tokens == run_engine(fresh, [other]).answers["r"].tokens


def test_preempted_request_runs_again_at_the_depths_of_the_first_time(tiny: TinySite) -> None:
    requests = [replace(make_request(f"r{i}", 5 + 3 * i, 6, seed=i, max_tokens=30), tier=f"r{i}") for i in range(8)]

    def run(num_blocks: int | None) -> tuple[dict[str, list[int]], int]:
        engine = build_tiny_engine(tiny.model, tiny.router, num_blocks=num_blocks).engine
        limits = {request.request_id: 3000 for request in requests}
        engine.limit_depth(limits)
        engine.add(*requests)
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        num_preemptions = 0
        while engine.has_work:
            output = engine.step()
            num_preemptions += output.stats.num_preemptions
            for name, event in output.events:
                if isinstance(event, TokenEvent):
                    tokens[name].append(event.token_id)
                    if len(tokens[name]) in (5, 12):
                        limits[name] = 6000 if len(tokens[name]) == 5 else 4000
                        engine.limit_depth(limits)
        return tokens, num_preemptions

    plenty, scarce = run(None), run(24)
    assert scarce[1] > 0
    assert scarce[0] == plenty[0]


def test_prompt_blocks_of_the_static_prior_are_cut_without_a_trace(tiny: TinySite) -> None:
    request = make_request(num_prompt=420, num_run=4)
    narrow = build_tiny_engine(tiny.model, "prior:cosine", max_step_tokens=144)
    wide = build_tiny_engine(tiny.model, "prior:cosine", max_step_tokens=1000)
    cut, whole = run_engine(narrow.engine, [request]), run_engine(wide.engine, [request])
    assert len(cut.steps) == len(whole.steps) + 3
    assert same(cut.answers["r"], whole.answers["r"])


def test_int8_is_refused_where_the_native_step_is_not_possible(tiny: TinySite) -> None:
    with pytest.raises(EngineBuildError, match="needs the native step: it takes blocks of 16 tokens, not 4"):
        build_tiny_engine(tiny.model, tiny.router, "int8")


@pytest.mark.parametrize("native", [False, True])
def test_depth_of_every_step_adds_up_to_all_layers_of_all_rows(tiny: TinySite, native: bool) -> None:
    requests = [replace(request, sampling=replace(request.sampling, max_tokens=40)) for request in sixteen()]
    num_blocks = 80 * BLOCK_SIZE // (16 if native else BLOCK_SIZE)
    run = run_engine(build_tiny_engine(tiny.model, tiny.router, num_blocks=num_blocks, native=native).engine, requests)
    executed = {"t0": 0, "t1": 0}
    for step in run.steps:
        depth = step.stats.depth
        assert sum(d.executed + d.skipped for d in depth.values()) == 1000 * NUM_LAYERS * step.stats.num_rows
        assert 2 <= step.stats.num_layers_read / step.stats.num_steps <= NUM_LAYERS
        assert step.stats.router_s >= 0
        for tenant, count in depth.items():
            executed[tenant] += count.executed
    # Every token of a request runs its budget; its last one is never fed back. Recomputed ones come on top.
    assert run.num_preemptions > 0
    check_accounts(run, requests)
    for tenant, count in executed.items():
        once = sum(run.answers[r.request_id].end.usage.cost for r in requests if r.tenant == tenant)
        assert count >= once > 0


def test_prompt_of_one_token_and_answer_of_one_token(tiny: TinySite) -> None:
    request = make_request(num_prompt=1, num_run=3, max_tokens=1)
    run = run_engine(build_tiny_engine(tiny.model, tiny.router).engine, [request])
    assert len(run.answers["r"].tokens) == 1
    check_accounts(run, [request])


def test_request_that_fills_the_cache_to_the_last_slot(tiny: TinySite) -> None:
    built = build_tiny_engine(tiny.model, tiny.router, num_blocks=10)
    assert built.info.kv_capacity_tokens == 10 * BLOCK_SIZE
    request = make_request(num_prompt=25, max_tokens=15)
    run = run_engine(built.engine, [request])
    check_accounts(run, [request])


def test_text_is_the_decoded_tokens(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    answer = run_engine(engine, [make_request(max_tokens=30)]).answers["r"]
    assert answer.text == engine.tokenizer.decode(answer.token_ids)
    assert len(answer.text) == 30


def test_stop_string_ends_the_request_and_is_not_released(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    free = run_engine(engine, [make_request(max_tokens=30)]).answers["r"]
    stop = free.text[10:13]
    stopped = run_engine(engine, [make_request(max_tokens=30, stop=(stop,))]).answers["r"]
    assert stopped.text == free.text[: free.text.index(stop)]
    usage = stopped.end.usage
    assert (stopped.end.reason, usage.completion_tokens) == ("stop", free.text.index(stop) + 3)
    assert usage.output_cost == (usage.completion_tokens - 1) * 4000


def test_end_token_and_stop_token_end_the_request_without_text(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    free = run_engine(engine, [make_request(max_tokens=30)]).answers["r"]
    end_token = free.token_ids[8]
    first = free.token_ids.index(end_token)
    stopped = run_engine(engine, [make_request(max_tokens=30, stop_token_ids=(end_token,))]).answers["r"]
    engine.end_token_ids = frozenset({end_token})
    ended = run_engine(engine, [make_request(max_tokens=30)]).answers["r"]
    for answer in (stopped, ended):
        assert answer.token_ids == free.token_ids[: first + 1]
        assert (answer.end.reason, answer.tokens[-1].text) == ("stop", "")
        assert answer.text == free.text[:first]


def test_with_ignore_eos_only_its_own_tokens_end_a_request(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    free = run_engine(engine, [make_request(max_tokens=30)]).answers["r"]
    engine.end_token_ids = frozenset(free.token_ids)
    on = run_engine(engine, [make_request(max_tokens=30, ignore_eos=True)]).answers["r"]
    assert (on.token_ids, on.end.reason) == (free.token_ids, "length")
    own = run_engine(engine, [make_request(max_tokens=30, ignore_eos=True, stop_token_ids=(free.token_ids[8],))])
    assert own.answers["r"].token_ids == free.token_ids[: free.token_ids.index(free.token_ids[8]) + 1]


def test_logprobs_come_with_the_tokens_only_when_asked_for(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    plain = run_engine(engine, [make_request()]).answers["r"]
    chosen = run_engine(engine, [make_request(top_logprobs=0)]).answers["r"]
    several = run_engine(engine, [make_request(top_logprobs=5)]).answers["r"]
    assert plain.token_ids == chosen.token_ids == several.token_ids
    for event, alone, ranked in zip(plain.tokens, chosen.tokens, several.tokens, strict=True):
        assert (event.logprob, event.top_logprobs, alone.top_logprobs) == (None, (), ())
        assert ranked.logprob == alone.logprob
        assert ranked.logprob is not None
        assert (ranked.logprob.token_id, ranked.logprob.token) == (event.token_id, event.text)
        values = [top.logprob for top in ranked.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        assert ranked.logprob.logprob <= values[0] <= 0


def test_logprobs_of_the_prompt_come_once_before_the_first_token(tiny: TinySite) -> None:
    asked = make_request("asked", 40, num_run=4, seed=0, prompt_logprobs=2)
    others = [make_request(f"r{i}", 20, 4, seed=i, max_tokens=30) for i in range(1, 6)]
    scarce = build_tiny_engine(tiny.model, tiny.router, num_blocks=6, max_step_tokens=16 + ROUTE_BLOCK, native=True)
    run = run_engine(scarce.engine, [*others, asked])
    assert run.num_preemptions > 0
    assert all(not run.answers[other.request_id].prompts for other in others)
    (prompt,) = run.answers["asked"].prompts
    assert tuple(token.token_id for token in prompt.logprobs) == asked.prompt_tokens[1:]
    for chosen, likeliest in zip(prompt.logprobs, prompt.top_logprobs, strict=True):
        assert likeliest[0].logprob >= likeliest[1].logprob
        assert likeliest[0].logprob >= chosen.logprob - 1e-6
    plenty = run_engine(build_tiny_engine(tiny.model, tiny.router, native=True).engine, [asked]).answers["asked"]
    assert plenty.prompts == [prompt]


def test_greedy_needs_no_seed(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    one, other = (run_engine(engine, [make_request(temperature=0)]).answers["r"] for _ in range(2))
    assert same(one, other)


def test_reroute_every_keeps_a_path_for_that_many_tokens(tiny: TinySite, tmp_path: Path) -> None:
    save_random_router(tiny.model, tmp_path, reroute_every=4)
    requests = [make_request(f"r{i}", 20, 3, seed=i, max_tokens=25) for i in range(4)]
    run = run_engine(build_tiny_engine(tiny.model, tmp_path).engine, requests)
    scarce = run_engine(build_tiny_engine(tiny.model, tmp_path, num_blocks=20).engine, requests)
    assert scarce.num_preemptions > 0
    changes: set[int] = set()
    for name, answer in run.answers.items():
        changes |= {i for i in range(1, 25) if answer.paths[i] != answer.paths[i - 1]}
        assert same(answer, scarce.answers[name])
    assert changes
    # The first token runs its prompt's path; of the tokens fed back, every fourth chooses.
    assert all(change % 4 == 0 for change in changes)


def test_cancelled_request_says_nothing_more_and_leaves_the_others_alone(tiny: TinySite) -> None:
    requests = sixteen()
    undisturbed = run_engine(build_tiny_engine(tiny.model, tiny.router).engine, requests)
    engine = build_tiny_engine(tiny.model, tiny.router, num_blocks=100, max_step_tokens=64).engine
    for request in requests:
        engine.add(request)
    seen: dict[str, list[int]] = {request.request_id: [] for request in requests}
    gone: list[str] = []
    while engine.has_work:
        for name, event in engine.step().events:
            assert name not in gone
            if isinstance(event, TokenEvent):
                seen[name].append(event.token_id)
        if len(gone) < 8:
            gone.append(f"r{15 - 2 * len(gone)}")
            ((_, end),) = engine.cancel(gone[-1])
            assert isinstance(end, FinishEvent)
            assert (end.reason, end.usage.completion_tokens) == ("cancelled", len(seen[gone[-1]]))
            assert engine.cancel(gone[-1]) == []
            engine.scheduler.check_idle()
    assert engine.scheduler.pool.usage_ratio == 0
    for name, answer in undisturbed.answers.items():
        if name in gone:
            assert seen[name] == answer.token_ids[: len(seen[name])]
        else:
            assert seen[name] == answer.token_ids


@pytest.mark.parametrize(
    ("router", "device", "dtype", "message"),
    [
        ("prior:magic", "cpu", "float32", r"'prior:magic' is unknown; allowed: a directory, prior:cosine, prior:ppl"),
        ("prior:cosine", "tpu", "float32", r"device 'tpu' is unknown; allowed: auto, cpu, cuda"),
        ("prior:cosine", "cpu", "int3", r"dtype 'int3' is unknown; allowed: auto, float32, bfloat16, float16"),
    ],
)
def test_engine_that_cannot_be_built_says_why(
    tiny: TinySite, router: str, device: str, dtype: str, message: str
) -> None:
    with pytest.raises(EngineBuildError, match=message):
        build_engine(str(tiny.model), router, EngineSettings(), device, dtype)


def test_model_without_room_is_refused_and_told_what_would_fit(tiny: TinySite) -> None:
    check_fits(tiny.model, "bfloat16", free_bytes=10**6)
    with pytest.raises(
        EngineBuildError, match=r"model model takes .* in float32, .* allowed in float32: up to 0.0 bil"
    ):
        check_fits(tiny.model, "float32", free_bytes=100_000)


def test_cache_without_room_for_a_block_is_refused(tiny: TinySite) -> None:
    with pytest.raises(EngineBuildError, match="holds no block of 16 tokens"):
        build_engine(str(tiny.model), "prior:cosine", EngineSettings(kv_cache_gib=1e-6), "cpu", "float32")


@pytest.mark.parametrize(
    ("native", "message"),
    [
        (True, "arithmetic is 'magic', allowed for float32 on this processor: auto, fma"),
        (False, "arithmetic 'magic' needs the native step: it is switched off"),
    ],
)
def test_arithmetic_that_the_processor_has_not_is_refused(tiny: TinySite, native: bool, message: str) -> None:
    settings = EngineSettings(native=native, arithmetic="magic")
    with pytest.raises(EngineBuildError, match=message):
        build_engine(str(tiny.model), "prior:cosine", settings, "cpu", "float32")


@pytest.mark.parametrize(("kind", "arithmetic"), [(kind, name) for kind, name in NATIVE if len(arithmetics(kind)) > 1])
def test_engine_takes_the_arithmetic_it_is_told_or_one_that_it_has(tiny: TinySite, kind: str, arithmetic: str) -> None:
    for asked in (arithmetic, "auto"):
        settings = EngineSettings(kv_cache_gib=0.01, arithmetic=asked)
        info = build_engine(str(tiny.model), "prior:cosine", settings, "cpu", kind).info
        assert info.arithmetic in ((arithmetic,) if asked == arithmetic else arithmetics(kind))


def test_engine_tells_what_it_serves(tiny: TinySite) -> None:
    info = build_tiny_engine(tiny.model, "prior:ppl", "bfloat16", max_sequences=2).info
    assert (info.model_id, info.num_layers, info.max_context) == ("model", NUM_LAYERS, 512)
    assert (info.router_id, info.device, info.dtype, info.arithmetic) == ("prior:ppl", "cpu", "bfloat16", "torch")
    assert info.kv_capacity_tokens == 2 * 512
    assert build_tiny_engine(tiny.model, tiny.router).info.router_id.startswith("learned:")


def test_limit_of_a_tier_lowers_its_requests_whether_they_run_or_wait_and_lets_them_go_back_up(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router, max_sequences=2).engine
    names = ("elastic", "firm", "waiting")
    for name in names:
        request = make_request(name, num_prompt=20, num_run=5, max_tokens=12)
        engine.add(replace(request, tier=None if name == "firm" else "free"))
    costs: dict[str, list[int]] = {name: [] for name in names}
    lowest: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "MOST_STEPS", 1)
        while engine.has_work:
            for name, event in engine.step().events:
                if isinstance(event, TokenEvent):
                    costs[name].append(sum(event.path))
                elif isinstance(event, FinishEvent):
                    lowest[name] = event.max_cost
            if len(costs["elastic"]) == 3:
                engine.limit_depth({"free": 3000, "other": 2000})
            elif len(costs["waiting"]) == 6:
                engine.limit_depth({})
    assert costs == {"elastic": [5] * 3 + [3] * 9, "firm": [5] * 12, "waiting": [3] * 6 + [5] * 6}
    assert lowest == {"elastic": 3000, "firm": 5000, "waiting": 3000}


def test_limit_never_goes_below_the_layers_that_always_run_nor_above_what_was_asked(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    for limit, num_run in ((0, 2), (6000, 4)):
        engine.limit_depth({"free": limit})
        answer = run_engine(engine, [replace(make_request(num_run=4), tier="free")]).answers["r"]
        assert {len(path) for path in answer.paths} == {num_run}
        assert answer.end.max_cost == 1000 * num_run


def test_request_that_begins_under_a_limit_shares_prefixes_with_those_of_that_depth(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router, max_sequences=1).engine
    num_prompt = 3 * ROUTE_BLOCK + 1
    run_engine(engine, [make_request(num_prompt=num_prompt, num_run=3)])
    engine.limit_depth({"free": 3000})
    lowered = replace(make_request(num_prompt=num_prompt, num_run=6), tier="free")
    assert run_engine(engine, [lowered]).answers["r"].end.usage.cached_tokens == 3 * ROUTE_BLOCK
    engine.limit_depth({})
    first = replace(make_request("first", num_run=6), tier="free")
    engine.add(first, replace(lowered, request_id="second"))
    engine.step()
    # The second waits; its keys change with its depth.
    engine.limit_depth({"free": 3000})
    ends = {}
    while engine.has_work:
        ends.update((name, event) for name, event in engine.step().events if isinstance(event, FinishEvent))
    assert ends["second"].usage.cached_tokens == 3 * ROUTE_BLOCK


def test_cancelled_request_that_never_ran_ends_with_its_own_limit(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    engine.limit_depth({"free": 3000})
    engine.add(replace(make_request(num_run=5), tier="free"))
    ((_, end),) = engine.cancel("r")
    assert isinstance(end, FinishEvent)
    assert (end.max_cost, end.usage.cost) == (5000, 0)


@pytest.mark.parametrize(("dtype", "native"), KINDS)
def test_requests_preempted_for_another_tenant_say_the_same_and_cost_the_same(
    tiny: TinySite, dtype: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MOST_STEPS", 4)
    flood = [make_request(f"f{i}", 5 + i, BUDGETS[i % 3], seed=i, tenant="flood", max_tokens=30) for i in range(8)]
    small = [make_request(f"s{i}", 9, 4, seed=20 + i, tenant="small") for i in range(2)]
    alone = run_engine(build_tiny_engine(tiny.model, tiny.router, dtype, native=native).engine, [*flood, *small])
    engine = build_tiny_engine(tiny.model, tiny.router, dtype, max_sequences=4, native=native).engine
    engine.add(*flood)
    outputs = [engine.step(), engine.step()]
    engine.add(*small)
    while engine.has_work:
        outputs.append(engine.step())
    assert sum(output.stats.num_preemptions for output in outputs) >= 1
    events = [pair for output in outputs for pair in output.events]
    order = [name for name, event in events if isinstance(event, FinishEvent)]
    assert order.index("s0") < order.index("f7")
    for request in (*flood, *small):
        answer = alone.answers[request.request_id]
        own = [event for name, event in events if name == request.request_id]
        assert isinstance(own[0], StartEvent)
        assert own[1:] == [*answer.tokens, answer.finish]
    counts = [count for output in outputs for count in output.stats.depth.values()]
    charged = sum(count.executed - count.uncharged for count in counts)
    assert charged == sum(answer.end.usage.cost for answer in alone.answers.values())


def test_system_fingerprint_changes_with_what_could_change_an_answer(tiny: TinySite) -> None:
    def fingerprint(router: str = "prior:cosine", dtype: str = "float32") -> str:
        return build_engine(str(tiny.model), router, EngineSettings(native=False), "cpu", dtype).info.system_fingerprint

    first = fingerprint()
    assert first == fingerprint()
    changed = {fingerprint(str(tiny.router)), fingerprint(dtype="float16"), first}
    assert len(changed) == 3
    assert all(re.fullmatch("fp_[0-9a-f]{12}", each) for each in changed)
