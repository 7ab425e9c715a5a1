"""What the client of `buddy bench server` reads from the bytes that came, and when they did."""

import json
from typing import Any

import pytest

from buddy_server.bench.http_load import Exchange
from buddy_server.bench.reply import Reply, read_reply

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(body: dict[str, Any]) -> bytes:
    return chunk(b"data: " + json.dumps(body).encode() + b"\n\n")


def token(text: str, reason: str | None = None) -> bytes:
    return event({"choices": [{"text": text, "finish_reason": reason}], "usage": None})


def usage(num_tokens: int, **more: Any) -> bytes:
    return event({"choices": [], "usage": {"completion_tokens": num_tokens, **more}})


DONE = chunk(b"data: [DONE]\n\n")


def read(reads: list[bytes], new_tokens: int = 3, may_end_early: bool = False, cut: bool = False) -> Reply:
    """The reads come a second after one another, the request was sent at 0."""
    exchange = Exchange(b"")
    exchange.reads = [(float(at), data) for at, data in enumerate(reads, 1)]
    exchange.cut = cut
    return read_reply(exchange, new_tokens, may_end_early)


def test_tokens_have_the_times_at_which_they_came() -> None:
    reply = read([HEAD, token("a"), token("b"), token("c"), token("", "length"), usage(3) + DONE + LAST])
    assert reply.error is None
    assert (reply.text, reply.num_tokens, reply.ttft_s, reply.gaps_s) == ("abc", 3, 2.0, [1.0, 1.0])
    assert reply.duration_s == 6.0


def test_an_event_in_pieces_counts_when_it_is_whole_and_two_in_one_read_come_once() -> None:
    first = token("a")
    reads = [HEAD + first[:20], first[20:], token("b") + token("c"), token("", "length") + usage(3) + DONE + LAST]
    assert read(reads).arrival_times_s == (2.0, 3.0)


def test_an_event_over_two_pieces_of_http_is_one_event() -> None:
    whole = b'data: {"choices":[{"text":"abc","finish_reason":"length"}]}\n\n'
    reply = read([HEAD, chunk(whole[:30]), chunk(whole[30:]) + usage(3), DONE + LAST])
    assert (reply.error, reply.text, reply.arrival_times_s) == (None, "abc", (3.0,))


def test_an_answer_without_text_has_the_time_of_its_end() -> None:
    assert read([HEAD, token("", "length"), usage(3) + DONE + LAST]).arrival_times_s == (2.0,)


def test_cached_tokens_are_read_where_they_are_told() -> None:
    end = [token("abc", "length"), usage(3, prompt_tokens_details={"cached_tokens": 48}) + DONE + LAST]
    assert read([HEAD, *end]).cached_tokens == 48
    assert read([HEAD, token("abc", "length"), usage(3) + DONE + LAST]).cached_tokens is None


@pytest.mark.parametrize(
    ("reads", "told"),
    [
        ([], "closed without an answer"),
        ([HEAD, token("a")], "broke off; text had come 1 times"),
        ([HEAD, token("a", "stop"), usage(1) + DONE + LAST], "1 of 3 tokens came, finish_reason 'stop'"),
        ([HEAD, token("a"), event({"error": {"message": "engine failed"}}) + LAST], "in mid-stream: engine failed"),
        ([b'HTTP/1.1 503 Busy\r\n\r\n{"error": {"message": "try later"}}'], "503 Busy: try later"),
        ([b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>"], "502 Bad Gateway: <html>"),
    ],
)
def test_an_answer_that_is_not_as_asked_for_is_an_error(reads: list[bytes], told: str) -> None:
    assert told in (read(reads).error or "")


def test_only_a_model_of_ones_own_choice_may_end_early() -> None:
    assert read([HEAD, token("a", "stop"), usage(1) + DONE + LAST], may_end_early=True).error is None
    assert read([HEAD, token("a", "length"), usage(1) + DONE + LAST], may_end_early=True).error is not None


def test_a_stream_that_the_bench_cut_off_is_no_error() -> None:
    reply = read([HEAD, token("a"), token("b")[:10]], cut=True)
    assert (reply.error, reply.arrival_times_s) == (None, (2.0,))
