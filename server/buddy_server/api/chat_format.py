"""The format of chat completions, exactly as in OpenAI's specification, plus `buddy`."""

from collections.abc import Iterator
from typing import Any

from buddy_server.api.chunk_format import ChunkFormat
from buddy_server.api.fold import Delta
from buddy_server.api.generation import Generation
from buddy_server.api.logprobs import logprob_entries
from buddy_server.tokenizer import ChatTokenizer
from buddy_server.tools.pieces import CallPiece, TextPiece


class ChatFormat(ChunkFormat):
    body_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, generation: Generation, tokenizer: ChatTokenizer) -> None:
        super().__init__(generation, tokenizer)
        self._opened: set[int] = set()

    def choice(self, index: int, answer: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [self._call(index, call) for call in answer.calls]
        logprobs = None
        if self.job.sampling.top_logprobs is not None:
            logprobs = {"content": logprob_entries(answer.tokens, self.tokenizer), "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def chunk_choices(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        if index not in self._opened:
            self._opened.add(index)
            yield _chunk_choice(index, {"role": "assistant", "content": ""})
        entries = logprob_entries(delta.tokens, self.tokenizer)
        # Tokens may have log probabilities, but no text yet.
        pieces = delta.pieces or ([TextPiece("")] if entries else [])
        for piece in pieces:
            said = (
                {"content": piece.text}
                if isinstance(piece, TextPiece)
                else {"tool_calls": [{"index": piece.index} | self._call(index, piece)]}
            )
            yield _chunk_choice(index, said, entries)
            entries = []
        if delta.finish_reason is not None:
            yield _chunk_choice(index, {}, finish_reason=delta.finish_reason)

    def _call(self, index: int, call: CallPiece) -> dict[str, Any]:
        """A tool call of choice `index`, or a piece of one: only the first says more than arguments."""
        if call.name is None:
            return {"function": {"arguments": call.arguments}}
        return {
            "id": self.generation.call_id(index, call.index),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }


def _chunk_choice(
    index: int, delta: dict[str, Any], entries: list[dict[str, Any]] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    logprobs = {"content": entries, "refusal": None} if entries else None
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
