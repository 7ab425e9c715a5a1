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


def test_every_chunk_has_the_shape_of_the_specification(site: Site) -> None:
    chunks = events_of(site.chat(stream=True, logprobs=True, stream_options={"include_usage": True}).text)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    envelopes = {(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}
    assert [fingerprint for *_, fingerprint in envelopes] == [INFO.system_fingerprint]
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert choices[-1]["delta"] == {}
    assert sum(len((choice["logprobs"] or {"content": []})["content"]) for choice in choices) == 6


def test_buddy_object_is_on_the_last_chunk_alone(site: Site) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = events_of(site.chat(stream=True, n=2, **options).text)
        assert [chunk for chunk in chunks if "buddy" in chunk] == chunks[-1:]


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


def test_official_client_reads_over_pings(serve: Serve) -> None:
    site = serve(FakeEngine(delay_s=0.05, num_words=3), ServerConfig(ping_interval_s=0.02))
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
