"""Hundreds of malformed requests to one server: each is soon refused in the documented form, and the server goes on."""

import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

import openai_fields
from buddy_server.api.app import create_app
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from buddy_server.tokenizer import ChatTokenizer
from fakes.engine import INFO, FakeEngine
from fakes.serving import listening
from fakes.site import Site
from fakes.tenancy import tenancy_of

LONGEST_S = 5.0
HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": INFO.model_id, "messages": HI},
    "/v1/completions": {"model": INFO.model_id, "prompt": "hi"},
    "/v1/responses": {"model": INFO.model_id, "input": "hi"},
    "/tokenize": {"model": INFO.model_id, "prompt": "hi"},
    "/detokenize": {"model": INFO.model_id, "tokens": [1]},
}
SCHEMAS = {
    "/v1/chat/completions": "ChatRequest",
    "/v1/completions": "CompletionRequest",
    "/v1/responses": "ResponsesRequest",
    "/tokenize": "TokenizeRequest",
    "/detokenize": "DetokenizeRequest",
}

DEEP = 100_000
VALID = json.dumps(BODIES["/v1/chat/completions"]).encode()
NO_OBJECTS = {
    "nothing": b"",
    "spaces": b"  \n",
    "an open brace": b"{",
    "cut off": VALID[:-1],
    "cut off in a text": VALID[: VALID.index(b"hi") + 1],
    "two objects": VALID + VALID,
    "a comma too many": VALID[:-1] + b",}",
    "single quotes": VALID.replace(b'"', b"'"),
    "a comment": b"/* */" + VALID,
    "names without quotes": VALID.replace(b'"model"', b"model"),
    "a list": b"[" + VALID + b"]",
    "null": b"null",
    "true": b"true",
    "a number": b"1",
    "a text": b'"hi"',
    "NaN": b"NaN",
    "-Infinity": b"-Infinity",
    "a huge number": b"1" * 5000,
    "a huge exponent": b"1e999999999",
    "a byte order mark": b"\xef\xbb\xbf" + VALID,
    "UTF-16": VALID.decode().encode("utf-16"),
    "UTF-32": VALID.decode().encode("utf-32"),
    "no UTF-8 in a text": VALID.replace(b"hi", b"\xff\xfe"),
    "overlong UTF-8": VALID.replace(b"hi", b"\xc0\xaf"),
    "a surrogate in UTF-8": VALID.replace(b"hi", b"\xed\xa0\x80"),
    "a lone high surrogate": VALID.replace(b"hi", b"\\ud800"),
    "a lone low surrogate": VALID.replace(b"hi", b"\\udc00"),
    "a lone surrogate in a name": VALID.replace(b"model", b"\\ud800"),
    "an unknown escape": VALID.replace(b"hi", b"\\x41"),
    "a line break in a text": VALID.replace(b"hi", b"h\ni"),
    "a NUL byte": VALID + b"\0",
    "compressed": gzip.compress(VALID),
    "a form": b"model=tiny&prompt=hi",
    "HTML": b"<!doctype html><html></html>",
    "lists in lists": b"[" * DEEP,
    "objects in objects": b'{"a":' * DEEP,
    "lists in lists of a field": VALID[:-1] + b', "x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
}
WRONG_VALUES = [
    '"x"', "-1", "1.5", "true", "[]", "{}", '[{"x": 1}]', '{"x": [1]}', "[null]", "1e400", "-1e400", "9" * 400, "null"
]  # fmt: skip
NO_NUMBERS = ["NaN", "Infinity", "-Infinity"]
MESSAGES: list[tuple[str, str]] = [
    ("messages", "1"),
    ("messages", "[]"),
    ("messages", "null"),
    ("messages[0]", "[null]"),
    ("messages[0]", '["hi"]'),
    ("messages[0].role", "[{}]"),
    ("messages[0].role", '[{"role": "USER", "content": "hi"}]'),
    ("messages[0].role", '[{"role": 1, "content": "hi"}]'),
    ("messages[0]", '[{"role": "user"}]'),
    ("messages[0].content", '[{"role": "user", "content": 1}]'),
    ("messages[0].content", '[{"role": "user", "content": {"text": "hi"}}]'),
    ("messages[0].content", '[{"role": "user", "content": [1]}]'),
    ("messages[0].content", '[{"role": "user", "content": [{"type": "text"}]}]'),
    ("messages[0].content", '[{"role": "user", "content": [{"type": "text", "text": NaN}]}]'),
    ("messages[0].content", '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]'),
    ("messages[0].content", '[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]'),
    ("messages[0].name", '[{"role": "user", "content": "hi", "name": 1}]'),
    ("messages[0].tool_calls", '[{"role": "assistant", "tool_calls": 1}]'),
    ("messages[0].tool_calls[0]", '[{"role": "assistant", "tool_calls": [1]}]'),
    ("messages[0].tool_calls[0].id", '[{"role": "assistant", "tool_calls": [{"type": "function"}]}]'),
    ("messages[1].role", '[{"role": "user", "content": "hi"}, {"content": "hi"}]'),
]


