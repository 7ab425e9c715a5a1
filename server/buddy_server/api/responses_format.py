"""The format of /v1/responses, as in OpenAI's specification, plus `buddy`."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from buddy_server.api.fold import Delta
from buddy_server.api.generation import Generation
from buddy_server.api.logprobs import logprob_entries
from buddy_server.api.output_items import CallItem, ItemEvent, ItemStatus, MessageItem, OutputItem
from buddy_server.api.responses_request import ResponsesRequest
from buddy_server.errors import ApiError
from buddy_server.tokenizer import ChatTokenizer
from buddy_server.tools.pieces import Piece, TextPiece


class ResponsesFormat:
    """An AnswerFormat (answer_format.py). Each text and each call of the answer is an item of the output."""

    def __init__(self, generation: Generation, body: ResponsesRequest, tokenizer: ChatTokenizer) -> None:
        self._generation = generation
        self._body = body
        self._tokenizer = tokenizer
        self._output: list[dict[str, Any]] = []
        self._item: OutputItem | None = None
        self._entries: list[dict[str, Any]] = []
        """Log probabilities of tokens whose text has not come yet."""
        self._is_cut_off = False
        self._num_events = 0

    def body(self, answers: Sequence[Delta]) -> dict[str, Any]:
        for _ in self._events(answers[0]):
            # What the events tell is in the output as well.
            pass
        return self._finished()

    def begin(self) -> bytes:
        response = self._response("in_progress")
        return self._blocks({"type": f"response.{step}", "response": response} for step in ("created", "in_progress"))

    def add(self, _index: int, delta: Delta) -> bytes:
        return self._blocks(self._events(delta))

    def end(self) -> bytes:
        response = self._finished()
        return self._blocks([{"type": f"response.{response['status']}", "response": response}])

    def fail(self, error: ApiError) -> bytes:
        # The specification's short list of codes for a response has none of ours.
        reason = {"code": "server_error", "message": error.message}
        return self._blocks(
            [
                {"type": "error", "code": error.code, "message": error.message, "param": error.param},
                {"type": "response.failed", "response": self._response("failed") | {"error": reason}},
            ]
        )

    def _events(self, delta: Delta) -> Iterator[ItemEvent]:
        """What `delta` does to the items. Those that it completes go to the output."""
        self._entries += self._new_entries(delta)
        for piece in delta.pieces or self._empty_text(delta):
            if self._item is None or not self._item.takes(piece):
                yield from self._close("completed")
                self._item = self._new_item(piece)
                yield from self._item.open()
            entries = []
            if isinstance(piece, TextPiece):
                entries, self._entries = self._entries, []
            yield from self._item.add(piece, entries)
        if delta.finish_reason:
            self._is_cut_off = delta.finish_reason == "length"
            yield from self._close("incomplete" if self._is_cut_off else "completed")

    def _empty_text(self, delta: Delta) -> list[Piece]:
        """An answer that says nothing is an empty message, and the last tokens of a text may have none of their own."""
        is_wanted = self._item is None or (self._entries and isinstance(self._item, MessageItem))
        return [TextPiece("")] if is_wanted and delta.finish_reason else []

    def _new_item(self, piece: Piece) -> OutputItem:
        position, admitted = len(self._output), self._generation.admitted
        key = f"{admitted.id.removeprefix(admitted.job.id_prefix)}{position}"
        if isinstance(piece, TextPiece):
            return MessageItem(f"msg_{key}", position)
        return CallItem(f"fc_{key}", position, self._generation.call_id(0, piece.index), piece)

    def _close(self, status: ItemStatus) -> Iterator[ItemEvent]:
        """Complete the item under way, if there is one."""
        if self._item is not None:
            yield from self._item.close(status)
            self._output.append(self._item.body(status))
            self._item = None

    def _new_entries(self, delta: Delta) -> list[dict[str, Any]]:
        """Log probabilities as in chat completions, except that bytes are always a list here."""
        entries = logprob_entries(delta.tokens, self._tokenizer)
        for entry in entries:
            for one in (entry, *entry["top_logprobs"]):
                one["bytes"] = one["bytes"] or []
        return entries

    def _finished(self) -> dict[str, Any]:
        usage = self._generation.usage()
        response = self._response("incomplete" if self._is_cut_off else "completed")
        if self._is_cut_off:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        response["buddy"] = self._generation.buddy()
        return response

    def _response(self, status: str) -> dict[str, Any]:
        """The response object, with the items that are complete."""
        admitted, body = self._generation.admitted, self._body
        return {
            "id": admitted.id,
            "object": "response",
            "created_at": admitted.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._output.copy(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": admitted.job.sampling.temperature,
            "text": {"format": body.text_format.body()},
            "tool_choice": body.tool_choice.flat() if body.tool_choice else "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": admitted.job.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def _blocks(self, events: Iterable[ItemEvent]) -> bytes:
        blocks = []
        for event in events:
            data = msgspec.json.encode(event | {"sequence_number": self._num_events})
            blocks.append(b"event: " + event["type"].encode() + b"\ndata: " + data + b"\n\n")
            self._num_events += 1
        return b"".join(blocks)
