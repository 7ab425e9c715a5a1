"""The official Python client, unmodified. Its strict mode checks every response against its types."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from openai.lib.streaming.chat import ContentDeltaEvent, ContentDoneEvent, LogprobsContentDoneEvent
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from buddy_routing.embedded import MODEL_ID
from end_to_end.tenant_site import LONG, Served
from fakes.serving import wait_until

FREED_S = 0.5
"""How soon the places of an abandoned request are free; the answers of LONG take several times as long."""
ASKED: dict[str, Any] = {
    "model": MODEL_ID,
    "messages": [{"role": "user", "content": "Tell me a short story about a dog named Max."}],
    "stop": "\n",
    "temperature": 0,
}
LONG_FIELDS: dict[str, Any] = {
    "model": MODEL_ID,
    "messages": ASKED["messages"],
    "extra_body": {"budget": LONG["budget"]},
} | {name: value for name, value in LONG.items() if name != "budget"}


def num_running(site: Served) -> float:
    return site.sample("buddy_num_requests_running")


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    listed = client.models.list()
    assert [model.id for model in listed] == [MODEL_ID]
    model = client.models.retrieve(MODEL_ID)
    assert isinstance(model, Model)
    assert model == listed.data[0]


def test_chat_completion_is_typed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=3, n=2)
    assert isinstance(answer, ChatCompletion)
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")
    assert answer.usage is not None
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.content
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        spelled = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
        # The tokens of the stop string are among them.
        assert spelled.decode().partition("\n")[0] == choice.message.content
        assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {3}


def test_stream_is_typed_and_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED)
    chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)
    texts = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert sum(map(bool, texts)) > 1
    assert "".join(text or "" for text in texts) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_stream_helper_accumulates_events_into_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED, logprobs=True)
    with client.chat.completions.stream(**ASKED, logprobs=True) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.choices[0].logprobs == whole.choices[0].logprobs
    texts = [event for event in events if isinstance(event, ContentDeltaEvent)]
    assert "".join(event.delta for event in texts) == texts[-1].snapshot == whole.choices[0].message.content
    assert [event.content for event in events if isinstance(event, ContentDoneEvent)] == [texts[-1].snapshot]
    assert sum(isinstance(event, LogprobsContentDoneEvent) for event in events) == 1


def test_plain_completion_is_typed_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL_ID, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**fields, logprobs=2)
    # Its types miss that a chunk before the last one has no finish_reason, so not in the strict mode.
    with openai.OpenAI(base_url=client.base_url, api_key=client.api_key) as lenient:
        chunks = list(lenient.completions.create(**fields, stream=True))
    assert all(isinstance(answer, Completion) for answer in (whole, *chunks))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert whole.choices[0].logprobs is not None
    assert "".join(whole.choices[0].logprobs.tokens or []) == whole.choices[0].text


def test_raw_response_tells_the_headers(client: openai.OpenAI) -> None:
    response = client.chat.completions.with_raw_response.create(**ASKED)
    assert response.headers["x-request-id"] == response.request_id
    assert int(response.headers["openai-processing-ms"]) >= 0
    assert isinstance(response.parse(), ChatCompletion)
    with client.chat.completions.with_streaming_response.create(**ASKED, stream=True) as streamed:
        lines = [line for line in streamed.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-1])


def test_async_client_runs_several_requests_at_once(client: openai.OpenAI, site: Served) -> None:
    async def ask() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(
            base_url=client.base_url, api_key="sk-open", max_retries=0, _strict_response_validation=True
        ) as asynchronous:
            whole = asyncio.gather(*(asynchronous.chat.completions.create(**ASKED) for _ in range(4)))
            text = ""
            async with asynchronous.chat.completions.stream(**ASKED) as stream:
                async for event in stream:
                    if event.type == "content.delta":
                        text += event.delta
            return [answer.choices[0].message.content or "" for answer in await whole], text

    whole, text = asyncio.run(ask())
    assert [*whole, text] == [client.chat.completions.create(**ASKED).choices[0].message.content] * 5


def test_timeout_raises_and_frees_the_slots(client: openai.OpenAI, site: Served) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(**LONG_FIELDS)
    wait_until(lambda: num_running(site) == 0, FREED_S)


def test_stream_closed_in_the_middle_frees_its_slots(client: openai.OpenAI, site: Served) -> None:
    stream = client.chat.completions.create(**LONG_FIELDS, stream=True)
    next(iter(stream))
    wait_until(lambda: num_running(site) == LONG["n"])
    stream.close()
    wait_until(lambda: num_running(site) == 0, FREED_S)


def test_async_task_cancelled_in_the_middle_frees_its_slots(client: openai.OpenAI, site: Served) -> None:
    async def abandon(stream: bool) -> None:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="sk-open") as asynchronous:

            async def read() -> None:
                answer = await asynchronous.chat.completions.create(**LONG_FIELDS, stream=stream)
                if stream:
                    async for _ in answer:
                        pass

            reading = asyncio.create_task(read())
            await asyncio.to_thread(wait_until, lambda: num_running(site) == LONG["n"])
            reading.cancel()
            await asyncio.to_thread(wait_until, lambda: num_running(site) == 0, FREED_S)
            assert reading.cancelled()

    asyncio.run(abandon(stream=True))
    asyncio.run(abandon(stream=False))


def counting(site: Served, tenant: str, seen: Callable[[httpx2.Response], None]) -> openai.OpenAI:
    """A client of `tenant` with its usual retries, whose responses are `seen`."""
    http = openai.DefaultHttpxClient(event_hooks={"response": [seen]})
    return openai.OpenAI(base_url=f"{site.url}/v1", api_key=f"sk-{tenant}", http_client=http)


def test_limited_tenant_is_retried_after_the_time_the_server_tells(site: Served) -> None:
    answers: list[tuple[int, float, str | None]] = []

    def seen(response: httpx2.Response) -> None:
        answers.append((response.status_code, time.monotonic(), response.headers.get("retry-after-ms")))
        held.close()

    with counting(site, "single", lambda _: None) as other, counting(site, "single", seen) as client:
        held = other.chat.completions.create(**LONG_FIELDS, stream=True)
        next(iter(held))
        assert client.chat.completions.create(**ASKED).choices[0].message.content
    assert [status for status, _, _ in answers] == [429, 200]
    (_, refused_at, retry_after_ms), (_, answered_at, _) = answers
    assert retry_after_ms is not None
    assert 0 < float(retry_after_ms) / 1000 <= answered_at - refused_at


def test_spent_quota_is_not_retried(site: Served) -> None:
    statuses: list[int] = []
    with (
        counting(site, "spent", lambda response: statuses.append(response.status_code)) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        client.chat.completions.create(**ASKED)
    assert (caught.value.code, statuses) == ("insufficient_quota", [429])


def test_wrong_key_and_wrong_model_have_errors_of_their_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-nobody").models.list()
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**ASKED | {"model": "gpt-5"})
    assert caught.value.code == "model_not_found"
