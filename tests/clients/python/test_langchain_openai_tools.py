"""Tools and structured output through langchain-openai."""

from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

QUESTION = "What is the weather in Paris?"


@tool
def weather(city: Literal["Oslo", "Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city for the next days."""
    return f"sunny in {city} for {days} days"


# Of a schema that allows more properties, the embedded model would make more and more.
class Farm(BaseModel, extra="forbid"):
    """A farm."""

    name: Literal["Green Hill", "Old Mill"]
    num_cows: int = Field(ge=0, le=99)


@pytest.fixture(scope="module")
def chat(base_url: str) -> ChatOpenAI:
    return ChatOpenAI(
        model="buddy-7m", base_url=base_url, api_key="sk-open", temperature=0, max_tokens=100, max_retries=0
    )


@pytest.mark.parametrize("choice", ["weather", "required"])
def test_bound_tool_is_called_and_its_result_answered(chat: ChatOpenAI, choice: str) -> None:
    calling = chat.bind_tools([weather], tool_choice=choice, strict=True, parallel_tool_calls=False)
    asked = calling.invoke(QUESTION)
    assert isinstance(asked, AIMessage)
    (call,) = asked.tool_calls
    assert not asked.invalid_tool_calls
    assert asked.response_metadata["finish_reason"] == "tool_calls"
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content.startswith("sunny")
    assert chat.bind_tools([weather]).invoke([HumanMessage(QUESTION), asked, result]).text


def test_streamed_call_adds_up(chat: ChatOpenAI) -> None:
    calling = chat.bind_tools([weather], tool_choice="weather", strict=True)
    chunks = list(calling.stream(QUESTION))
    added = sum(chunks[1:], start=chunks[0])
    assert [call["args"] for call in added.tool_calls] == [call["args"] for call in calling.invoke(QUESTION).tool_calls]


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output_is_of_its_class(chat: ChatOpenAI, method: str) -> None:
    assert isinstance(chat.with_structured_output(Farm, method=method).invoke("Describe a farm."), Farm)