@pytest.fixture(scope="module")
def site(tokenizer_directory: Path) -> Iterator[Site]:
    """One server for all requests, good and bad."""
    engine, config = FakeEngine(delay_s=0), ServerConfig(max_body_pause_s=1.5)
    metrics = Metrics(engine.info, config.tenants)
    tokenizer = ChatTokenizer.from_directory(tokenizer_directory)
    with listening() as served, ExitStack() as stack:
        served.app = create_app(config, engine, tokenizer, metrics, tenancy_of(engine, config, metrics))
        http = stack.enter_context(httpx.Client(base_url=served.url, timeout=LONGEST_S))
        yield Site(served.url, engine, metrics, http, stack)


def check_refused(site: Site, path: str, body: bytes, param: str | None, **options: Any) -> None:
    """That `body` is a bad request for `param`, that the engine heard nothing of it, and works."""
    site.engine.requests.clear()
    started = time.monotonic()
    response = site.http.post(path, content=body, **options)
    assert time.monotonic() - started < LONGEST_S
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600
    if param is not None:
        assert (error["param"] or "").startswith(param)
        assert param in error["message"]
    assert site.engine.requests == []
    assert site.chat().status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", NO_OBJECTS)
def test_body_that_is_no_request_is_refused(site: Site, path: str, name: str) -> None:
    check_refused(site, path, NO_OBJECTS[name], None)


def wrong_fields() -> list[tuple[str, str, str]]:
    """Every field with each value that the OpenAPI document does not allow, so that the document is tested as well."""
    components = openai_fields.our_document()["components"]
    wrong = []
    for path, name in SCHEMAS.items():
        for field, schema in components["schemas"][name]["properties"].items():
            one = jsonschema_rs.Draft202012Validator({"allOf": [schema], "components": components})
            # Of the fields that are refused, two values are enough.
            values = WRONG_VALUES[3:5] if "x-refused" in schema else WRONG_VALUES
            wrong += [(path, field, value) for value in values if not one.is_valid(json.loads(value))]
            if re.search("number|integer", json.dumps(schema)):
                wrong += [(path, field, value) for value in NO_NUMBERS]
    return wrong


@pytest.mark.parametrize(("path", "field", "value"), wrong_fields())
def test_field_with_a_value_that_is_not_documented_is_refused_by_name(
    site: Site, path: str, field: str, value: str
) -> None:
    body = json.dumps({key: own for key, own in BODIES[path].items() if key != field})
    check_refused(site, path, f'{body[:-1]}, "{field}": {value}}}'.encode(), field)


@pytest.mark.parametrize(("param", "messages"), MESSAGES)
def test_malformed_message_is_refused_by_place(site: Site, param: str, messages: str) -> None:
    body = f'{{"model": "{INFO.model_id}", "messages": {messages}}}'.encode()
    check_refused(site, "/v1/chat/completions", body, param)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-type": "image/png"}, {}])
