"""Prompts that begin alike are computed once, and nobody can tell by the answers."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from buddy_routing.router import PromptSetRouter
from buddy_routing.stepper import NativeStepper
from buddy_server.engine.batch import BatchResult
from buddy_server.engine.build import assemble
from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import FinishEvent, GenerationRequest, TokenEvent
from buddy_server.engine.routing import Routing
from buddy_server.engine.served_model import load_served_model
from buddy_server.engine.settings import EngineSettings
from tiny_engine import (
    KV_DIM,
    NUM_LAYERS,
    ROUTE_BLOCK,
    Answer,
    TinySite,
    build_tiny_engine,
    make_request,
    run_engine,
    save_random_router,
)

KINDS = [("float32", False), ("bfloat16", False), ("float32", True), ("int8", True)]
"""dtype, and whether the step is the native one."""
PREFIX = make_request(num_prompt=80, seed=99).prompt_tokens


def ask(name: str, num_shared: int, num_own: int, seed: int = 0, **fields: Any) -> GenerationRequest:
    """A request whose prompt begins with `num_shared` tokens that all prompts here share. Log probabilities are asked
    for, so that answers of other bits differ."""
    own = make_request(name, num_own, seed=seed, **{"top_logprobs": 0, **fields})
    return replace(own, prompt_tokens=PREFIX[:num_shared] + own.prompt_tokens)


def plain(tiny: TinySite, requests: list[GenerationRequest], dtype: str, native: bool) -> dict[str, Answer]:
    """What an engine without a cache says to each alone."""
    engine = build_tiny_engine(tiny.model, tiny.router, dtype, native=native, prefix_cache=False).engine
    return {r.request_id: run_engine(engine, [r]).answers[r.request_id] for r in requests}


def check_same(answer: Answer, uncached: Answer, request: GenerationRequest) -> None:
    """The same tokens, layers and log probabilities; and what was found computed is not charged."""
    assert answer.tokens == uncached.tokens
    usage = answer.end.usage
    assert usage.prompt_cost == (usage.prompt_tokens - usage.cached_tokens) * request.max_cost
    assert usage.output_cost == (usage.completion_tokens - 1) * request.max_cost
    uncharged = msgspec.structs.replace(usage, cached_tokens=0, prompt_cost=uncached.end.usage.prompt_cost)
    assert msgspec.structs.replace(answer.end, usage=uncharged) == uncached.end


@pytest.mark.parametrize(("dtype", "native"), KINDS)
def test_answer_is_the_same_to_the_bit_behind_every_number_of_cached_blocks(
    tiny: TinySite, dtype: str, native: bool
) -> None:
    requests = [ask(f"r{i}", 80, own, i, num_run=(3, 4)[i % 2]) for i, own in enumerate((1, 1, 15, 16, 17, 50))]
    requests += [ask(f"s{i}", shared, 5, 20 + i) for i, shared in enumerate((16, 32, 33, 64, 80))]
    uncached = plain(tiny, requests, dtype, native)
    engine = build_tiny_engine(tiny.model, tiny.router, dtype, native=native).engine
    for again in (False, True):
        for request in requests:
            answer = run_engine(engine, [request]).answers[request.request_id]
            check_same(answer, uncached[request.request_id], request)
            if again:
                full = (len(request.prompt_tokens) - 1) // ROUTE_BLOCK * ROUTE_BLOCK
                assert answer.end.usage.cached_tokens == full


def test_prompt_of_whole_blocks_computes_its_last_one(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    request = ask("r", 0, 3 * ROUTE_BLOCK)
    first, second = (run_engine(engine, [request]) for _ in range(2))
    assert second.answers["r"].tokens == first.answers["r"].tokens
    assert (first.answers["r"].end.usage.cached_tokens, second.answers["r"].end.usage.cached_tokens) == (
        0,
        2 * ROUTE_BLOCK,
    )
    assert sum(step.stats.num_rows for step in first.steps + second.steps) == 4 * ROUTE_BLOCK + 2 * 11


def test_static_prior_and_paths_kept_for_several_tokens_are_cached_too(tiny: TinySite, tmp_path: Path) -> None:
    save_random_router(tiny.model, tmp_path, reroute_every=4)
    for router, cached in (("prior:cosine", 256), (tmp_path, 288)):
        engine = build_tiny_engine(tiny.model, router).engine
        request = make_request(num_prompt=300, num_run=3, max_tokens=20)
        first, second = (run_engine(engine, [request]).answers["r"] for _ in range(2))
        assert second.tokens == first.tokens
        assert second.end.usage.cached_tokens == cached


@pytest.mark.parametrize("native", [False, True])
def test_router_that_the_native_step_asks_in_python_is_cached_too(tiny: TinySite, native: bool) -> None:
    torch.manual_seed(4)
    rankings, weight = torch.rand(3, NUM_LAYERS - 2), torch.randn(3, 2 * KV_DIM)
    routing = Routing(PromptSetRouter(rankings, weight, torch.zeros(3), "sets"), ROUTE_BLOCK)
    served = load_served_model(str(tiny.model), None, "cpu", "float32")
    answers = []
    for prefix_cache in (False, True):
        settings = EngineSettings(kv_cache_gib=0.01, native=native, prefix_cache=prefix_cache)
        engine = assemble(served, routing, settings).engine
        assert isinstance(engine.runner.stepper, NativeStepper) == native
        run_engine(engine, [ask("before", 80, 1, 1, num_run=3)])
        answers.append(run_engine(engine, [ask("r", 80, 40, 2, num_run=3)]).answers["r"])
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert [answer.end.usage.cached_tokens for answer in answers] == [0, 80]


def test_other_tenants_and_other_depths_find_nothing(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    request = ask("r", 80, 10, tenant="acme", num_run=4)
    others = [replace(request, tenant="hobby"), replace(request, max_cost=3000)]
    num_cached = [run_engine(engine, [r]).answers["r"].end.usage.cached_tokens for r in (request, *others, request)]
    assert num_cached == [0, 0, 0, 80]


def test_engine_without_a_cache_finds_nothing(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router, prefix_cache=False).engine
    for _ in range(2):
        assert run_engine(engine, [ask("r", 80, 10)]).answers["r"].end.usage.cached_tokens == 0
    assert engine.scheduler.pool.num_idle == 0


def test_route_block_of_no_whole_blocks_leaves_the_cache_off(tiny: TinySite) -> None:
    served = load_served_model(str(tiny.model), None, "cpu", "float32")
    routing = Routing(
        PromptSetRouter(torch.rand(1, NUM_LAYERS - 2), torch.zeros(1, 2 * KV_DIM), torch.zeros(1), "x"), 10
    )
    engine = assemble(served, routing, EngineSettings(kv_cache_gib=0.01, block_size=4)).engine
    for _ in range(2):
        assert run_engine(engine, [ask("r", 80, 10)]).answers["r"].end.usage.cached_tokens == 0


def test_blocks_are_evicted_from_the_end_of_the_longest_unused_prompt(tiny: TinySite) -> None:
    # 16 blocks of 4 tokens; a prompt of 40 and 8 tokens of answer take 12, of which 8 are cached.
    engine = build_tiny_engine(tiny.model, tiny.router, num_blocks=16).engine
    a, b = (make_request(name, 40, seed=seed, max_tokens=8) for seed, name in enumerate("ab"))
    uncached = plain(tiny, [a, b], "float32", native=False)
    num_cached = []
    for request in (a, b, a, a):
        answer = run_engine(engine, [request]).answers[request.request_id]
        check_same(answer, uncached[request.request_id], request)
        num_cached.append(answer.end.usage.cached_tokens)
    assert num_cached == [0, 0, 16, 32]


def test_prompts_that_come_together_share_what_the_first_has_computed(tiny: TinySite) -> None:
    requests = [ask(f"r{i}", 80, 20, seed=i) for i in range(4)]
    engine = build_tiny_engine(tiny.model, tiny.router, max_sequences=4, max_step_tokens=40).engine
    run = run_engine(engine, requests)
    uncached = plain(tiny, requests, "float32", native=False)
    for request in requests:
        check_same(run.answers[request.request_id], uncached[request.request_id], request)
    assert sum(answer.end.usage.cached_tokens for answer in run.answers.values()) >= 3 * 48
    for step in run.steps:
        depth = step.stats.depth.values()
        assert sum(d.executed + d.skipped for d in depth) == 1000 * NUM_LAYERS * step.stats.num_rows


def test_choices_of_one_prompt_compute_its_full_blocks_once(tiny: TinySite) -> None:
    requests = [make_request(f"r{i}", num_prompt=90) for i in range(4)]
    requests = [replace(r, sampling=replace(r.sampling, seed=i, top_logprobs=0)) for i, r in enumerate(requests)]
    # All four prompts fit into one step.
    engine = build_tiny_engine(tiny.model, tiny.router, max_step_tokens=400).engine
    run = run_engine(engine, requests)
    uncached = plain(tiny, requests, "float32", native=False)
    for request in requests:
        check_same(run.answers[request.request_id], uncached[request.request_id], request)
    assert [answer.end.usage.cached_tokens for answer in run.answers.values()] == [0, 80, 80, 80]
    assert [step.stats.num_rows for step in run.steps[:2]] == [90, 3 * 10 + 1]


def test_choice_that_waits_for_another_runs_when_that_is_cancelled(tiny: TinySite) -> None:
    requests = [make_request(f"r{i}", num_prompt=90, top_logprobs=0) for i in range(2)]
    uncached = plain(tiny, requests[1:], "float32", native=False)["r1"]
    engine = build_tiny_engine(tiny.model, tiny.router, max_step_tokens=40).engine
    engine.add(*requests)
    engine.step()
    engine.cancel("r0")
    events = [event for _ in range(20) if engine.has_work for _, event in engine.step().events]
    assert [event for event in events if isinstance(event, TokenEvent)] == uncached.tokens
    assert isinstance(events[-1], FinishEvent)
    assert events[-1].usage.cached_tokens == 32


def test_cancelling_one_of_those_who_share_leaves_the_others_alone(tiny: TinySite) -> None:
    requests = [ask(f"r{i}", 80, 5, seed=i, max_tokens=20) for i in range(3)]
    uncached = plain(tiny, requests, "float32", native=False)
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    run_engine(engine, [ask("before", 80, 1)])
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for number in range(40):
        if number in (0, 5):
            engine.cancel(f"r{number // 5}")
        for name, event in engine.step().events if engine.has_work else []:
            if isinstance(event, TokenEvent):
                tokens[name].append(event)
        engine.scheduler.check_idle()
    assert tokens["r0"] == []
    assert tokens["r1"] == uncached["r1"].tokens[:5]
    assert tokens["r2"] == uncached["r2"].tokens
    assert engine.scheduler.pool.usage_ratio == 0


def test_scored_prompts_are_computed_whole(tiny: TinySite) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router).engine
    request = ask("r", 80, 10, prompt_logprobs=0)
    first, second = (run_engine(engine, [request]).answers["r"] for _ in range(2))
    assert first.prompts == second.prompts
    assert (len(second.prompts[0].logprobs), second.end.usage.cached_tokens) == (89, 0)
    assert run_engine(engine, [ask("r", 80, 10)]).answers["r"].end.usage.cached_tokens == 80


def test_what_a_failed_step_computed_is_not_kept(tiny: TinySite, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_tiny_engine(tiny.model, tiny.router, max_step_tokens=40).engine
    collect = engine.runner.collect
    num_steps = 0

    def fails_at_the_second(*given: Any) -> BatchResult:
        nonlocal num_steps
        num_steps += 1
        result = collect(*given)
        if num_steps == 2:
            raise RuntimeError("half of it is written")
        return result

    monkeypatch.setattr(engine.runner, "collect", fails_at_the_second)
    engine.add(ask("r", 80, 10))
    engine.step()
    with pytest.raises(RuntimeError, match="half of it"):
        engine.step()
    engine.end_all("error", "the step failed")
    engine.scheduler.check_idle()
    assert engine.scheduler.pool.usage_ratio == 0
    request = ask("r", 80, 10)
    answer = run_engine(engine, [request]).answers["r"]
    assert answer.end.usage.cached_tokens == 2 * ROUTE_BLOCK
    check_same(answer, plain(tiny, [request], "float32", native=False)["r"], request)


@dataclass
class Crowd:
    """Requests that come and go at random; what they were told."""

    engine: Engine
    rng: random.Random
    heard: dict[str, Answer]
    num_preemptions: int = 0

    def run(self, requests: list[GenerationRequest]) -> None:
        to_come = list(reversed(requests))
        while to_come or self.engine.has_work:
            while to_come and (not self.engine.has_work or self.rng.random() < 0.4):
                request = to_come.pop()
                self.engine.add(request)
                self.heard[request.request_id] = Answer()
            if self.rng.random() < 0.05:
                for name, event in self.engine.cancel(self.rng.choice(list(self.heard))):
                    assert isinstance(event, FinishEvent)
                    self.heard[name].finish = event
            if self.engine.has_work:
                self._step()
            self.engine.scheduler.check_idle()

    def _step(self) -> None:
        output = self.engine.step()
        self.num_preemptions += output.stats.num_preemptions
        for name, event in output.events:
            if isinstance(event, FinishEvent):
                self.heard[name].finish = event
            elif isinstance(event, TokenEvent):
                self.heard[name].tokens.append(event)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_overlapping_requests_say_what_they_say_without_a_cache(tiny: TinySite, dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        ask(
            f"r{i}",
            num_shared=rng.choice((0, 16, 40, 64, 80)),
            num_own=rng.choice((1, 7, 16, 30)),
            seed=rng.randrange(6),
            num_run=rng.choice((3, 4)),
            tenant=rng.choice(("acme", "hobby")),
            max_tokens=rng.randint(1, 40),
        )
        for i in range(40)
    ]
    uncached = plain(tiny, requests, dtype, native=True)
    engine = build_tiny_engine(
        tiny.model, tiny.router, dtype, num_blocks=12, max_sequences=8, max_step_tokens=60, native=True
    ).engine
    crowd = Crowd(engine, rng, {})
    crowd.run(requests)
    assert engine.scheduler.pool.usage_ratio == 0
    ended = {name: answer.end.reason for name, answer in crowd.heard.items()}
    finished = [request for request in requests if ended[request.request_id] != "cancelled"]
    for request in finished:
        check_same(crowd.heard[request.request_id], uncached[request.request_id], request)
    assert len(finished) > 20
    assert crowd.num_preemptions > 0
    # How many depends on how long bursts last, and so on the machine.
    assert sum(crowd.heard[request.request_id].end.usage.cached_tokens for request in finished) > 50
