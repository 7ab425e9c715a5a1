"""litellm as a client, unmodified."""

import asyncio
from typing import Any

import litellm
import pytest

litellm.telemetry = False
QUESTION = [{"role": "user", "content": "Tell me a short story about a dog named Max."}]


@pytest.fixture(scope="module")
def asked(base_url: str) -> dict[str, Any]:
    return {
        "model": "openai/buddy-7m", "messages": QUESTION, "api_base": base_url, "api_key": "sk-open", "stop": "\n",
        "temperature": 0, "num_retries": 0, "max_retries": 0,
    }  # fmt: skip


def test_completion_gives_text_usage_and_the_buddy_object(asked: dict[str, Any]) -> None:
    answer = litellm.completion(**asked, extra_body={"budget": 0.5})
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.buddy["layers_per_token"] == answer.buddy["layers"] / 2


def test_stream_adds_up_to_the_whole_answer(asked: dict[str, Any]) -> None:
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert sum(map(bool, texts)) > 1
    assert "".join(text or "" for text in texts) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_asynchronous_completion_says_the_same(asked: dict[str, Any]) -> None:
    answer = asyncio.run(litellm.acompletion(**asked))
    assert answer.choices[0].message.content == litellm.completion(**asked).choices[0].message.content


def test_plain_completion_gives_text(asked: dict[str, Any]) -> None:
    fields = {name: value for name, value in asked.items() if name != "messages"} | {
        "model": "text-completion-openai/buddy-7m"
    }
    assert litellm.text_completion(prompt="Once upon a time", **fields).choices[0].text


def test_errors_keep_their_kind(asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match=r"0\.125"):
        litellm.completion(**asked, extra_body={"budget": 7})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**asked | {"api_key": "sk-nobody"})
    with pytest.raises(litellm.RateLimitError):
        litellm.completion(**asked | {"api_key": "sk-spent"})
