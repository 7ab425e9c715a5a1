"""Plain completions through the official client: several prompts, echo, log probabilities, streams."""

import json

import openai
import pytest

from fakes.engine import FakeEngine
from fakes.site import Serve, Site

TEXT = "Hello there, wörld 🐦!"


def complete(site: Site, **fields: object) -> openai.types.Completion:
    return site.client().completions.create(model=site.engine.info.model_id, **fields)  # type: ignore[call-overload]


def test_a_prompt_is_completed_at_its_budget(site: Site) -> None:
    answer = complete(site, prompt="hi", extra_body={"budget": 0.5})
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    assert answer.system_fingerprint == site.engine.info.system_fingerprint
    assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices] == [(0, TEXT, "stop", None)]
    assert answer.usage is not None
    assert answer.model_extra is not None
    assert answer.model_extra["buddy"]["layers_per_token"] == 4.0


def test_sixteen_tokens_are_the_default(site: Site) -> None:
    complete(site, prompt="hi")
    assert site.engine.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize("older", [{}, {"max_tokens": 5}])
def test_limit_may_have_the_name_that_chat_gives_it(site: Site, older: dict[str, int]) -> None:
    complete(site, prompt="hi", extra_body={"max_completion_tokens": 3} | older)
    assert site.engine.requests[0].sampling.max_tokens == 3


def test_several_prompts_with_two_choices_each_stand_in_order(site: Site) -> None:
    answer = complete(site, prompt=["hi", "you are"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    asked = [request.prompt_tokens for request in site.engine.requests]
    assert asked[0] == asked[1] != asked[2] == asked[3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(asked[0]) + len(asked[2])
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_cached_tokens_of_several_prompts_add_up(serve: Serve) -> None:
    answer = complete(serve(FakeEngine(num_cached=(1, 1, 2, 2))), prompt=["hi", "you are"], n=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_token_ids_are_taken_as_they_are(site: Site) -> None:
    complete(site, prompt=[1, 2, 3])
    complete(site, prompt=[[1, 2], [3]])
    assert [request.prompt_tokens for request in site.engine.requests] == [(1, 2, 3), (1, 2), (3,)]


def test_echo_puts_the_prompt_before_the_completion(site: Site) -> None:
    assert complete(site, prompt="hi", echo=True).choices[0].text == "hi" + TEXT


def test_echo_with_logprobs_tells_those_of_the_prompt_too(site: Site) -> None:
    logprobs = complete(site, prompt="you are", echo=True, logprobs=1).choices[0].logprobs
    assert logprobs is not None
    num_prompt = len(site.engine.requests[0].prompt_tokens)
    assert site.engine.requests[0].sampling.prompt_logprobs == 1
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs) > num_prompt
    assert logprobs.text_offset == sorted(logprobs.text_offset or [])


def test_log_probability_that_is_no_number_is_the_lowest(serve: Serve) -> None:
    site = serve(FakeEngine(logprob=float("nan")))
    logprobs = complete(site, prompt="you are", echo=True, logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [None] + [-9999.0] * 7
    assert logprobs.top_logprobs is not None
    assert {value for top in logprobs.top_logprobs if top for value in top.values()} == {-9999.0}


def test_no_token_and_echo_scores_the_prompt_alone(site: Site) -> None:
    answer = complete(site, prompt="you are", echo=True, logprobs=0, max_tokens=0, extra_body={"budget": 0.5})
    choice = answer.choices[0]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 0)
    assert answer.model_extra is not None
    assert answer.model_extra["buddy"]["layer_tokens"] == 1.0
    assert choice.text == "you are"
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or []) == len(site.engine.requests[0].prompt_tokens)


def test_stream_ends_with_usage_and_done(site: Site) -> None:
    with site.client().completions.create(
        model=site.engine.info.model_id, prompt="hi", stream=True, echo=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "hi" + TEXT
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage is not None) == ([], True)
    assert chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "not a single token"),
        ({"prompt": [0, 10**6]}, "token 1000000"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens: 0 is not allowed: give at least 1, or echo"),
        ({"prompt": "hi", "max_completion_tokens": 10**6}, '"param": "max_completion_tokens"'),
        ({"prompt": "hi", "best_of": 3}, "best_of: 3 is not allowed: give the value of n, 1"),
        ({"prompt": "hi", "logprobs": 21}, "logprobs"),
        ({"prompt": "hi", "suffix": "end"}, "unsupported_parameter"),
        ({"prompt": "hi", "budget": 0.01}, "budget"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(site: Site, fields: dict[str, object], told: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(site, extra_body=fields, prompt=fields.get("prompt", "hi"))
    assert told in json.dumps(caught.value.body)


def test_engine_failure_is_a_500(serve: Serve) -> None:
    site = serve(FakeEngine(fail_at=2))
    with pytest.raises(openai.InternalServerError):
        complete(site, prompt="hi", extra_headers={"x-stainless-retry-count": "0"})
