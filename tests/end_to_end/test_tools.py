"""Calls by the embedded model, which was never taught any: valid at every budget, as the official client sees them."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from buddy_process import serving
from buddy_routing.embedded import MODEL_ID

QUESTION: list[Any] = [{"role": "user", "content": "What is 34 + 25?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 3},
    },
    "required": ["city", "unit"],
}
SUM = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "in a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add", "parameters": SUM}},
    {"type": "function", "function": {"name": "now"}},
]
ADD: Any = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, budget: float = 1.0, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL_ID, "messages": QUESTION, "tools": TOOLS, "max_tokens": 900}
    return client.chat.completions.create(**(fields | options), extra_body={"budget": budget})


def check(name: str, arguments: str) -> None:
    """The call fits its schema."""
    given = json.loads(arguments)
    match name:
        case "get_weather":
            assert {"city", "unit"} <= given.keys() <= WEATHER["properties"].keys()  # type: ignore[attr-defined]
            assert (len(given["city"]) <= 12, given["unit"] in ("C", "F")) == (True, True)
            assert all(1 <= day <= 9 for day in given.get("days", ()))
        case "add":
            assert given.keys() == {"a", "b"}
            assert all(isinstance(number, int) for number in given.values())
        case _:
            assert (name, given) == ("now", {})


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("options", [{}, {"parallel_tool_calls": False}, {"n": 4, "temperature": 2}])
def test_an_answer_that_must_call_consists_of_valid_calls(
    client: openai.OpenAI, budget: float, options: dict[str, Any]
) -> None:
    for choice in ask(client, budget, tool_choice="required", **options).choices:
        calls = choice.message.tool_calls
        assert calls
        if choice.finish_reason == "length":
            calls = calls[:-1]
        else:
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        for call in calls:
            check(call.function.name, call.function.arguments)
        assert len({call.id for call in calls}) == len(calls)
        assert len(calls) == 1 or "parallel_tool_calls" not in options


@pytest.mark.parametrize("budget", [1.0, 0.25])
def test_a_named_function_is_called_once(client: openai.OpenAI, budget: float) -> None:
    [call] = ask(client, budget, tool_choice=ADD).choices[0].message.tool_calls
    assert call.function.name == "add"
    check("add", call.function.arguments)


def test_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [ADD, TOOLS[2]]}}
    for choice in ask(client, tool_choice=allowed, n=4).choices:
        assert {call.function.name for call in choice.message.tool_calls} <= {"add", "now"}


def test_a_stream_tells_the_same_call(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    [whole] = ask(client, **options).choices[0].message.tool_calls
    fields: dict[str, Any] = options | {"model": MODEL_ID, "messages": QUESTION, "max_tokens": 900}
    with client.chat.completions.stream(**fields, extra_body={"budget": 1.0}) as events:
        parts = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
        [call] = events.get_final_completion().choices[0].message.tool_calls or ()
    assert "".join(parts) == call.function.arguments == whole.function.arguments


def test_the_model_may_go_on_after_the_result_of_its_call(client: openai.OpenAI) -> None:
    first = ask(client, tool_choice=ADD).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "59"}
    second = ask(client, messages=[*QUESTION, first, result], max_tokens=40).choices[0]
    # The embedded model is told nothing of tools if it need not call any.
    assert second.finish_reason in ("stop", "length")
    assert second.message.content
    assert second.message.tool_calls is None


def test_responses_call_functions_too(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "add", "parameters": SUM, "strict": True}
    options: dict[str, Any] = {"model": MODEL_ID, "tools": [tool], "max_output_tokens": 900}
    first = client.responses.create(input="What is 3 + 4?", tool_choice={"type": "function", "name": "add"}, **options)
    [call] = first.output
    assert call.type == "function_call"
    check("add", call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    history: Any = [{"role": "user", "content": "What is 3 + 4?"}, call.model_dump(), result]
    assert client.responses.create(input=history, tool_choice="none", **options).output_text


def test_a_strict_schema_that_cannot_be_enforced_is_refused_by_place(client: openai.OpenAI) -> None:
    schema = SUM | {"not": {"required": ["c"]}}
    tools = [TOOLS[0], {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=tools, tool_choice="required")
    assert caught.value.param == "tools[1].function.parameters"
    assert '"not"' in str(caught.value)
    tools[1]["function"]["strict"] = False
    assert ask(client, tools=tools, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
