"""Chat messages in the form that a model's template expects."""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
"""A chat message as in the OpenAI API, with its content already one text or None."""

_SHORT_ID_WANTED = re.compile(r"id\s*\|\s*length\s*(?:!=|<)\s*9")
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")


def template_messages(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """`messages` for the chat template with this source."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()}
    knows_developer, knows_calls = "developer" in template, "tool_calls" in template
    prepared = []
    for original in messages:
        # Templates concatenate contents; a null next to tool calls would make them fail.
        message = {**original, "content": original.get("content") or ""}
        if message["role"] == "developer" and not knows_developer:
            message["role"] = "system"
        if message["role"] == "tool" and message.get("tool_call_id") in names:
            # Some templates require the name, which OpenAI's clients do not send.
            message.setdefault("name", names[message["tool_call_id"]])
        if calls := message.pop("tool_calls", None):
            if knows_calls:
                message["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
            else:
                message["content"] = "\n".join(filter(None, [message["content"], *map(_as_text, calls)]))
        prepared.append(message)
    if _SHORT_ID_WANTED.search(template):
        _shorten_ids(prepared)
    return prepared


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Parses the arguments: templates print them as JSON, so the API's string would be encoded twice."""
    function = dict(call["function"])
    # Stays a string if it is not valid JSON, or contains halves of characters, which no tokenizer accepts.
    with contextlib.suppress(ValueError):
        arguments = json.loads(function["arguments"])
        json.dumps(arguments, ensure_ascii=False).encode()
        function["arguments"] = arguments
    return {**call, "function": function}


def _as_text(call: Mapping[str, Any]) -> str:
    """A call as a model writes it whose template knows none (tools.syntax.PLAIN)."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'


def _shorten_ids(messages: list[dict[str, Any]]) -> None:
    """Mistral's templates accept only ids of nine letters and digits."""
    for message in messages:
        if "tool_call_id" in message:
            message["tool_call_id"] = _short_id(message["tool_call_id"])
        for call in message.get("tool_calls", ()):
            call["id"] = _short_id(call["id"])


def _short_id(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]
