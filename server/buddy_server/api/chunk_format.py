"""What the formats of chat and plain completions have in common: choices, in chunks when streamed."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from buddy_server.api.answer_format import data_block
from buddy_server.api.errors_handler import error_body
from buddy_server.api.fold import Delta
from buddy_server.api.generation import Generation
from buddy_server.errors import ApiError
from buddy_server.tokenizer import ChatTokenizer


class ChunkFormat(ABC):
    """An AnswerFormat (answer_format.py). A stream ends with [DONE], after a chunk with usage if that was requested."""

    body_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, generation: Generation, tokenizer: ChatTokenizer) -> None:
        self.generation = generation
        self.job = generation.admitted.job
        self.tokenizer = tokenizer

    @abstractmethod
    def choice(self, index: int, answer: Delta) -> dict[str, Any]:
        """The choice that says all of `answer`."""

    @abstractmethod
    def chunk_choices(self, index: int, delta: Delta) -> Iterable[dict[str, Any]]:
        """The choices that say `delta`, each in a chunk of its own."""

    def body(self, answers: Sequence[Delta]) -> dict[str, Any]:
        choices = [self.choice(index, answer) for index, answer in enumerate(answers)]
        return self._envelope(self.body_object, choices) | self._summary()

    def begin(self) -> bytes:
        return b""

    def add(self, index: int, delta: Delta) -> bytes:
        chunks = [self._envelope(self.chunk_object, [choice]) for choice in self.chunk_choices(index, delta)]
        if self.job.usage_chunk:
            for chunk in chunks:
                chunk["usage"] = None
        elif delta.finish_reason and self.generation.is_complete:
            chunks[-1]["buddy"] = self.generation.buddy()
        # One send for all chunks, because each send costs time.
        return b"".join(map(data_block, chunks))

    def end(self) -> bytes:
        usage = data_block(self._envelope(self.chunk_object, []) | self._summary()) if self.job.usage_chunk else b""
        return usage + b"data: [DONE]\n\n"

    def fail(self, error: ApiError) -> bytes:
        return data_block(error_body(error))

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        admitted = self.generation.admitted
        return {
            "id": admitted.id,
            "object": kind,
            "created": admitted.created,
            "model": self.job.model,
            "system_fingerprint": admitted.system_fingerprint,
            "choices": choices,
        }

    def _summary(self) -> dict[str, Any]:
        """Usage and the `buddy` object: what is known when every choice has ended."""
        usage = self.generation.usage()
        return {
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            },
            "buddy": self.generation.buddy(),
        }
