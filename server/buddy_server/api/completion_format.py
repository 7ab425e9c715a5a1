"""The format of plain completions, as in OpenAI's specification, plus `buddy`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from buddy_server.api.chunk_format import ChunkFormat
from buddy_server.api.fold import Delta
from buddy_server.api.generation import Generation
from buddy_server.api.logprobs import json_logprob
from buddy_server.engine.messages import PromptEvent, TokenLogprob
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

    def add_prompt(self, prompt: tuple[int, ...], scored: PromptEvent) -> None:
        """Add the prompt's tokens, the first of which has no log probability."""
        self.tokens.append(self.tokenizer.decode(prompt[:1]))
        self.token_logprobs.append(None)
        self.top_logprobs.append(None)
        self.text_offset.append(0)
        offsets = self.tokenizer.offsets()
        offsets.next(prompt[0])
        for token, likeliest in zip(scored.logprobs, scored.top_logprobs, strict=True):
            self.add(token, likeliest, offsets.next(token.token_id))

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


class CompletionFormat(ChunkFormat):
    body_object = chunk_object = "text_completion"

    def __init__(self, generation: Generation, tokenizer: ChatTokenizer) -> None:
        super().__init__(generation, tokenizer)
        self._begun: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}

    def choice(self, index: int, answer: Delta) -> dict[str, Any]:
        """The next part of choice `index`; its first part begins with the prompt if that is echoed."""
        echo, logprobs = "", _Logprobs(self.tokenizer)
        if index not in self._begun:
            self._begun.add(index)
            prompt = self.generation.admitted.choices[index].prompt_tokens
            if self.job.echo:
                echo = self.tokenizer.decode(prompt)
            if answer.prompt is not None:
                logprobs.add_prompt(prompt, answer.prompt)
            if self.job.sampling.top_logprobs is not None:
                self._offsets[index] = self.tokenizer.offsets(len(echo))
        for token in answer.tokens:
            assert token.logprob is not None, "only tokens with log probabilities are listed"
            logprobs.add(token.logprob, token.top_logprobs, self._offsets[index].next(token.token_id))
        return {
            "index": index,
            "text": echo + answer.text,
            "logprobs": logprobs.body() if logprobs.tokens else None,
            "finish_reason": answer.finish_reason,
        }

    def chunk_choices(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        choice = self.choice(index, delta)
        if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
            yield choice
