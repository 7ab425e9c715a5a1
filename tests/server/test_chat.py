"""Chat completions that are not streamed, as the official client sees them."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from buddy_server.config import ServerConfig
from buddy_server.errors import Overloaded
from buddy_server.tenancy.bills import Order
from buddy_server.tenancy.capacity import Capacity
from buddy_server.tenancy.depth import DepthDecision
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tenancy.request_life import RequestLife
from buddy_server.tenancy.tenants import Caller
from fakes.engine import INFO, PREDICTING, FakeEngine
from fakes.site import Serve, Site
from fakes.tenancy import tenancy_of

TEXT = "Hello there, wörld 🐦!"
SAY_HI: list[Any] = [{"role": "user", "content": "hi"}]


def test_completion_has_the_shape_of_the_specification(site: Site) -> None:
    body = site.chat().json()
    ChatCompletion.model_validate(body, strict=True)
    assert (body["object"], body["system_fingerprint"]) == ("chat.completion", INFO.system_fingerprint)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    # The prompt is <|user|> hi <|end|> <|assistant|>.
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_official_client_reads_a_completion(site: Site) -> None:
    completion = site.client().chat.completions.create(model=INFO.model_id, messages=SAY_HI)
    assert completion.choices[0].message.content == TEXT
    assert completion.model_extra is not None
    assert completion.model_extra["buddy"]["layers"] == 8


def test_official_async_client_reads_a_completion(site: Site) -> None:
    async def ask() -> str | None:
        async with site.async_client() as client:
            completion = await client.chat.completions.create(model=INFO.model_id, messages=SAY_HI)
        return completion.choices[0].message.content

    assert asyncio.run(ask()) == TEXT


def test_max_tokens_ends_with_length(site: Site) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        body = site.chat(**{field: 2}).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 2


def test_several_choices_come_in_order_and_with_seeds_of_their_own(site: Site) -> None:
    body = site.chat(n=3, seed=2**63 - 2).json()
    ChatCompletion.model_validate(body, strict=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {TEXT}
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 18, 22)
    assert body["buddy"]["layer_tokens"] == 3 * (4 + 6 - 1)
    seeds = {request.sampling.seed for request in site.engine.requests}
    assert seeds == {2**63 - 2, 2**63 - 1, 2**63}
    assert len({request.request_id for request in site.engine.requests}) == 3


def test_usage_tells_the_prompt_tokens_that_no_choice_had_to_compute(serve: Serve) -> None:
    site = serve(FakeEngine(num_cached=(3, 2, 4)))
    client = site.client()
    one = client.chat.completions.create(model=INFO.model_id, messages=SAY_HI)
    three = client.chat.completions.create(model=INFO.model_id, messages=SAY_HI, n=3)
    for answer, num_cached in ((one, 3), (three, 2)):
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (4, num_cached)
    assert site.sample("buddy_prefix_cache_hits_total", tenant="default") == 5


def test_logprobs_have_bytes_and_no_infinity(site: Site) -> None:
    body = site.chat(logprobs=True, top_logprobs=2).json()
    ChatCompletion.model_validate(body, strict=True)
    entries = body["choices"][0]["logprobs"]["content"]
    assert body["choices"][0]["logprobs"]["refusal"] is None
    assert [entry["token"] for entry in entries] == list(site.engine.words)
    assert bytes(entries[5]["bytes"]).decode() == " 🐦"
    assert [top["logprob"] for top in entries[0]["top_logprobs"]] == [-9999.0, -9999.0]


def test_log_probability_that_is_no_number_is_the_lowest(serve: Serve) -> None:
    body = serve(FakeEngine(logprob=float("nan"))).chat(logprobs=True).json()
    assert [entry["logprob"] for entry in body["choices"][0]["logprobs"]["content"]] == [-9999.0] * 6


def test_sampling_parameters_reach_the_engine(site: Site) -> None:
    site.chat(
        temperature=0, top_p=0.5, top_k=5, min_p=0.1, seed=7, stop="x", logit_bias={"3": -100, "4": 1.5},
        presence_penalty=-2, frequency_penalty=2, max_completion_tokens=3, max_tokens=9, top_logprobs=0,
    )  # fmt: skip
    sampling = site.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 2)
    assert (sampling.seed, sampling.stop, sampling.max_tokens) == (7, ("x",), 3)
    assert sampling.logit_bias == {3: -100, 4: 1.5}
    assert sampling.top_logprobs is None


def test_explicit_nulls_and_unknown_fields_change_nothing(site: Site) -> None:
    nulls = ("temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "tools", "tool_choice",
             "response_format", "logprobs", "max_tokens", "logit_bias", "budget", "buddy")  # fmt: skip
    ignored = {
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "metadata": {"a": "b"},
        "zz": 1,
    }
    harmless = {"modalities": ["text"], "response_format": {"type": "text"}, "tool_choice": "none"}
    assert site.chat(**(dict.fromkeys(nulls) | ignored)).status_code == 200
    assert site.chat(**harmless).status_code == 200
    assert site.engine.requests[0].sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("top_p", 0),
        ("n", 9),
        ("n", True),
        ("top_logprobs", 21),
        ("presence_penalty", -3),
        ("max_tokens", 0),
        ("stop", ["a"] * 17),
        ("stop", ""),
        ("logit_bias", {"1000": 1}),
        ("logit_bias", {"²": 1}),
        ("messages", []),
        ("buddy", {"trase": True}),
        ("messages", None),
        ("model", None),
        ("seed", 2**63),
        ("top_k", 2**31),
        ("stop_token_ids", [2**31]),
    ],
)
def test_value_that_cannot_be_honoured_is_refused_by_name(site: Site, field: str, value: object) -> None:
    response = site.chat(**{field: value})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"].startswith(field)
    assert field in error["message"]
    assert site.engine.requests == []


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content",
        ),
        ({"role": "user", "content": None}, "messages[0]"),
        ({"role": "assistant"}, "messages[0]"),
        ({"role": "", "content": "hi"}, "messages[0].role"),
        ({"role": "user", "content": "forbidden"}, "messages"),
    ],
)
def test_bad_message_is_refused_by_place(site: Site, message: dict[str, Any], param: str) -> None:
    response = site.chat(messages=[message])
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_prompt_and_output_must_fit_the_smaller_of_context_and_cache(site: Site) -> None:
    fits = site.chat(max_tokens=196)
    assert fits.status_code == 200
    response = site.chat(max_tokens=197)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "201" in error["message"]
    assert "200" in error["message"]
    long = site.chat(messages=[{"role": "user", "content": "hi " * 300}])
    assert long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_would_be_too_long_names_the_field_that_asked_for_it(site: Site, field: str) -> None:
    error = site.chat(**{field: 10**6}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)


def test_without_a_limit_the_output_may_fill_what_remains(site: Site) -> None:
    site.chat()
    assert site.engine.requests[0].sampling.max_tokens == INFO.kv_capacity_tokens - 4


@pytest.mark.parametrize(
    ("engine", "retry_after"),
    [
        ({"is_ready": False}, "7"),
        ({"fail_at": 2, "fail_with": "cancelled"}, "1"),
        ({"fail_at": 2, "fail_with": "lost"}, "1"),
    ],
)
def test_engine_that_is_not_there_gives_503_with_retry_after(
    serve: Serve, engine: dict[str, Any], retry_after: str
) -> None:
    response = serve(FakeEngine(**engine)).chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert response.headers["retry-after"] == retry_after


@pytest.mark.parametrize("stream", [True, False])
def test_of_a_burst_as_many_are_accepted_as_run_and_wait_and_room_comes_back(serve: Serve, stream: bool) -> None:
    site = serve(FakeEngine(PREDICTING, predicted=4, delay_s=0.05), ServerConfig(max_waiting=3))
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: site.chat(budget="auto", stream=stream), range(20)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [503] * 13
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("overloaded", "1")
    assert site.chat(n=7).status_code == 200


def test_more_answers_than_there_is_ever_room_for_are_a_bad_request(serve: Serve) -> None:
    response = serve(config=ServerConfig(max_waiting=1)).chat(n=6)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    assert "this server allows 5" in response.json()["error"]["message"]


@pytest.mark.anyio
async def test_an_answer_whose_last_event_was_read_takes_no_room_from_the_other_choices(serve: Serve) -> None:
    engine, config, metrics = FakeEngine(), ServerConfig(max_waiting=0), serve().metrics
    tenancy = tenancy_of(engine, config, metrics)
    capacity = Capacity(engine, tenancy.book)
    caller = Caller(Tenant("default", Tier("default")))
    life = RequestLife(
        capacity, tenancy_of(FakeEngine(), ServerConfig(), metrics).bills, metrics.request(caller.tenant)
    )
    depth = DepthDecision(1.0, 1.0, 8000, "request")
    await life.admit(Order("r", caller, depth, num_answers=4, num_prompt_tokens=4, cost=0))
    with pytest.raises(Overloaded):
        capacity.reserve("default", 1)
    life.answered()
    capacity.reserve("default", 1)


@pytest.mark.parametrize("engine", [{"fail_at": 2}, {"raise_at": 0}, {"raise_at": 3}])
@pytest.mark.parametrize("n", [1, 3])
def test_failing_engine_gives_500_that_says_nothing_of_its_inside(serve: Serve, engine: dict[str, int], n: int) -> None:
    site = serve(FakeEngine(**engine))  # type: ignore[arg-type]
    response = site.chat(n=n)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    assert len(site.engine.finished) + len(site.engine.cancelled) == n
    assert site.sample("buddy_requests_total", outcome="error") == 1


def test_a_token_that_only_the_tokenizer_knows_is_refused(serve: Serve) -> None:
    # Some published tokenizers have one token more than their model has rows.
    site = serve(FakeEngine(info=replace(INFO, vocab_size=2)))
    answer = site.chat()
    assert answer.status_code == 400
    assert "the model's tokens are 0 to 1" in answer.json()["error"]["message"]
    assert not site.engine.requests


def test_end_tokens_are_not_ignored_where_the_form_of_the_answer_says_when_it_ends(site: Site) -> None:
    assert site.chat(ignore_eos=True).status_code == 200
    error = site.chat(ignore_eos=True, response_format={"type": "json_object"}).json()["error"]
    assert error["param"] == "ignore_eos"
