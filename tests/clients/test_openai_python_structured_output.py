"""Structured output through the official Python client, at every budget."""

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from buddy_routing.embedded import MODEL_ID

BUDGETS = [1.0, 0.5, 0.125]


class Animal(BaseModel):
    kind: Literal["bird", "cat", "dog"]
    legs: int = Field(ge=0, le=8)


class Farm(BaseModel):
    name: Literal["Green Hill", "Old Mill"]
    animals: list[Animal] = Field(min_length=1, max_length=2)
    is_open: bool


ASKED: dict[str, Any] = {
    "model": MODEL_ID,
    "messages": [{"role": "user", "content": "Describe a farm."}],
    "temperature": 0,
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_parse_gives_the_model_that_was_asked_for(client: openai.OpenAI, budget: float) -> None:
    answer = client.chat.completions.parse(**ASKED, response_format=Farm, extra_body={"budget": budget})
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Farm)


def test_stream_helper_parses_what_parse_does(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(**ASKED, response_format=Farm).choices[0].message
    with client.chat.completions.stream(**ASKED, response_format=Farm) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion().choices[0].message
    assert text == whole.content
    assert final.parsed == whole.parsed
    assert isinstance(final.parsed, Farm)


def test_async_client_parses_several_at_once(client: openai.OpenAI) -> None:
    async def ask() -> list[Farm | None]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as asynchronous:
            asked = ASKED | {"temperature": 1.0, "response_format": Farm}
            answers = await asyncio.gather(
                *(asynchronous.chat.completions.parse(**asked, seed=seed) for seed in range(8))
            )
        return [answer.choices[0].message.parsed for answer in answers]

    farms = asyncio.run(ask())
    assert all(isinstance(farm, Farm) for farm in farms)
    assert len({str(farm) for farm in farms}) > 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_json_object_is_one(client: openai.OpenAI, budget: float) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            **ASKED | {"temperature": 1.0}, response_format={"type": "json_object"}, seed=seed, max_tokens=400,
            extra_body={"budget": budget},
        )  # fmt: skip
        text = answer.choices[0].message.content
        assert text is not None
        assert text.lstrip().startswith("{")
        assert answer.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


def test_schema_that_is_none_is_refused_by_its_place(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **ASKED,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )
    assert caught.value.param is not None
    assert caught.value.param.startswith("response_format")


@pytest.mark.parametrize("budget", BUDGETS)
def test_response_is_parsed_too(client: openai.OpenAI, budget: float) -> None:
    answer = client.responses.parse(
        model=MODEL_ID, input="Describe a farm.", temperature=0, text_format=Farm, extra_body={"budget": budget}
    )
    assert isinstance(answer.output_parsed, Farm)
