"""Tools and structured output through litellm."""

from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}


class Weather(BaseModel):
    city: Literal["Oslo", "Paris", "Rome"]


@pytest.fixture(scope="module")
def asked(base_url: str) -> dict[str, Any]:
    return {
        "model": "openai/buddy-7m", "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "api_base": base_url, "api_key": "sk-open", "temperature": 0, "max_tokens": 100, "num_retries": 0,
    }  # fmt: skip


def test_loop_of_two_turns_ends_in_text(asked: dict[str, Any]) -> None:
    message = litellm.completion(**asked, tools=[TOOL], tool_choice=NAMED).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    Weather.model_validate_json(call.function.arguments)
    messages = [*asked["messages"], message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert litellm.completion(**asked | {"messages": messages}, tools=[TOOL]).choices[0].message.content


def test_streamed_call_adds_up(asked: dict[str, Any]) -> None:
    chunks = list(litellm.completion(**asked, tools=[TOOL], tool_choice=NAMED, stream=True))
    built = litellm.stream_chunk_builder(chunks)
    (call,) = built.choices[0].message.tool_calls
    assert call.function.name == "weather"
    Weather.model_validate_json(call.function.arguments)
    assert built.choices[0].finish_reason == "tool_calls"


def test_response_format_is_kept(asked: dict[str, Any]) -> None:
    Weather.model_validate_json(litellm.completion(**asked, response_format=Weather).choices[0].message.content)
