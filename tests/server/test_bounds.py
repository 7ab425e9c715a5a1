"""What a request may hold, and how it is told what it may not."""

import json
from typing import Any

import pytest

from buddy_server.api.json_bound import JsonBound
from buddy_server.errors import InvalidRequest, shown
from fakes.engine import INFO, FakeEngine
from fakes.site import Serve, Site

HUGE = int("1" * 4300)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def post(site: Site, path: str, **fields: object) -> Any:
    return site.http.post(path, content=json.dumps({"model": INFO.model_id} | fields))


def called(arguments: str) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    return [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"stop": 3}, "stop", "stop: 3 is not allowed: give a text or up to 16 texts"),
        ({"stop": ["a", ""]}, "stop[1]", "stop[1]: '' is not allowed"),
        ({"stop": "a" * 1025}, "stop", "1 to 1024 characters"),
        ({"stop_token_ids": [1, 2**31]}, "stop_token_ids", "2147483648 is not allowed: give token ids of the model, 0"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]", "-1 is not allowed"),
        ({"stop_token_ids": "x"}, "stop_token_ids", "'x' is not allowed: give a list of up to 64 token ids"),
        ({"logit_bias": {str(key): 1 for key in range(4097)}}, "logit_bias", "an object of up to 4096 token ids"),
        ({"logit_bias": {"1": "x"}}, "logit_bias", "'x' for token 1 is not allowed"),
        ({"logit_bias": {"1000": 1}}, "logit_bias", "1000 is not allowed: give token ids of the model, 0 to"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs: 3 is not allowed: give it together with logprobs: true"),
        ({"buddy": {"a": 1, "trace": True}}, "buddy", "'a' is not allowed: give the option \"trace\" alone"),
        ({"messages": [1, 1]}, "messages[0]", "messages[0]: 1 is not allowed"),
        ({"messages": [{"role": "user", "content": "hi"}] * 2049}, "messages", "at most 2048 items"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]}, "messages[0].tool_calls", "at most 128"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content", "part 0 of it, 'a', is not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
            "messages[0].content",
            "has 1025 parts, allowed are 1024",
        ),
        ({"messages": called("[" * 65 + "]" * 65)}, "messages[0].tool_calls[0].function.arguments", "than the 64"),
    ],
)
def test_refusal_names_the_place_the_value_and_what_is_allowed(
    site: Site, fields: dict[str, object], param: str, told: str
) -> None:
    response = site.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert told in error["message"]
    assert error["message"].startswith(param)
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("prompt", "param", "told"),
    [
        ([], "prompt", "prompt: [] is not allowed: give a text, a list of token ids, or a list of 1 to 128"),
        (3, "prompt", "prompt: 3 is not allowed"),
        (None, "prompt", "prompt: null is not allowed"),
        ([1, "a"], "prompt[1]", "prompt[1]: 'a' is not allowed: give token ids"),
        ([[1], [2, -3]], "prompt[1][1]", "prompt[1][1]: -3 is not allowed"),
        ([[1], []], "prompt[1]", "prompt[1]: [] is not allowed"),
        (["a", [1]], "prompt[1]", "prompt[1]: [1] is not allowed"),
        ([True], "prompt[0]", "true"),
        (["a"] * 129, "prompt", "there are 129"),
        ([HUGE // 1000], "prompt", "There is token 1111"),
    ],
)
def test_bad_prompt_is_refused_by_place(site: Site, prompt: object, param: str, told: str) -> None:
    response = post(site, "/v1/completions", prompt=prompt)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert told in error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "n", "best_of", "top_k", "seed", "budget"])
def test_integer_of_thousands_of_digits_is_a_400_that_shows_its_beginning(site: Site, field: str) -> None:
    path = "/v1/completions" if field == "best_of" else "/v1/chat/completions"
    body = {"model": INFO.model_id, "prompt": "hi", "messages": [{"role": "user", "content": "hi"}], field: 0}
    content = json.dumps(body).replace(f'"{field}": 0', f'"{field}": {"1" * 4300}')
    response = site.http.post(path, content=content)
    assert response.status_code == 400
    assert "1" * 60 in response.text
    assert len(response.text) < 500


def test_values_are_shown_shortened_whatever_they_are() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (HUGE, -HUGE * 10**5, "x" * 10**6, list(range(10**6)), dict.fromkeys(map(str, range(10**6))), deep):
        assert 10 < len(shown(value)) <= 83
    assert shown(HUGE).startswith("1" * 60)
    assert (shown("a"), shown([1, "b"]), shown(1.5), shown(None)) == ("'a'", "[1, 'b']", "1.5", "null")


def test_body_as_large_as_is_allowed_is_taken(serve: Serve) -> None:
    site = serve(FakeEngine())
    prompts = [[1] * 180 for _ in range(128)]
    assert post(site, "/v1/completions", prompt=prompts, max_tokens=1).status_code == 200
    assert [request.prompt_tokens for request in site.engine.requests] == [(1,) * 180] * 128
    text = '[{"a": "\\"[,"}, ' * 20_000
    assert site.chat(user=text).status_code == 200


def test_json_in_a_text_counts_as_one_value() -> None:
    bound = JsonBound()
    bound.add(json.dumps({"text": '\\"[{,\\\\' * 10**5, "more": ["a\\", "b", "["]}).encode())
    with pytest.raises(InvalidRequest, match="second: there are more lists and objects than the 16384"):
        JsonBound().add(json.dumps({"first": [[1]], "second": {"inner": [[]] * 2**14}}).encode())
    with pytest.raises(InvalidRequest, match="The request body: there are more lists and objects within each other"):
        JsonBound().add(b"[" * 65)
    JsonBound().add(b"[" * 64)


def test_texts_are_counted_with_the_names_of_fields() -> None:
    at_most = {str(key): "" for key in range(2**15 - 1)}
    JsonBound().add(json.dumps({"first": at_most}).encode())
    with pytest.raises(InvalidRequest, match="second: there are more texts than the 65536 allowed in a request"):
        JsonBound().add(json.dumps({"first": at_most, "second": "one more"}).encode())
    for malformed in (b'"' * 4_000_000, b'{"":"":' + b'"":' * 10**6, b'"" ' * 10**6):
        with pytest.raises(InvalidRequest, match="The request body: there are more texts"):
            JsonBound().add(malformed)


def test_prompt_far_too_long_is_refused_before_it_is_tokenized_as_a_whole(site: Site) -> None:
    for response in (
        site.chat(messages=[{"role": "user", "content": "hi " * 10**6}]),
        post(site, "/v1/completions", prompt=["hi", "hi " * 10**6]),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "at least 5" in error["message"]
