"""Answers stay within their grammars, whatever else the engine does for them."""

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models

from buddy_server.engine.constraint import Constraint, GrammarError, Grammars
from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import FinishEvent, GenerationRequest
from engine_service import EngineService
from tiny_engine import Answer, TinySite, build_tiny_engine, make_request, run_engine
from tiny_models import SHAPE

VOCAB_SIZE: int = SHAPE["vocab_size"]
WORD = LLMatcher.grammar_from_regex("[a-z]{6,12}[.]")
PERSON = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    overrides={"whitespace_flexible": False},
)
AMBIGUOUS = LLMatcher.grammar_from_lark('start: s\ns: s s s | s s | "a" | ""')
"""Its mask soon needs more work than is allowed."""


@pytest.fixture(scope="module")
def tokenizer(tiny: TinySite) -> Tokenizer:
    return Tokenizer.from_file(str(tiny.model / "tokenizer.json"))


@pytest.fixture(scope="module", params=[False, True], ids=["torch", "native"])
def engine(request: pytest.FixtureRequest, tiny: TinySite) -> Engine:
    return build_tiny_engine(tiny.model, tiny.router, native=request.param).engine


def constrained(grammar: str, *arguments: Any, **fields: Any) -> GenerationRequest:
    return replace(make_request(*arguments, **fields), grammar=grammar)


def answer_to(engine: Engine, grammar: str, **fields: Any) -> Answer:
    return run_engine(engine, [constrained(grammar, **{"max_tokens": 60, **fields})]).answers["r"]


def allowed_tokens(constraint: Constraint) -> set[int]:
    mask = constraint.allowed()
    return {token for token in range(VOCAB_SIZE) if mask[token // 8] >> token % 8 & 1}


def test_mask_is_of_the_tokens_that_can_go_on_and_of_the_end_where_there_may_be_one(tokenizer: Tokenizer) -> None:
    a, b, end = (tokenizer.token_to_id(name) for name in "ab<")
    constraint = Grammars(tokenizer, VOCAB_SIZE, [end]).constraint(LLMatcher.grammar_from_regex("ab?b?"))
    assert allowed_tokens(constraint) == {a}
    constraint.accept(a)
    assert allowed_tokens(constraint) == {b, end}
    constraint.accept(b)
    assert allowed_tokens(constraint) == {b, end}
    assert not constraint.ends(2)
    constraint.accept(b)
    assert allowed_tokens(constraint) == set()
    assert constraint.ends(3)
    # The answer's second token was not its last, though a step of several has gone on from it.
    assert not constraint.ends(2)


def test_answers_of_one_grammar_do_not_share_a_place_in_it(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE)
    one, other = (grammars.constraint(LLMatcher.grammar_from_regex("ab")) for _ in range(2))
    one.accept(tokenizer.token_to_id("a"))
    assert allowed_tokens(one) == {tokenizer.token_to_id("b")}
    assert allowed_tokens(other) == {tokenizer.token_to_id("a")}


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("nonsense", "Expected token"),
        (LLMatcher.grammar_from_regex("(?=a)b"), "look-ahead"),
        (LLMatcher.grammar_from_lark("start: a\na: b\nb: a"), "NoExtension"),
        (LLMatcher.grammar_from_json_schema({"properties": {str(i): {} for i in range(1000)}}), "Too many items"),
    ],
)
def test_grammar_with_a_mistake_or_without_a_text_or_too_large_is_refused(
    tokenizer: Tokenizer, grammar: str, reason: str
) -> None:
    with pytest.raises(GrammarError, match=reason):
        Grammars(tokenizer, VOCAB_SIZE).constraint(grammar)


def test_panic_of_the_library_is_a_refusal_without_a_backtrace(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="panic: ") as raised:
        Grammars(tokenizer, VOCAB_SIZE).constraint(LLMatcher.grammar_from_lark('start: a::0\na::_: "x" a::incr(_)'))
    assert "backtrace" not in str(raised.value)


def test_tokenizer_that_does_not_spell_bytes_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    with pytest.raises(GrammarError, match="this model's tokenizer is not supported"):
        Grammars(tokenizer, 1).constraint(WORD)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_run", [3, 4, 6])
