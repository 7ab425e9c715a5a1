"""Tool calls in chat completions, as the official client sees them. Their format in the text is made up."""

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from buddy_server.api.admission import Admitted
from fakes.engine import INFO, FakeEngine
from fakes.site import Serve, Site
from fakes.tool_parser import MarkedCalls

WORDS = ("Well", "<add>", '{"a": ', "1}", "</>", "<sub>", "{}", "</>")
SAY_HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def site(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A server that looks for calls in every chat's answer, in groups of tokens."""
    monkeypatch.setattr(Admitted, "new_parser", lambda _: MarkedCalls())
    return serve(FakeEngine(words=WORDS, num_words=8, group_size=3))


def test_completion_has_its_calls_beside_its_text(site: Site) -> None:
    body = site.chat(n=2).json()
    ChatCompletion.model_validate(body, strict=True)
    ids = set()
    for choice in body["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Well!"
        calls = choice["message"]["tool_calls"]
        ids.update(call["id"] for call in calls)
        assert [call["function"] for call in calls] == [
            {"name": "add", "arguments": '{"a": 1}'},
            {"name": "sub", "arguments": "{}"},
        ]
    assert len(ids) == 4


def test_content_of_calls_without_text_is_null(site: Site) -> None:
    site.engine.words = ("<add>", "{}")
    message = site.chat(max_tokens=2).json()["choices"][0]["message"]
    assert message["content"] is None


def test_stream_tells_id_and_name_once_and_arguments_in_pieces(site: Site) -> None:
    chunks = [json.loads(line[6:]) for line in site.chat(stream=True).text.split("\n") if line.startswith("data: {")]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1] == {"content": "Well"}
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 0, 1]
    assert [(call["type"], call["function"]["name"]) for call in calls if "id" in call] == [
        ("function", "add"),
        ("function", "sub"),
    ]
    assert [call["function"]["arguments"] for call in calls] == ["", '{"a": 1}', "{}"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_official_stream_helper_puts_the_calls_together(site: Site) -> None:
    with site.client().chat.completions.stream(model=INFO.model_id, messages=SAY_HI) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Well!"
    assert message.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("add", '{"a": 1}'),
        ("sub", "{}"),
    ]
