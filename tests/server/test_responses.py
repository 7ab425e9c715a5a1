"""/v1/responses, as the official client sees it."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from buddy_server.api.admission import Admitted
from fakes.engine import INFO, FakeEngine
from fakes.site import Serve, Site
from fakes.tool_parser import MarkedCalls

TEXT = "Hello there, wörld 🐦!"
CALLING = FakeEngine(words=("Well", "<add>", '{"a": ', "1}", "</>", "<sub>", "{}", "</>"), num_words=8)
ANY_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def post(site: Site, **fields: object) -> httpx.Response:
    return site.http.post("/v1/responses", json={"model": INFO.model_id, "input": "hi"} | fields)


def events_of(site: Site, **fields: object) -> list[dict[str, Any]]:
    """The events of a stream, each checked against the specification."""
    blocks = post(site, stream=True, **fields).text.removesuffix("\n\n").split("\n\n")
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        ANY_EVENT.validate_python(event, strict=True)
        events.append(event)
    return events


@pytest.fixture
def with_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is searched for calls."""
    monkeypatch.setattr(Admitted, "new_parser", lambda _: MarkedCalls())


def test_response_has_the_shape_of_the_specification(site: Site) -> None:
    body = post(site, instructions="be brief", metadata={"a": "b"}, temperature=0, budget=0.5, store=True).json()
    Response.model_validate(body, strict=True)
    assert (body["object"], body["status"], body["id"][:5]) == ("response", "completed", "resp_")
    [item] = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert [(part["type"], part["text"]) for part in item["content"]] == [("output_text", TEXT)]
    assert body["usage"] == {
        "input_tokens": 8,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 14,
    }
    assert (body["instructions"], body["metadata"], body["temperature"]) == ("be brief", {"a": "b"}, 0)
    assert (body["store"], body["buddy"]["layers_per_token"]) == (False, 4.0)


def test_official_client_reads_a_response_and_the_answer_to_its_output(site: Site) -> None:
    client = site.client()
    response = client.responses.create(model=INFO.model_id, input="hi")
    assert response.output_text == TEXT
    history: list[Any] = [{"role": "user", "content": "hi"}, *response.output, {"role": "user", "content": "you"}]
    assert client.responses.create(model=INFO.model_id, input=history).output_text == TEXT
    assert client.responses.parse(model=INFO.model_id, input="hi").output_text == TEXT