def test_answer_of_any_depth_ends_where_its_grammar_does(engine: Engine, num_run: int, temperature: float) -> None:
    answer = answer_to(engine, PERSON, num_run=num_run, temperature=temperature)
    assert answer.end.reason == "stop"
    person = json.loads(answer.text)
    assert list(person) == ["name", "age"]
    assert person["age"] <= 99
    usage = answer.end.usage
    assert usage.completion_tokens == len(answer.text)
    # The last token is generated and not run, nor is one past it charged.
    assert usage.output_cost == (len(answer.text) - 1) * 1000 * num_run


def test_answer_may_end_at_the_length_limit(engine: Engine) -> None:
    answer = answer_to(engine, WORD, max_tokens=4)
    assert (answer.end.reason, len(answer.text)) == ("length", 4)
    assert answer.text.isalpha()


def test_answer_may_end_at_a_stop_string_or_stop_token(engine: Engine, tokenizer: Tokenizer) -> None:
    assert re.fullmatch("[a-z]{6,12}", answer_to(engine, WORD, stop=(".",)).text)
    dot = tokenizer.token_to_id(".")
    assert re.fullmatch("[a-z]{6,12}", answer_to(engine, WORD, stop_token_ids=(dot,)).text)


def test_penalties_bias_and_log_probabilities_work_within_a_grammar(engine: Engine, tokenizer: Tokenizer) -> None:
    likes = {tokenizer.token_to_id("z"): 100.0, tokenizer.token_to_id("Z"): 100.0}
    grammar = LLMatcher.grammar_from_regex("[a-z]{6}")
    answer = answer_to(engine, grammar, logit_bias=likes, top_logprobs=2)
    assert answer.text == "zzzzzz"
    assert all(event.logprob is not None and len(event.top_logprobs) == 2 for event in answer.tokens)
    letters = answer_to(engine, grammar, presence_penalty=2.0, frequency_penalty=2.0, temperature=0.0).text
    assert len(set(letters)) > 1


@pytest.mark.parametrize("native", [False, True])
def test_preempted_answer_goes_on_where_it_was(tiny: TinySite, native: bool) -> None:
    requests = [constrained(PERSON, f"r{i}", 10, 4, i, max_tokens=60) for i in range(6)]
    plenty = run_engine(build_tiny_engine(tiny.model, tiny.router, native=native).engine, requests)
    num_blocks = 6 if native else 24
    scarce = run_engine(
        build_tiny_engine(tiny.model, tiny.router, native=native, num_blocks=num_blocks).engine, requests
    )
    assert (plenty.num_preemptions, scarce.num_preemptions > 0) == (0, True)
    for request in requests:
        assert scarce.answers[request.request_id].tokens == plenty.answers[request.request_id].tokens
        json.loads(scarce.answers[request.request_id].text)


def test_prompt_from_the_prefix_cache_says_the_same(engine: Engine) -> None:
    first, again = (answer_to(engine, PERSON, num_prompt=70) for _ in range(2))
    assert again.end.usage.cached_tokens > 0
    assert again.tokens == first.tokens


