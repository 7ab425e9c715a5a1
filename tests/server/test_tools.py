"""Requests with tools over HTTP, as the official client sees them, with tokenizers of each family."""

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types.responses import Response

from buddy_server.api.response_format import MAX_SCHEMA_BYTES
from buddy_server.tokenizer import ChatTokenizer
from fakes.engine import INFO, FakeEngine
from fakes.families import llama3, mistral, qwen3
from fakes.site import Serve, Site

BIG = replace(INFO, max_context=4096, kv_capacity_tokens=4096)
SAY_HI: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]}
FLY = {"type": "function", "function": {"name": "fly", "description": "the cat sat", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
FLY_CALL = '{"name": "fly", "arguments": {"to": "you"}}'
ANSWERS = {
    "qwen3": (qwen3, ("So.", "\n<tool", "_call>\n", FLY_CALL, "\n</tool_call>")),
    "llama3": (llama3, ("So.", " ", "<|python_tag|>", FLY_CALL.replace("arguments", "parameters"), "")),
    "mistral": (mistral, ("So.", "", "[TOOL_CALLS]", " [", FLY_CALL, "]")),
}


@pytest.fixture(params=ANSWERS)
def site(request: pytest.FixtureRequest, serve: Serve) -> Site:
    """A server of a family whose model says something, then calls."""
    published, words = ANSWERS[request.param]
    engine = FakeEngine(BIG, words=words, num_words=len(words), last_text="")
    return serve(engine, of_family=ChatTokenizer(published()))


def prompt(site: Site) -> str:
    """The prompt of the last request, with special tokens."""
    tokenizers = {name: published() for name, (published, _) in ANSWERS.items()}
    [text] = {
        tokenizer.decode(site.engine.requests[-1].prompt_tokens)
        for name, tokenizer in tokenizers.items()
        if ANSWERS[name][1] == site.engine.words
    }
    return text


def test_a_call_is_an_answer_beside_text(site: Site) -> None:
    client = site.client()
    answer = client.chat.completions.create(model=INFO.model_id, messages=SAY_HI, tools=[FLY, NOW])
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So.")
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "fly", {"to": "you"})
    assert call.id.startswith("call_")
    assert "the cat sat" in prompt(site)


def test_a_stream_tells_the_same(site: Site) -> None:
    with site.client().chat.completions.stream(model=INFO.model_id, messages=SAY_HI, tools=[FLY]) as stream:
        [choice] = stream.get_final_completion().choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So.")
    assert choice.message.tool_calls is not None
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"to": "you"}']


def test_a_call_and_its_result_go_back_to_the_model(site: Site) -> None:
    client = site.client()
    messages = list(SAY_HI)
    answer = client.chat.completions.create(model=INFO.model_id, messages=messages, tools=[FLY])
    message = answer.choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "the bird sat"}
    messages += [message, result]
    client.chat.completions.create(model=INFO.model_id, messages=messages, tools=[FLY])
    told = prompt(site)
    assert '"name": "fly"' in told
    assert '{"to": "you"}' in told
    # The name comes from the call.
    assert "fly: the bird sat" in told


def test_responses_have_tools_too(site: Site) -> None:
    tool: Any = {"type": "function", "strict": None} | FLY["function"]  # type: ignore[operator]
    client = site.client()
    answer = client.responses.create(model=INFO.model_id, input="hi", tools=[tool], tool_choice="auto")
    calls = [item for item in answer.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("fly", {"to": "you"})]
    assert "the cat sat" in prompt(site)
    for choice in ({"type": "function", "name": "fly"}, "none"):
        body = {"model": INFO.model_id, "input": "hi", "tools": [tool], "tool_choice": choice}
        response = site.http.post("/v1/responses", json=body).json()
        Response.model_validate(response, strict=True)
        assert (response["tool_choice"], response["tools"][0]["name"]) == (choice, "fly")


