"""Tools through the official Python client. The embedded model calls none by itself: the choice forces it to."""

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from openai.lib.streaming.chat import FunctionToolCallArgumentsDeltaEvent, FunctionToolCallArgumentsDoneEvent
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageFunctionToolCall
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel, Field

from buddy_routing.embedded import MODEL_ID


class Weather(BaseModel):
    """The weather of the next days."""

    city: Literal["Oslo", "Paris", "Rome"]
    days: int = Field(ge=1, le=9)


class Clock(BaseModel):
    """The time of day."""

    zone: Literal["CET", "UTC"]


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Clock)]
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "Weather"}}
ASKED: dict[str, Any] = {
    "model": MODEL_ID,
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": TOOLS,
    "temperature": 0,
}


def the_call(message: ChatCompletionMessage) -> ChatCompletionMessageFunctionToolCall:
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.id
    return call


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.125])
def test_named_tool_is_called_with_arguments_of_its_type_at_every_budget(client: openai.OpenAI, budget: float) -> None:
    answer = client.chat.completions.parse(**ASKED, tool_choice=NAMED, extra_body={"budget": budget})
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    call = the_call(choice.message)
    assert call.function.name == "Weather"
    assert isinstance(call.function.parsed_arguments, Weather)


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.125])
def test_required_tool_is_called_with_arguments_of_its_type_at_every_budget(
    client: openai.OpenAI, budget: float
) -> None:
    answer = client.chat.completions.parse(
        **ASKED, tool_choice="required", parallel_tool_calls=False, extra_body={"budget": budget}
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert isinstance(the_call(answer.choices[0].message).function.parsed_arguments, Weather | Clock)


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_answer_without_a_call_is_text(client: openai.OpenAI, choice: Literal["none", "auto"]) -> None:
    answer = client.chat.completions.create(**ASKED, tool_choice=choice, max_tokens=20)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_loop_of_two_turns_ends_in_text(client: openai.OpenAI) -> None:
    messages: list[Any] = list(ASKED["messages"])
    first = client.chat.completions.create(**ASKED, tool_choice=NAMED).choices[0].message
    call = the_call(first)
    result = {"forecast": "sunny", **json.loads(call.function.arguments)}
    messages += [first, {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}]
    second = client.chat.completions.create(**ASKED | {"messages": messages}, max_tokens=20)
    assert second.choices[0].message.content
    assert second.usage is not None


def test_stream_helper_gives_the_same_call_in_pieces(client: openai.OpenAI) -> None:
    whole = the_call(client.chat.completions.parse(**ASKED, tool_choice=NAMED).choices[0].message)
    with client.chat.completions.stream(**ASKED, tool_choice=NAMED) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    call = the_call(final.choices[0].message)
    assert call.function == whole.function
    pieces = [event for event in events if isinstance(event, FunctionToolCallArgumentsDeltaEvent)]
    assert "".join(piece.arguments_delta for piece in pieces) == whole.function.arguments
    (done,) = (event for event in events if isinstance(event, FunctionToolCallArgumentsDoneEvent))
    assert (done.name, done.index, done.arguments) == ("Weather", 0, whole.function.arguments)


def test_every_delta_of_a_call_has_its_index_and_the_first_its_name(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**ASKED, tool_choice="required", stream=True)
    named: dict[int, str] = {}
    for chunk in stream:
        delta = chunk.choices[0].delta
        assert "tool_calls" not in delta.model_fields_set or delta.tool_calls
        for piece in delta.tool_calls or []:
            assert piece.function is not None
            if piece.index not in named:
                assert piece.id
                assert (piece.type, piece.index) == ("function", len(named))
                assert piece.function.name
                named[piece.index] = piece.function.name
            else:
                assert (piece.id, piece.function.name) == (None, None)
    assert named


def test_async_client_gets_calls_too(client: openai.OpenAI) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as asynchronous:
            answers = await asyncio.gather(
                *(asynchronous.chat.completions.create(**ASKED, tool_choice=NAMED) for _ in range(4))
            )
        return [the_call(answer.choices[0].message).function.arguments for answer in answers]

    (arguments,) = set(asyncio.run(ask()))
    Weather.model_validate_json(arguments)


RESPONSE_ASKED: dict[str, Any] = {
    "model": MODEL_ID,
    "input": "What is the weather in Paris?",
    "tools": [{"type": "function", "strict": True, **TOOLS[0]["function"]}],
    "temperature": 0,
}
RESPONSE_NAMED: dict[str, Any] = {"type": "function", "name": "Weather"}


def the_item(response: Response) -> ResponseFunctionToolCall:
    (call,) = (item for item in response.output if isinstance(item, ResponseFunctionToolCall))
    return call


def test_loop_of_responses_ends_in_text(client: openai.OpenAI) -> None:
    first = client.responses.create(**RESPONSE_ASKED, tool_choice=RESPONSE_NAMED)
    call = the_item(first)
    assert call.name == "Weather"
    Weather.model_validate_json(call.arguments)
    turns: list[Any] = [{"role": "user", "content": RESPONSE_ASKED["input"]}, *first.output]
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = client.responses.create(**RESPONSE_ASKED | {"input": turns}, max_output_tokens=20)
    assert second.output_text


def test_streamed_response_has_the_arguments_in_pieces(client: openai.OpenAI) -> None:
    whole = the_item(client.responses.create(**RESPONSE_ASKED, tool_choice=RESPONSE_NAMED))
    events = list(client.responses.create(**RESPONSE_ASKED, tool_choice=RESPONSE_NAMED, stream=True))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = (event for event in events if event.type == "response.function_call_arguments.done")
    assert "".join(pieces) == done.arguments == whole.arguments
    assert events[-1].type == "response.completed"
    assert the_item(events[-1].response).arguments == whole.arguments
