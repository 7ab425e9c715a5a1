"""The Responses API through the official Python client."""

import asyncio
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from buddy_routing.embedded import MODEL_ID

ASKED: dict[str, Any] = {
    "model": MODEL_ID,
    "input": "Tell me a short story about a dog named Max.",
    "max_output_tokens": 60,
    "temperature": 0,
}


def test_response_is_typed(client: openai.OpenAI) -> None:
    answer = client.responses.create(**ASKED, extra_body={"budget": 0.5})
    assert isinstance(answer, Response)
    assert answer.id.startswith("resp_")
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (answer.status, answer.incomplete_details and answer.incomplete_details.reason) in (
        ("completed", None),
        ("incomplete", "max_output_tokens"),
    )
    assert answer.model_extra is not None
    assert answer.model_extra["buddy"]["layers_per_token"] == answer.model_extra["buddy"]["layers"] / 2


def test_instructions_and_messages_are_a_conversation(client: openai.OpenAI) -> None:
    turns: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": "What is 2 + 3?"},
    ]
    answer = client.responses.create(**ASKED | {"input": turns}, instructions="Be kind.")
    alone = client.responses.create(**ASKED | {"input": "What is 2 + 3?"})
    assert answer.output_text
    assert answer.usage is not None
    assert alone.usage is not None
    assert answer.usage.input_tokens > alone.usage.input_tokens


def test_stream_has_numbered_events_that_add_up_to_the_whole(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage


def test_stream_helper_gives_the_final_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED | {"input": "What is 34 + 25?"})
    with client.responses.stream(**ASKED | {"input": "What is 34 + 25?"}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert final.status == "completed"


def test_async_client_gets_the_same(client: openai.OpenAI) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as asynchronous:
            stream = await asynchronous.responses.create(**ASKED, stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    assert asyncio.run(ask()) == client.responses.create(**ASKED).output_text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("tools", [{"type": "web_search"}]),
    ],
)
def test_what_needs_a_store_or_other_services_is_refused_by_name(
    client: openai.OpenAI, field: str, value: object
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASKED | {field: value})
    assert caught.value.param is not None
    assert caught.value.param.startswith(field)