def test_several_steps_in_a_row_say_what_single_steps_say(tiny: TinySite, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = [PERSON, WORD, None, LLMatcher.grammar_from_regex("[0-9]{30}")]
    requests = [replace(make_request(f"r{i}", seed=i, max_tokens=40), grammar=g) for i, g in enumerate(grammars)]
    in_bursts = run_engine(build_tiny_engine(tiny.model, tiny.router, native=True).engine, requests)
    monkeypatch.setattr("buddy_server.engine.scheduler.MOST_STEPS", 1)
    one_by_one = run_engine(build_tiny_engine(tiny.model, tiny.router, native=True).engine, requests)
    assert len(in_bursts.steps) < len(one_by_one.steps) == 40
    for request in requests:
        assert in_bursts.answers[request.request_id].tokens == one_by_one.answers[request.request_id].tokens


def test_native_and_torch_engine_say_the_same(tiny: TinySite) -> None:
    requests = [constrained(PERSON, f"r{i}", 9 + i, 4, i, max_tokens=60, temperature=0.0) for i in range(4)]
    native, torch = (
        run_engine(build_tiny_engine(tiny.model, tiny.router, native=kind).engine, requests) for kind in (True, False)
    )
    for request in requests:
        assert native.answers[request.request_id].text == torch.answers[request.request_id].text


def test_grammar_that_needs_too_much_work_ends_its_request_alone(engine: Engine, tokenizer: Tokenizer) -> None:
    only_a = {tokenizer.token_to_id("a"): 100.0}
    requests = [
        constrained(AMBIGUOUS, "bad", max_tokens=200, logit_bias=only_a),
        make_request("good", max_tokens=200),
    ]
    alone = run_engine(engine, [requests[1]]).answers["good"]
    run = run_engine(engine, requests)
    end = run.answers["bad"].end
    assert (end.reason, end.usage.completion_tokens) == ("grammar", len(run.answers["bad"].tokens))
    assert end.error is not None
    assert "Too many items" in end.error or "Current row has" in end.error
    assert set(run.answers["bad"].text) == {"a"}
    assert run.answers["good"].tokens == alone.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammar_of_tokens_that_only_the_tokenizer_has_ends_its_request_alone(
    tiny: TinySite, engine: Engine, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny.model / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<unknown {index}>" for index in range(20)])
    tokenizer.add_special_tokens(["<beyond>"])
    beyond = tokenizer.token_to_id("<beyond>")
    assert beyond >= VOCAB_SIZE
    monkeypatch.setattr(engine, "grammars", Grammars(tokenizer, VOCAB_SIZE, engine.end_token_ids))
    good = make_request("good", max_tokens=20)
    alone = run_engine(engine, [good]).answers["good"]
    for text, grammar in (("", f"start: <[{beyond}]>"), ("abc", f'start: "abc" <[{beyond}]>')):
        bad = constrained(LLMatcher.grammar_from_lark(grammar), "bad", max_tokens=20, temperature=temperature)
        run = run_engine(engine, [bad, good])
        end = run.answers["bad"].end
        assert (end.reason, end.error) == ("grammar", "it allows only tokens that the model does not have")
        assert run.answers["bad"].text == text
        assert run.answers["good"].tokens == alone.tokens


async def finish_of(service: EngineService, request: GenerationRequest) -> FinishEvent:
    async for events in service.submit(request):
        last = events[-1]
    assert isinstance(last, FinishEvent)
    # A failure comes alone.
    assert last.error is None or len(events) == 1
    return last


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_grammars_are_compiled_beside_the_steps_and_cancelled_there(
    tiny: TinySite, monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> None:
    built = build_tiny_engine(tiny.model, tiny.router)
    compiling, go_on = asyncio.Event(), asyncio.Event()
    loop, compiled = asyncio.get_running_loop(), built.engine.grammars.compiled
    grammars: list[str] = []

    def slowly(grammar: str) -> LLMatcher:
        grammars.append(grammar)
        loop.call_soon_threadsafe(compiling.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(timeout=30)
        return compiled(grammar)

    monkeypatch.setattr(built.engine.grammars, "compiled", slowly)
    service = EngineService(built.engine, built.info)
    service.start()
    try:
        waiting = asyncio.create_task(finish_of(service, constrained(WORD, "waits")))
        leaving = asyncio.create_task(finish_of(service, constrained(PERSON, "leaves")))
        await compiling.wait()
        assert (await finish_of(service, make_request("plain"))).reason == "length"
        assert not waiting.done()
        leaving.cancel()
        # The engine hears of this one after the other has left.
        await finish_of(service, make_request("later"))
        go_on.set()
        assert (await waiting).reason in ("stop", "length")
        refused = await finish_of(service, constrained("nonsense", "refused"))
        assert (refused.reason, refused.usage.completion_tokens) == ("grammar", 0)
    finally:
        await asyncio.to_thread(service.stop)
    assert not built.engine.has_work
    # Nobody waits for the grammar of the request that was cancelled.
    assert PERSON not in grammars


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_request_ends_where_compiling_its_grammar_fails_by_a_bug(
    tiny: TinySite, monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> None:
    built = build_tiny_engine(tiny.model, tiny.router)

    def fail(grammar: str) -> LLMatcher:
        raise RuntimeError("a bug")

    monkeypatch.setattr(built.engine.grammars, "compiled", fail)
    service = EngineService(built.engine, built.info)
    service.start()
    try:
        async with asyncio.timeout(10):
            assert (await finish_of(service, constrained(WORD, "bad"))).reason == "error"
            assert (await finish_of(service, make_request("plain"))).reason == "length"
    finally:
        await asyncio.to_thread(service.stop)
