"""From chat messages to prompt tokens, with the model's own published template and tokenizer."""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from buddy_server.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""A chat message as the OpenAI API has it, its content already one text or None."""


class ChatTokenizer:
    """A Hugging Face tokenizer with its chat template. Safe to call from any thread."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        # The Rust tokenizer raises "Already borrowed" when two threads enter it and one changes its settings.
        self._lock = threading.Lock()
        self._knows_developer = "developer" in str(tokenizer.chat_template)

    @classmethod
    def from_directory(cls, path: Path) -> "ChatTokenizer":
        """The tokenizer in a Hugging Face model directory. Downloads nothing, runs no code of the model's.

        Raises ValueError or OSError, transformers' own, when the directory holds none.
        """
        # transformers imports torch when it is installed, so only here and not with this module.
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(path, local_files_only=True))

    @property
    def start_token_id(self) -> int:
        """What texts begin with, as the model saw them in training; the end token for models without one."""
        ids = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        return next(token for token in ids if token is not None)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The tokens of plain text, without special ones."""
        with self._lock:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """The tokens of a text to be continued, with the special ones that the tokenizer puts around texts itself."""
        with self._lock:
            return tuple(self._tokenizer.encode(text, verbose=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        with self._lock:
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt tokens of a conversation, up to where the assistant's answer begins.

        Raises InvalidRequest when the model's template refuses the conversation, or there is no template.
        """
        if self._tokenizer.chat_template is None:
            raise InvalidRequest("This model has no chat template: it was not made for conversations.", param="model")
        prepared = [self._prepare(message) for message in messages]
        with self._lock:
            try:
                text = self._tokenizer.apply_chat_template(prepared, tokenize=False, add_generation_prompt=True)
            # What a template written by someone else raises when it meets a message it does not expect.
            except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
                raise InvalidRequest(
                    f"The chat template of this model refuses these messages: {error}", param="messages"
                ) from error
            # The template writes the special tokens itself.
            tokens = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return tuple(tokens)

    def _prepare(self, message: Message) -> dict[str, Any]:
        # Templates concatenate contents; the null beside tool calls would stop them.
        prepared = {**message, "content": message.get("content") or ""}
        if prepared["role"] == "developer" and not self._knows_developer:
            prepared["role"] = "system"
        if prepared.get("tool_calls"):
            prepared["tool_calls"] = [_with_parsed_arguments(call) for call in prepared["tool_calls"]]
        return prepared


def import_transformers_without_torch() -> None:
    """Import transformers, now and without torch, which it would import for a tokenizer. For a process that computes
    nothing; torch stays where it is there already."""
    # What is None here cannot be imported, and counts as not installed.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    # transformers would tell everyone that there is no torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # noqa: F401


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Templates print arguments as JSON themselves; the API's string they would print quoted twice."""
    function = dict(call["function"])
    with contextlib.suppress(ValueError):
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}
