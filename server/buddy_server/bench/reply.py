"""A server's answer, parsed from the bytes of an exchange after the timing."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from buddy_server.bench.http_load import Exchange
from buddy_server.bench.server_process import ServerBenchError


@dataclass(frozen=True, slots=True)
class Reply:
    """`arrival_times_s` are the times at which text arrived. Everything in one read has the same time, and tokens
    without text, such as half characters, have none: there may be fewer arrivals than tokens. `num_tokens` is the
    server's count. `error` is None for a complete answer."""

    sent_s: float
    ended_s: float
    arrival_times_s: tuple[float, ...] = ()
    text: str = ""
    num_tokens: int = 0
    cached_tokens: int | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.arrival_times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between arrivals: the inter-token latencies."""
        return [later - earlier for earlier, later in pairwise(self.arrival_times_s)]

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.sent_s


class _Broken(Exception):
    """An unusable answer; the message states why."""


def read_reply(exchange: Exchange, new_tokens: int, may_end_early: bool = False) -> Reply:
    """The answer, with an error unless it has `new_tokens` tokens, or the model ended it early and `may_end_early`
    allows that. An answer cut off by the bench is not an error."""
    ended_s = exchange.reads[-1][0] if exchange.reads else exchange.sent_s
    try:
        return _read(exchange, ended_s, new_tokens, may_end_early)
    except _Broken as broken:
        return Reply(exchange.sent_s, ended_s, error=str(broken))


def tokens_per_s(exchanges: Sequence[Exchange], new_tokens: int) -> float:
    """Of all together, each with an answer of `new_tokens`. Raises ServerBenchError if one failed."""
    replies = [read_reply(exchange, new_tokens) for exchange in exchanges]
    for reply in replies:
        if reply.error is not None:
            raise ServerBenchError(reply.error)
    span_s = max(reply.ended_s for reply in replies) - min(reply.sent_s for reply in replies)
    return len(replies) * new_tokens / span_s


def _read(exchange: Exchange, ended_s: float, new_tokens: int, may_end_early: bool) -> Reply:
    if exchange.failure is not None:
        raise _Broken(exchange.failure)
    times: list[float] = []
    text, reason, done = "", None, False
    usage: dict[str, Any] = {}
    for time_s, data in _events(exchange):
        done = data == b"[DONE]"
        if done:
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise _Broken(f"in mid-stream: {chunk['error']['message']}")
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            # An answer without any text, for instance a single half character, still gets a time: that of its end.
            tells = choice["text"] or (choice["finish_reason"] and not times)
            if tells and time_s not in times[-1:]:
                times.append(time_s)
            text += choice["text"]
            reason = choice["finish_reason"] or reason
    num_tokens = usage.get("completion_tokens", 0)
    if not exchange.cut:
        if not done:
            raise _Broken(f"the stream broke off; text had come {len(times)} times")
        if num_tokens != new_tokens and not (may_end_early and reason == "stop"):
            raise _Broken(f"{num_tokens} of {new_tokens} tokens came, finish_reason {reason!r}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Reply(exchange.sent_s, ended_s, tuple(times), text, num_tokens, cached)


def _events(exchange: Exchange) -> Iterator[tuple[float, bytes]]:
    """The data of every server-sent event with the time at which it was complete. Raises _Broken if the answer is not a
    stream."""
    raw = b"".join(data for _, data in exchange.reads)
    head, _, _ = raw.partition(b"\r\n\r\n")
    if not head and not exchange.cut:
        raise _Broken("the connection was closed without an answer")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise _Broken(_refusal(raw))
    ends = list(accumulate(len(data) for _, data in exchange.reads))
    body, pieces = _dechunked(raw, len(head) + 4)
    start = 0
    while (end := body.find(b"\n\n", start)) >= 0:
        event = body[start:end]
        start = end + 2
        if event.startswith(b"data: "):
            _, raw_end = pieces[bisect_left(pieces, (start, 0))]
            yield exchange.reads[bisect_left(ends, raw_end)][0], event.removeprefix(b"data: ")


def _dechunked(raw: bytes, at: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The body from `at` on, without HTTP's chunked framing, as far as it arrived; and for every piece, where it ends
    in the body and in `raw`."""
    body, pieces = bytearray(), []
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        start = line_end + 2
        end = start + int(raw[at:line_end].partition(b";")[0], 16)
        if end == start or end > len(raw):
            break
        body += raw[start:end]
        pieces.append((len(body), end))
        at = end + 2
    return bytes(body), pieces


def _refusal(raw: bytes) -> str:
    """The status and message of an answer that is not a stream."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status = head.partition(b"\r\n")[0].decode(errors="replace").partition(" ")[2]
    try:
        error: Any = json.loads(body)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        error = body[:200].decode(errors="replace")
    return f"{status}: {error}"