def test_without_tools_or_with_none_of_them_wanted_calls_are_text(site: Site) -> None:
    for fields in ({}, {"tools": [FLY], "tool_choice": "none"}, {"tools": []}):
        choice = site.chat(**fields).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == "".join(site.engine.words)
        assert "the cat sat" not in prompt(site)
        assert site.engine.requests[-1].shown_tokens == ()


def test_markers_that_are_special_tokens_are_shown_to_requests_with_tools(serve: Serve) -> None:
    site = serve(FakeEngine(BIG), of_family=ChatTokenizer(mistral()))
    site.chat(tools=[FLY])
    assert site.engine.requests[-1].shown_tokens == (mistral().convert_tokens_to_ids("[TOOL_CALLS]"),)


def test_a_model_that_knows_no_tools_answers_with_text(serve: Serve) -> None:
    site = serve(FakeEngine(words=(FLY_CALL,), num_words=1, last_text=""))
    choice = site.chat(tools=[FLY]).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", FLY_CALL)
    assert "tool_calls" not in choice["message"]


def tool(**function: object) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | function}]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [FLY] * 129}, "tools", "at most 128"),
        ({"tools": tool(name="a b")}, "tools[0].function.name", "{1,64}"),
        ({"tools": tool(parameters={"type": "string"})}, "tools[0].function.parameters.type", 'give "object"'),
        ({"tools": tool(parameters={"a": float("nan")})}, "tools[0].function.parameters", "JSON does not have"),
        (
            {"tools": tool(parameters={"a": "x" * MAX_SCHEMA_BYTES})},
            "tools[0].function.parameters",
            "allowed are 65536",
        ),
        (
            {"tools": [one for name in "abcde" for one in tool(name=name, parameters={"a": "x" * 60_000})]},
            "tools[4].function.parameters",
            "and 262144 in all",
        ),
        (
            {"tools": tool(parameters=json.loads('{"a":' * 65 + "1" + "}" * 65))},
            "tools[0].function.parameters",
            "the 64",
        ),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [FLY], "tool_choice": "any"}, "tool_choice", '"auto"'),
        ({"tools": [FLY], "tool_choice": {"type": "function"}}, "tool_choice", '"auto"'),
        (
            {"tools": [FLY], "tool_choice": {"type": "function", "function": {"name": "swim"}}},
            "tool_choice",
            "'swim' is not allowed: give names of the tools: ['fly']",
        ),
        (
            {"tools": [FLY], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice",
            "allowed_tools",
        ),
        (
            {"tools": [FLY, *tool(parameters={"properties": {"a": {"type": "strin"}}})], "tool_choice": "required"},
            "tools[1].function.parameters",
            "is not supported: Invalid type: strin; allowed is the keywords type,",
        ),
        ({"tools": [FLY, FLY]}, "tools[1].function.name", "'fly' is not allowed: give a name that no other tool has"),
        ({"functions": [{"name": "f"}]}, "functions", "give tools instead"),
        ({"function_call": "auto"}, "function_call", "give tools and tool_choice instead"),
    ],
)
def test_what_tools_cannot_be_is_refused_by_place(serve: Serve, fields: dict[str, Any], param: str, told: str) -> None:
    site = serve(FakeEngine())
    body = {"model": INFO.model_id, "messages": SAY_HI} | fields
    response = site.http.post("/v1/chat/completions", content=json.dumps(body))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert told in error["message"]
    assert len(error["message"]) < 600
    assert site.engine.requests == []


def test_a_template_that_refuses_tools_says_why(serve: Serve) -> None:
    published = qwen3()
    published.chat_template += "{% if tools | length > 1 %}{{ raise_exception('one tool at once') }}{% endif %}"
    site = serve(FakeEngine(BIG), of_family=ChatTokenizer(published))
    assert site.chat(tools=[FLY]).status_code == 200
    error = site.chat(tools=[FLY, NOW]).json()["error"]
    assert (error["param"], error["message"][-16:]) == ("messages", "one tool at once")
