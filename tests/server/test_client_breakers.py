"""Known ways to break clients, a test for each: what other servers send, or refuse, and this one must not."""

import json
import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
import pytest

from buddy_server.api.admission import Admitted
from buddy_server.config import ServerConfig
from fakes.engine import INFO, FakeEngine
from fakes.serving import wait_until
from fakes.site import Serve, Site
from fakes.tool_parser import MarkedCalls

ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": INFO.model_id, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": INFO.model_id, "prompt": "hi"},
}
"""The smallest body of each endpoint that streams chunks with choices."""
USAGE = {"stream_options": {"include_usage": True}}

each_endpoint = pytest.mark.parametrize("path", ASKED)


def post(site: Site, path: str, **fields: object) -> httpx.Response:
    return site.http.post(path, json=ASKED[path] | fields)


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of every event, without [DONE]."""
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@each_endpoint
def test_usage_chunk_has_choices_and_comes_once(serve: Serve, path: str) -> None:
    site = serve(FakeEngine(num_cached=(3,)))
    *chunks, last = chunks_of(post(site, path, stream=True, **USAGE))
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)


@each_endpoint
@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
def test_no_chunk_has_empty_choices_or_usage_unless_requested(site: Site, path: str, options: dict[str, Any]) -> None:
    chunks = chunks_of(post(site, path, stream=True, **options))
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert not any("usage" in chunk for chunk in chunks)


@each_endpoint
def test_choices_are_never_null(site: Site, path: str) -> None:
    for chunk in chunks_of(post(site, path, stream=True, n=2, **USAGE)):
        assert isinstance(chunk["choices"], list)
    assert len(post(site, path, n=2).json()["choices"]) == 2


def test_tool_calls_are_left_out_and_never_null(site: Site) -> None:
    for chunk in chunks_of(site.chat(stream=True)):
        assert "tool_calls" not in chunk["choices"][0]["delta"]
    assert "tool_calls" not in site.chat().json()["choices"][0]["message"]


@pytest.mark.parametrize("n", [1, 2])
def test_every_tool_calls_delta_has_its_index(serve: Serve, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(Admitted, "new_parser", lambda _: MarkedCalls())
    site = serve(FakeEngine(words=("<add>", '{"a": ', "1}", "</>", "<sub>", "{}", "</>"), num_words=7))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(site.chat(stream=True, n=n))]
    calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert all(calls)
    assert sorted(call["index"] for together in calls for call in together) == [0] * 3 * n + [1] * 2 * n


def test_role_is_assistant_in_the_first_delta_and_left_out_later(site: Site) -> None:
    first, *others = chunks_of(site.chat(stream=True))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert not any("role" in chunk["choices"][0]["delta"] for chunk in others)


@each_endpoint
def test_finish_reason_is_null_until_the_last_chunk(site: Site, path: str) -> None:
    chunks = chunks_of(post(site, path, stream=True))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


REFUSED: dict[str, Callable[[Serve], httpx.Response]] = {
    "400, no JSON": lambda serve: serve().http.post("/v1/chat/completions", content=b"{"),
    "400, bad value": lambda serve: serve().chat(temperature=7),
    "404, no such model": lambda serve: serve().chat(model="gpt-5"),
    "404, no such route": lambda serve: serve().http.get("/v1/nowhere"),
    "405": lambda serve: serve().http.get("/v1/chat/completions"),
    "413": lambda serve: serve(config=ServerConfig(max_body_bytes=9)).chat(),
    "500": lambda serve: serve(FakeEngine(raise_at=0)).chat(),
    "503": lambda serve: serve(FakeEngine(is_ready=False)).chat(),
}
each_refusal = pytest.mark.parametrize("refused", REFUSED)


@each_refusal
def test_error_is_an_object_and_no_flat_body(serve: Serve, refused: str) -> None:
    response = REFUSED[refused](serve)
    assert response.status_code == int(refused[:3])
    assert list(response.json()) == ["error"]
    assert list(response.json()["error"]) == ["message", "type", "param", "code"]


@each_refusal
def test_error_code_is_a_text_or_null_and_no_number(serve: Serve, refused: str) -> None:
    error = REFUSED[refused](serve).json()["error"]
    assert error["code"] is None or isinstance(error["code"], str)
    assert isinstance(error["type"], str)


@each_endpoint
def test_separators_are_line_feeds_alone(serve: Serve, path: str) -> None:
    site = serve(FakeEngine(delay_s=0.03, num_words=3), ServerConfig(ping_interval_s=0.02))
    response = post(site, path, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in response.content
    assert response.content.endswith(b"\n\ndata: [DONE]\n\n")


@each_endpoint
def test_pings_are_comments_between_events_and_follow_no_id_line(serve: Serve, path: str) -> None:
    site = serve(FakeEngine(delay_s=0.05, num_words=3), ServerConfig(ping_interval_s=0.02))
    blocks = post(site, path, stream=True).text.removesuffix("\n\n").split("\n\n")
    # The id, event and retry fields are the defaults of the library that sends the stream.
    assert {block.partition(":")[0] for block in blocks} == {"", "data"}
    assert not any("\n" in block for block in blocks)
    assert sum(block.startswith(":") for block in blocks) >= 3


@each_endpoint
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": True}, {"include_obfuscation": False}])
def test_stream_options_are_accepted(site: Site, path: str, stream: bool, options: object) -> None:
    assert post(site, path, stream=stream, stream_options=options).status_code == 200


def test_roles_need_not_alternate(site: Site) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": '{"to": "you"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "a bird", "tool_call_id": "c1"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": "be brief"},
        {"role": "system", "content": ""},
    ]
    response = site.chat(messages=messages)
    assert response.status_code == 200, response.text
    # <|system|> is token 1: the template knows no developer, so the fifth message becomes one as well.
    assert site.engine.requests[0].prompt_tokens.count(1) == 2


def test_models_are_listed(site: Site) -> None:
    listed = site.http.get("/v1/models").json()
    assert (listed["object"], [model["id"] for model in listed["data"]]) == ("list", [INFO.model_id])
    assert [model.id for model in site.client().models.list()] == [INFO.model_id]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
@each_endpoint
def test_disconnect_is_not_hidden_and_ends_the_work(serve: Serve, path: str, stream: bool, n: int) -> None:
    site = serve(FakeEngine(delay_s=0.01, num_words=150))
    body = json.dumps(ASKED[path] | {"stream": stream, "n": n, "max_tokens": 150})
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    port = int(site.url.rpartition(":")[2])
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        connection.sendall((head + body).encode())
        wait_until(lambda: len(site.engine.requests) == n)
    wait_until(lambda: len(site.engine.cancelled) == n)
    wait_until(lambda: site.sample("buddy_requests_total", outcome="cancelled") == 1)
    assert site.engine.finished == []


def test_events_of_a_response_are_separated_by_line_feeds_and_pings_follow_no_id_line(serve: Serve) -> None:
    site = serve(FakeEngine(delay_s=0.05, num_words=3), ServerConfig(ping_interval_s=0.02))
    content = site.http.post("/v1/responses", json={"model": INFO.model_id, "input": "hi", "stream": True}).text
    assert "\r" not in content
    blocks = [block.split("\n") for block in content.removesuffix("\n\n").split("\n\n")]
    # A ping is a comment alone; an event has its type and its data.
    assert {tuple(line.partition(":")[0] for line in block) for block in blocks} == {("",), ("event", "data")}