def test_content_type_does_not_matter(site: Site, path: str, headers: dict[str, str]) -> None:
    assert site.http.post(path, content=json.dumps(BODIES[path]), headers=headers).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_of_a_field_that_is_given_twice_the_last_counts(site: Site, path: str) -> None:
    body = json.dumps(BODIES[path])
    assert site.http.post(path, content='{"model": 1, ' + body[1:]).status_code == 200
    check_refused(site, path, (body[:-1] + ', "model": 1}').encode(), "model")


@pytest.mark.parametrize("path", BODIES)
def test_body_may_come_in_pieces(site: Site, path: str) -> None:
    pieces = (bytes([byte]) for byte in json.dumps(BODIES[path]).encode())
    assert site.http.post(path, content=pieces).status_code == 200


def sent(site: Site, path: str, headers: str, pieces: Iterator[bytes]) -> tuple[int, dict[str, Any]]:
    """Status and error of a request whose body is `pieces`, until the server answers."""
    url = httpx.URL(site.url)
    with socket.create_connection((url.host, url.port or 80), timeout=LONGEST_S) as connection:
        started = time.monotonic()
        connection.sendall(f"POST {path} HTTP/1.1\r\nhost: {url.host}\r\n{headers}\r\n\r\n".encode())
        try:
            for piece in pieces:
                connection.sendall(piece)
        except ConnectionError:
            # The server has answered and closed.
            pass
        answer = b""
        while not answer.endswith(b"}}"):
            received = connection.recv(65536)
            assert received, answer
            answer += received
        assert time.monotonic() - started < LONGEST_S
    head, _, body = answer.partition(b"\r\n\r\n")
    error: dict[str, Any] = json.loads(body)["error"]
    return int(head.split()[1]), error


@pytest.mark.parametrize("path", BODIES)
def test_body_of_a_hundred_megabytes_is_refused_before_it_is_read(site: Site, path: str) -> None:
    headers = "content-length: 100000000"
    status, error = sent(site, path, headers, iter([b" " * 1000]))
    assert (status, error["code"]) == (413, "request_too_large")
    assert site.chat().status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_body_of_a_hundred_megabytes_without_an_announcement_is_refused(site: Site, path: str) -> None:
    chunk = b"186a0\r\n" + b" " * 100_000 + b"\r\n"
    # Enough to pass the limit: the rest would meet a server that no longer listens.
    pieces = (chunk for _ in range(ServerConfig().max_body_bytes // 100_000 + 1))
    status, error = sent(site, path, "transfer-encoding: chunked", pieces)
    assert (status, error["code"]) == (413, "request_too_large")
    assert site.chat().status_code == 200


@pytest.mark.parametrize("headers", ["content-length: 1000", "transfer-encoding: chunked"])
def test_body_that_stops_arriving_is_refused(site: Site, headers: str) -> None:
    def answer(path: str) -> tuple[int, dict[str, Any]]:
        return sent(site, path, headers, iter([b"5\r\n{    \r\n"]))

    with ThreadPoolExecutor(len(BODIES)) as pool:
        for status, error in pool.map(answer, BODIES):
            assert (status, error["code"]) == (408, "request_timeout")
    assert site.chat().status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_body_that_ends_early_reaches_nobody(site: Site, path: str) -> None:
    url, body = httpx.URL(site.url), json.dumps(BODIES[path])
    site.engine.requests.clear()
    with socket.create_connection((url.host, url.port or 80)) as connection:
        # What arrives would be a good request.
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body) + 1}\r\n\r\n"
        connection.sendall((head + body).encode())
    assert site.http.get("/health").status_code == 200
    assert site.engine.requests == []


@pytest.mark.parametrize("headers", ["no colon", "content-length: many", "content-length: 1\r\ncontent-length: 2"])
def test_what_is_not_http_is_a_400_in_the_same_format(site: Site, headers: str) -> None:
    status, error = sent(site, "/v1/models", headers, iter([]))
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", None)
    assert site.chat().status_code == 200
