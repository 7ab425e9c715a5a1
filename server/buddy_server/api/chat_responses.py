"""The response formats of chat completions, exactly as in OpenAI's specification, plus `buddy`."""

from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

from buddy_server.api.generation import Generation
from buddy_server.engine.messages import AnswerEvent, FinishEvent, PromptEvent, TokenEvent, TokenLogprob
from buddy_server.tokenizer import ChatTokenizer

LOWEST_LOGPROB = -9999.0
"""OpenAI's value for "never"; JSON has no infinity."""


async def collect_completion(generation: Generation, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Run `generation` to its end and return the response body. Raises what `Generation.events` raises."""
    choices = [_Choice(index, tokenizer) for index in range(len(generation.admitted.choices))]
    async with aclosing(generation.events()) as events:
        async for index, together in events:
            choices[index].add(together)
    admitted = generation.admitted
    return {
        "id": admitted.id,
        "object": "chat.completion",
        "created": admitted.created,
        "model": admitted.body.model,
        "choices": [choice.body(admitted.body.wanted_logprobs is not None) for choice in choices],
        "usage": generation.usage(),
        "buddy": generation.buddy(),
    }


class _Choice:
    def __init__(self, index: int, tokenizer: ChatTokenizer):
        self._index = index
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None

    def add(self, events: list[AnswerEvent]) -> None:
        self._texts.append(_text(events))
        self._logprobs += _logprob_entries(events, self._tokenizer)
        self._finish_reason = _finish_reason(events)

    def body(self, with_logprobs: bool) -> dict[str, Any]:
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": "".join(self._texts), "refusal": None},
            "logprobs": {"content": self._logprobs, "refusal": None} if with_logprobs else None,
            "finish_reason": self._finish_reason,
        }


class ChunkWriter:
    """Turns the events of a generation into the chunks of its stream."""

    def __init__(self, generation: Generation, tokenizer: ChatTokenizer):
        self._generation = generation
        self._tokenizer = tokenizer
        self._body = generation.admitted.body
        self._opened: set[int] = set()

    def chunks(self, index: int, events: list[AnswerEvent]) -> Iterator[dict[str, Any]]:
        """The chunks for `events` of choice `index`, which arrived together; none for tokens without text and
        logprobs."""
        if index not in self._opened:
            self._opened.add(index)
            yield self._chunk(index, {"role": "assistant", "content": ""})
        text, entries = _text(events), _logprob_entries(events, self._tokenizer)
        if text or entries:
            yield self._chunk(index, {"content": text}, entries)
        if (reason := _finish_reason(events)) is not None:
            chunk = self._chunk(index, {}, finish_reason=reason)
            if self._generation.is_complete and not self._body.wants_usage_chunk:
                chunk["buddy"] = self._generation.buddy()
            yield chunk

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose client requested usage."""
        return self._envelope([]) | {"usage": self._generation.usage(), "buddy": self._generation.buddy()}

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        entries: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs = {"content": entries, "refusal": None} if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._envelope([choice])

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        admitted = self._generation.admitted
        envelope: dict[str, Any] = {
            "id": admitted.id,
            "object": "chat.completion.chunk",
            "created": admitted.created,
            "model": admitted.body.model,
            "choices": choices,
        }
        if self._body.wants_usage_chunk:
            envelope["usage"] = None
        return envelope


def _text(events: list[AnswerEvent]) -> str:
    texts = []
    for event in events:
        assert not isinstance(event, PromptEvent), "a chat asks for no log probabilities of its prompt"
        texts.append(event.text)
    return "".join(texts)


def _finish_reason(events: list[AnswerEvent]) -> str | None:
    last = events[-1]
    return last.reason if isinstance(last, FinishEvent) else None


def _logprob_entries(events: list[AnswerEvent], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """One entry per token, or none at all: an engine returns log probabilities only on request."""
    return [
        _logprob(event.logprob, tokenizer)
        | {"top_logprobs": [_logprob(other, tokenizer) for other in event.top_logprobs]}
        for event in events
        if isinstance(event, TokenEvent) and event.logprob is not None
    ]


def _logprob(token: TokenLogprob, tokenizer: ChatTokenizer) -> dict[str, Any]:
    known: bytes | None = token.token.encode()
    if "\ufffd" in token.token:
        # Stands for part of a character, whose bytes cannot be recovered from the text.
        known = tokenizer.token_bytes(token.token_id)
    return {
        "token": token.token,
        "logprob": json_logprob(token),
        "bytes": None if known is None else list(known),
    }


def json_logprob(token: TokenLogprob) -> float:
    """The log probability of `token` as a number that JSON has; LOWEST_LOGPROB for what is not a number as well."""
    # In this order: the first stays unless the second is greater, which NaN never is.
    return max(LOWEST_LOGPROB, token.logprob)
