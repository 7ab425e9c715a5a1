"""Streams, byte for byte and as the official client sees them."""

import asyncio
import json
from typing import Any

import pytest
from openai import APIError
from openai.types.chat import ChatCompletionChunk

from buddy_server.config import ServerConfig
from fakes.engine import INFO, FakeEngine
from fakes.site import Serve, Site

TEXT = "Hello there, wörld 🐦!"
SAY_HI: list[Any] = [{"role": "user", "content": "hi"}]


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of every data line of a whole stream, which must end in [DONE]."""
    lines = [line for line in text.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_stream_has_data_lines_alone_and_never_a_carriage_return(site: Site) -> None:
    response = site.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in response.content
    assert response.content.endswith(b"data: [DONE]\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in response.text.strip().split("\n\n"))


def test_every_chunk_has_the_shape_of_the_specification(site: Site) -> None:
    chunks = events_of(site.chat(stream=True, logprobs=True).text)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert "usage" not in chunk
        assert len(chunk["choices"]) == 1
        assert "finish_reason" in chunk["choices"][0]
        assert "tool_calls" not in chunk["choices"][0]["delta"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert sum(len((chunk["choices"][0]["logprobs"] or {"content": []})["content"]) for chunk in chunks) == 6


def test_buddy_object_is_on_the_last_chunk_alone(site: Site) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = events_of(site.chat(stream=True, n=2, **options).text)
        assert [chunk for chunk in chunks if "buddy" in chunk] == chunks[-1:]


def test_usage_comes_once_in_a_last_chunk_with_empty_choices_and_only_if_asked(serve: Serve) -> None:
    site = serve(FakeEngine(num_cached=(3,)))
    chunks = events_of(site.chat(stream=True, stream_options={"include_usage": True}).text)
    ChatCompletionChunk.model_validate(chunks[-1], strict=True)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])


def test_official_client_reads_a_stream(site: Site) -> None:
    stream = site.client().chat.completions.create(model=INFO.model_id, messages=SAY_HI, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT


def test_official_async_client_reads_several_choices_of_a_stream(site: Site) -> None:
    async def ask() -> list[str]:
        texts = ["", "", ""]
        async with site.async_client() as client:
            stream = await client.chat.completions.create(
                model=INFO.model_id, messages=SAY_HI, stream=True, n=3, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        return texts

    assert asyncio.run(ask()) == [TEXT] * 3


def test_pings_are_comments_that_clients_read_over(serve: Serve) -> None:
    site = serve(FakeEngine(delay_s=0.05, num_words=3), ServerConfig(ping_interval_s=0.02))
    response = site.chat(stream=True)
    pings = [line for line in response.text.split("\n") if line.startswith(":")]
    assert len(pings) >= 3
    assert events_of(response.text)
    stream = site.client().chat.completions.create(model=INFO.model_id, messages=SAY_HI, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello there!"


@pytest.mark.parametrize("engine", [{"fail_at": 2}, {"raise_at": 2}, {"raise_at": 0}])
def test_error_in_mid_stream_is_an_event_and_ends_the_stream(serve: Serve, engine: dict[str, int]) -> None:
    site = serve(FakeEngine(**engine))  # type: ignore[arg-type]
    response = site.chat(stream=True)
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "[DONE]" not in response.text
    stream = site.client().chat.completions.create(model=INFO.model_id, messages=SAY_HI, stream=True)
    with pytest.raises(APIError, match="failed on this request"):
        list(stream)
    assert site.sample("buddy_requests_total", outcome="error") == 2


def test_request_that_is_refused_is_no_stream(site: Site) -> None:
    response = site.chat(stream=True, budget=5)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")