def test_official_stream_helper_reads_a_response(site: Site) -> None:
    with site.client().responses.stream(model=INFO.model_id, input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        response = stream.get_final_response()
    assert "".join(deltas) == response.output_text == TEXT
    assert len(deltas) > 3


def test_stream_tells_every_step_of_a_message(site: Site) -> None:
    events = events_of(site, buddy={"trace": True})
    steps = [event["type"].removeprefix("response.") for event in events]
    assert Counter(steps).pop("output_text.delta") == 6
    assert list(dict.fromkeys(steps)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    response = events[-1]["response"]
    whole = post(site, buddy={"trace": True}).json()
    assert response["output"][0]["content"] == whole["output"][0]["content"]
    assert (response["usage"], response["buddy"]) == (whole["usage"], whole["buddy"])
    assert events[-2]["item"] == response["output"][0]
    assert {event["item_id"] for event in events if "item_id" in event} == {response["output"][0]["id"]}


def test_answer_that_was_cut_off_is_incomplete(site: Site) -> None:
    body = post(site, max_output_tokens=2).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (body["output"][0]["status"], body["max_output_tokens"]) == ("incomplete", 2)
    last = events_of(site, max_output_tokens=2)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


def test_answer_without_text_is_an_empty_message(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    site = serve(FakeEngine(words=("",), last_text=""))
    whole, streamed = post(site).json(), events_of(site)[-1]["response"]
    assert whole["output"][0]["content"][0]["text"] == streamed["output"][0]["content"][0]["text"] == ""


@pytest.mark.usefixtures("with_calls")
@pytest.mark.parametrize("group_size", [1, 3, 100])
def test_calls_are_items_beside_the_text(serve: Serve, group_size: int) -> None:
    site = serve(replace(CALLING, group_size=group_size))
    whole = post(site).json()
    Response.model_validate(whole, strict=True)
    events = events_of(site)
    for output in (whole["output"], events[-1]["response"]["output"]):
        assert [item["type"] for item in output] == ["message", "function_call", "function_call", "message"]
        assert [(call["name"], call["arguments"]) for call in output[1:3]] == [("add", '{"a": 1}'), ("sub", "{}")]
        assert len({call["call_id"] for call in output[1:3]}) == 2
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [event["arguments"] for event in done] == ['{"a": 1}', "{}"]
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in events[-1]["response"]["output"]]


@pytest.mark.usefixtures("with_calls")
def test_log_probabilities_of_a_call_open_no_message(serve: Serve) -> None:
    site = serve(FakeEngine(words=("", "<add>", "{}", "</>"), num_words=4, last_text=""))
    options = {"include": ["message.output_text.logprobs"]}
    for response in (post(site, **options).json(), events_of(site, **options)[-1]["response"]):
        assert [item["type"] for item in response["output"]] == ["function_call"]


@pytest.mark.usefixtures("with_calls")
def test_official_stream_helper_reads_calls(serve: Serve) -> None:
    with serve(replace(CALLING)).client().responses.stream(model=INFO.model_id, input="hi") as stream:
        output = stream.get_final_response().output
    assert [item.arguments for item in output if item.type == "function_call"] == ['{"a": 1}', "{}"]


def test_log_probabilities_come_if_they_are_included(site: Site) -> None:
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = post(site, **options).json()
    Response.model_validate(body, strict=True)
    entries = body["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == list(site.engine.words)
    assert {len(entry["top_logprobs"]) for entry in entries} == {2}
    events = events_of(site, **options)
    told = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert told == entries == events[-1]["response"]["output"][0]["content"][0]["logprobs"]


def test_items_become_the_messages_that_chat_takes(site: Site) -> None:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "fly", "arguments": f'{{"to": {i}}}'}} for i in (1, 2)
    ]
    site.chat(
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi\nyou"},
            {"role": "assistant", "content": "a bird", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": "you are"},
            {"role": "tool", "tool_call_id": "c2", "content": "hi"},
            {"role": "assistant", "tool_calls": calls[:1]},
        ]
    )
    call_items = [
        {"type": "function_call", "call_id": f"c{i}", "name": "fly", "arguments": f'{{"to": {i}}}'} for i in (1, 2)
    ]
    response = post(
        site,
        instructions="be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}, {"type": "input_text", "text": "you"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a bird"}]},
            *call_items,
            {"type": "function_call_output", "call_id": "c1", "output": "you are"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "hi"}]},
            call_items[0],
        ],
    )
    assert response.status_code == 200, response.text
    first, second = (request.prompt_tokens for request in site.engine.requests)
    assert first == second


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "string"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {"schema": {}}}}}, "text.format.schema"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "hi"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": []}]}]}, "input[0].content"),
        ({"input": "forbidden"}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"budget": 7}, "budget"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_done_is_a_400_that_names_it(
    site: Site, fields: dict[str, object], param: str, stream: bool
) -> None:
    response = post(site, stream=stream, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert site.engine.requests == []


def test_engine_failure_ends_the_stream_with_what_there_is(serve: Serve) -> None:
    site = serve(FakeEngine(fail_at=2))
    assert post(site).status_code == 500
    error, failed = events_of(site)[-2:]
    assert (error["type"], error["code"]) == ("error", "internal_error")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["message"] == error["message"]
    assert "secret" not in str(failed)
    with pytest.raises(openai.InternalServerError):
        site.client().responses.create(model=INFO.model_id, input="hi")
