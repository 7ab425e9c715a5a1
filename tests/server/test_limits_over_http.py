"""What a client sees of the limits of its tenant's tier."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from buddy_server.config import ServerConfig
from buddy_server.tenancy.policy import Tenant, Tier
from fakes.engine import INFO, NUM_LAYERS, FakeEngine
from fakes.serving import wait_until
from fakes.site import Serve


def limited(**limits: Any) -> ServerConfig:
    return ServerConfig(tenants=(Tenant("default", Tier("small", **limits)),))


def test_twenty_at_once_against_ten_per_minute_are_exactly_ten(serve: Serve) -> None:
    site = serve(config=limited(requests_per_minute=10))
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: site.chat(), range(20)))
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [429] * 10
    assert len(site.engine.requests) == 10
    assert site.sample("buddy_rate_limited_total", tenant="default", limit="requests_per_minute") == 10
    assert site.sample("buddy_requests_total", outcome="limited") == 10


def test_refusal_says_which_limit_when_to_retry_and_what_is_left(serve: Serve) -> None:
    site = serve(config=limited(requests_per_minute=1))
    first, second = site.chat(), site.chat()
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert 59 < float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    error = second.json()["error"]
    assert (second.status_code, error["code"], error["param"]) == (429, "rate_limit_exceeded", None)
    assert "a limit of 1 for requests per minute. Try again in" in error["message"]
    assert 50 < int(second.headers["retry-after"]) <= 60
    assert second.headers["x-ratelimit-remaining-requests"] == "0"


def test_streams_have_the_headers_too(serve: Serve) -> None:
    site = serve(config=limited(requests_per_minute=5, layer_tokens_per_minute=1000))
    headers = site.chat(stream=True).headers
    assert headers["x-ratelimit-remaining-requests"] == "4"
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(headers["x-ratelimit-remaining-tokens"]) < 1000


def test_no_limits_no_headers(serve: Serve) -> None:
    assert not any(name.startswith("x-ratelimit") for name in serve().chat().headers)


def test_layer_tokens_are_held_to_the_token(serve: Serve) -> None:
    engine = FakeEngine(num_words=100)
    site = serve(engine, limited(layer_tokens_per_minute=30))
    num_prompt = site.chat(max_tokens=1).json()["usage"]["prompt_tokens"]
    # The last token of an answer is not run.
    left = 30 - num_prompt
    refused = site.chat(max_tokens=left - num_prompt + 1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    granted = site.chat(max_tokens=left - num_prompt)
    assert granted.status_code == 200
    assert granted.headers["x-ratelimit-remaining-tokens"] == "0"
    assert site.chat(max_tokens=1).status_code == 429


def test_smaller_budget_costs_less_of_the_limit(serve: Serve) -> None:
    site = serve(FakeEngine(num_words=100), limited(layer_tokens_per_minute=100))
    full = site.chat(max_tokens=10, budget=1.0).json()["buddy"]["layer_tokens"]
    before = int(site.chat(max_tokens=1, budget=0.25).headers["x-ratelimit-remaining-tokens"])
    half = site.chat(max_tokens=10, budget=0.5).json()["buddy"]["layer_tokens"]
    assert half == full / 2
    assert before - int(site.chat(max_tokens=1, budget=0.25).headers["x-ratelimit-remaining-tokens"]) < full


def test_request_that_can_never_pass_is_not_to_be_retried(serve: Serve) -> None:
    site = serve(config=limited(layer_tokens_per_minute=20))
    refused = site.chat(max_tokens=100)
    assert refused.status_code == 429
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"
    assert "20 are left, and this request needs up to" in refused.json()["error"]["message"]


def test_request_without_a_length_gets_what_the_limit_can_pay_for(serve: Serve) -> None:
    site = serve(FakeEngine(num_words=100), limited(layer_tokens_per_minute=20))
    answer = site.chat()
    assert (answer.status_code, answer.json()["usage"]["total_tokens"]) == (200, 20)


def test_quota_of_the_month_is_insufficient_quota(serve: Serve) -> None:
    site = serve(config=limited(layer_tokens_per_month=8))
    assert site.chat(max_tokens=2).status_code == 200
    client = site.client()
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model=INFO.model_id, messages=[{"role": "user", "content": "hi"}], max_tokens=6)
    assert refused.value.code == "insufficient_quota"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert 0 < site.sample("buddy_quota_used_ratio", tenant="default") < 1


def test_refusal_by_the_quota_says_what_is_left(serve: Serve) -> None:
    site = serve(FakeEngine(num_words=100), limited(layer_tokens_per_month=30))
    used = site.chat(max_tokens=2).json()["buddy"]["layer_tokens"]
    refused = site.chat()
    assert f"{30 - used:g} are left, and this request needs up to 30" in refused.json()["error"]["message"]


def test_answers_at_once_are_free_again_when_they_end(serve: Serve) -> None:
    engine = FakeEngine(delay_s=0.05, num_words=20)
    site = serve(engine, limited(max_concurrent_requests=2))
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(site.chat) for _ in range(2)]
        wait_until(lambda: len(engine.requests) == 2)
        refused = site.chat()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert [one.result().status_code for one in running] == [200, 200]
    # Not a moment later: a client that has its answer may ask for the next.
    assert [site.chat(max_tokens=1).status_code for _ in range(5)] == [200] * 5


def test_client_that_leaves_frees_its_place_and_pays_for_what_it_used(serve: Serve) -> None:
    engine = FakeEngine(delay_s=0.02, num_words=100)
    site = serve(engine, limited(max_concurrent_requests=1, layer_tokens_per_minute=1000))
    body = {"model": INFO.model_id, "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 90}
    with httpx.stream("POST", f"{site.url}/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: engine.cancelled)
    wait_until(lambda: site.chat(max_tokens=1).status_code == 200)


def test_refused_by_capacity_costs_nothing_of_the_limits(serve: Serve) -> None:
    site = serve(config=ServerConfig((Tenant("default", Tier("small", requests_per_minute=3)),), max_waiting=1))
    site.engine.is_ready = False
    assert [site.chat().status_code for _ in range(5)] == [503] * 5
    site.engine.is_ready = True
    assert [site.chat().status_code for _ in range(4)] == [200, 200, 200, 429]


def test_longest_answer_of_the_tier_is_named(serve: Serve) -> None:
    site = serve(FakeEngine(num_words=100), limited(max_completion_tokens=7))
    refused = site.chat(max_tokens=8)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert "tier 'small' allows at most 7" in refused.json()["error"]["message"]
    assert site.chat().json()["usage"]["completion_tokens"] == 7


def test_choices_are_one_request_and_all_of_them_are_paid_for(serve: Serve) -> None:
    site = serve(FakeEngine(num_words=100), limited(requests_per_minute=2, layer_tokens_per_minute=10_000))
    answer = site.chat(n=3, max_tokens=5)
    used = 10_000 - int(site.chat(max_tokens=1).headers["x-ratelimit-remaining-tokens"])
    assert answer.json()["buddy"]["layer_tokens"] <= used <= answer.json()["buddy"]["layer_tokens"] + 2 * NUM_LAYERS
