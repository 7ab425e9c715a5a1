"""The response formats of plain completions, as in OpenAI's specification, plus `buddy`."""

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from buddy_server.api.chat_responses import json_logprob
from buddy_server.api.generation import Generation
from buddy_server.api.schemas import CompletionRequest
from buddy_server.engine.messages import AnswerEvent, FinishEvent, PromptEvent, TokenEvent, TokenLogprob
from buddy_server.tokenizer import ChatTokenizer, TextOffsets


@dataclass(slots=True)
class _Logprobs:
    """The legacy format: four parallel lists, one entry per token, offsets counted from the start of the choice."""

    tokenizer: ChatTokenizer
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: TokenLogprob, likeliest: tuple[TokenLogprob, ...], offset: int) -> None:
        self.tokens.append(self._name(token))
        self.token_logprobs.append(json_logprob(token))
        self.top_logprobs.append({self._name(other): json_logprob(other) for other in likeliest})
        self.text_offset.append(offset)

    def add_first(self, token: str) -> None:
        """Add the prompt's first token, which has no log probability."""
        self.tokens.append(token)
        self.token_logprobs.append(None)
        self.top_logprobs.append(None)
        self.text_offset.append(0)

    def _name(self, token: TokenLogprob) -> str:
        """The token's text. Parts of characters have none; their bytes tell them apart, in OpenAI's notation."""
        if "\ufffd" not in token.token or (known := self.tokenizer.token_bytes(token.token_id)) is None:
            return token.token
        return token.token if known == token.token.encode() else "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)

    def body(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


class CompletionChoices:
    """Turns events of a plain completion into pieces of choices: text, log probabilities and the finish reason."""

    def __init__(self, generation: Generation, tokenizer: ChatTokenizer) -> None:
        admitted = generation.admitted
        assert isinstance(admitted.body, CompletionRequest)
        self._body = admitted.body
        self._prompts = [choice.prompt_tokens for choice in admitted.choices]
        self._tokenizer = tokenizer
        self._lengths = [0] * len(self._prompts)
        self._offsets: dict[int, TextOffsets] = {}

    def piece(self, index: int, events: list[AnswerEvent]) -> dict[str, Any]:
        """The part of choice `index` in `events`, which arrived together."""
        logprobs, last = _Logprobs(self._tokenizer), events[-1]
        text = "".join([self._text(index, event, logprobs) for event in events])
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs.body() if logprobs.tokens else None,
            "finish_reason": last.reason if isinstance(last, FinishEvent) else None,
        }

    def _text(self, index: int, event: AnswerEvent, logprobs: _Logprobs) -> str:
        """The text that `event` adds to the choice; its log probabilities go to `logprobs`."""
        text = ""
        if isinstance(event, PromptEvent) or self._echoes_now(index):
            text = self._echo(index, event, logprobs)
        if isinstance(event, TokenEvent) and event.logprob is not None and not self._body.scores_only:
            if index not in self._offsets:
                self._offsets[index] = self._tokenizer.offsets(self._lengths[index] + len(text))
            logprobs.add(event.logprob, event.top_logprobs, self._offsets[index].next(event.token_id))
        if not isinstance(event, PromptEvent) and not self._body.scores_only:
            text += event.text
        self._lengths[index] += len(text)
        return text

    def _echoes_now(self, index: int) -> bool:
        """Whether to echo the prompt now: its log probabilities were not requested, so no PromptEvent comes."""
        return bool(self._body.echo) and self._body.logprobs is None and self._lengths[index] == 0

    def _echo(self, index: int, event: AnswerEvent, logprobs: _Logprobs) -> str:
        prompt = self._prompts[index]
        if isinstance(event, PromptEvent):
            offsets = self._tokenizer.offsets()
            offsets.next(prompt[0])
            logprobs.add_first(self._tokenizer.decode(prompt[:1]))
            for token, likeliest in zip(event.logprobs, event.top_logprobs, strict=True):
                logprobs.add(token, likeliest, offsets.next(token.token_id))
        return self._tokenizer.decode(prompt)


async def collect_plain_completion(generation: Generation, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Run `generation` to its end and return the response body. Raises what `Generation.events` raises."""
    choices = CompletionChoices(generation, tokenizer)
    pieces: list[list[dict[str, Any]]] = [[] for _ in generation.admitted.choices]
    async with aclosing(generation.events()) as events:
        async for index, together in events:
            pieces[index].append(choices.piece(index, together))
    return {
        **_envelope(generation, [_joined(of_choice) for of_choice in pieces]),
        "usage": generation.usage(),
        "buddy": generation.buddy(),
    }


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    told = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {
        "index": pieces[0]["index"],
        "text": "".join(piece["text"] for piece in pieces),
        "logprobs": {name: [one for logprobs in told for one in logprobs[name]] for name in names} if told else None,
        "finish_reason": pieces[-1]["finish_reason"],
    }


class CompletionChunkWriter:
    """Turns the events of a generation into the chunks of its stream."""

    def __init__(self, generation: Generation, tokenizer: ChatTokenizer) -> None:
        self._generation = generation
        self._choices = CompletionChoices(generation, tokenizer)

    def chunks(self, index: int, events: list[AnswerEvent]) -> Iterator[dict[str, Any]]:
        """One chunk for `events` that arrived together; none for tokens without text and log probabilities."""
        piece = self._choices.piece(index, events)
        if piece["text"] or piece["logprobs"] or piece["finish_reason"]:
            chunk = _envelope(self._generation, [piece])
            if self._generation.admitted.body.wants_usage_chunk:
                chunk["usage"] = None
            elif piece["finish_reason"] and self._generation.is_complete:
                chunk["buddy"] = self._generation.buddy()
            yield chunk

    def usage_chunk(self) -> dict[str, Any]:
        usage = {"usage": self._generation.usage(), "buddy": self._generation.buddy()}
        return _envelope(self._generation, []) | usage


def _envelope(generation: Generation, choices: list[dict[str, Any]]) -> dict[str, Any]:
    admitted = generation.admitted
    return {
        "id": admitted.id,
        "object": "text_completion",
        "created": admitted.created,
        "model": admitted.body.model,
        "choices": choices,
    }
