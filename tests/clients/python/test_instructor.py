"""instructor, unmodified."""

import asyncio
from typing import Literal

import instructor
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

MODES = [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA]


# Of a schema that allows more properties, the embedded model would make more and more.
class Farm(BaseModel, extra="forbid"):
    name: Literal["Green Hill", "Old Mill"]
    num_cows: int = Field(ge=0, le=99)


ASKED = {
    "model": "buddy-7m", "messages": [{"role": "user", "content": "Describe a farm."}], "temperature": 0,
    "response_model": Farm, "max_retries": 0, "max_tokens": 100,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_answer_is_of_its_class(base_url: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(OpenAI(base_url=base_url, api_key="sk-open"), mode=mode)
    farm, completion = client.chat.completions.create_with_completion(**ASKED)
    assert isinstance(farm, Farm)
    assert completion.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", MODES)
def test_partial_answers_end_in_the_whole(base_url: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(OpenAI(base_url=base_url, api_key="sk-open"), mode=mode)
    partial = list(client.chat.completions.create_partial(**ASKED))
    assert partial[-1].model_dump() == client.chat.completions.create(**ASKED).model_dump()


def test_asynchronous_client_gives_the_same(base_url: str) -> None:
    client = instructor.from_openai(AsyncOpenAI(base_url=base_url, api_key="sk-open"))
    assert isinstance(asyncio.run(client.chat.completions.create(**ASKED)), Farm)
