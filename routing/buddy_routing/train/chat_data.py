"""Conversations from a user's file, as examples in the tokens of the user's model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from buddy_routing.checkpoint import end_token_ids
from buddy_routing.train.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
EXPECTED = (
    'expected {"messages": [{"role": ..., "content": ...}, ...]} with an assistant\'s message last, '
    'or {"instruction": ..., "input": ..., "output": ...}'
)
ROLES = ("system", "developer", "user", "assistant", "tool")


class DataError(ValueError):
    """A training file that cannot be used; the message names the file, the line and what was expected there."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with role and content, and their location in the file."""

    messages: tuple[Message, ...]
    where: str


def read_conversations(path: Path) -> list[Conversation]:
    """Read chat JSONL ("messages") or Alpaca rows (instruction, input, output), one object per line or one JSON list.

    Raises DataError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    rows = _rows_of_list(path, text) if text.lstrip().startswith("[") else _rows_of_lines(path, text)
    conversations = [Conversation(_messages(row, where), where) for row, where in rows]
    if not conversations:
        raise DataError(f"{path} holds no conversations")
    return conversations


def _rows_of_list(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: {error.msg}") from error
    for number, row in enumerate(rows, 1):
        yield row, f"{path} item {number}"


def _rows_of_lines(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line), f"{path} line {number}"
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number}: not JSON ({error.msg}); {EXPECTED}") from error


def _messages(row: Any, where: str) -> tuple[Message, ...]:
    if isinstance(row, dict) and "messages" in row:
        return _checked_messages(row["messages"], where)
    if isinstance(row, dict) and isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        asked = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
        return {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}
    found = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise DataError(f"{where}: found {found}; {EXPECTED}")


def _checked_messages(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is not a list of messages; {EXPECTED}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {number} has no text as its content; {EXPECTED}")
        if message.get("role") not in ROLES:
            raise DataError(f"{where}: message {number} has role {message.get('role')!r}; allowed: {', '.join(ROLES)}")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's; {EXPECTED}")
    return tuple(messages)


class ChatEncoder:
    """A model's own tokenizer and chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens

    @classmethod
    def from_directory(cls, directory: Path) -> "ChatEncoder":
        """Raises DataError if the model was not made for conversations."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        if tokenizer.chat_template is None:
            raise DataError(f"the tokenizer in {directory} has no chat template, so conversations cannot be written")
        end_tokens = end_token_ids(directory) or frozenset({tokenizer.eos_token_id} - {None})
        if not end_tokens:
            raise DataError(f"neither the config nor the tokenizer in {directory} names a token that ends an answer")
        return cls(tokenizer, end_tokens)

    def examples(self, conversation: Conversation) -> Iterator[Example]:
        """One example per assistant answer, with everything before it as the prompt, rendered as by the server.

        Raises DataError if the template refuses the conversation.
        """
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant" and index > 0:
                prompt = self._render(conversation, index, with_answer=False)
                whole = self._render(conversation, index + 1, with_answer=True)
                # A template that rewrites earlier messages (dropping thoughts, say) leaves no common prefix.
                answer = whole.removeprefix(prompt) if whole.startswith(prompt) else message["content"]
                given = self._encode(prompt)
                yield Example((*given, *self._ended(self._encode(answer))), len(given))

    def _render(self, conversation: Conversation, count: int, with_answer: bool) -> str:
        messages = conversation.messages[:count]
        try:
            return str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not with_answer)
            )
        except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
            raise DataError(f"{conversation.where}: the model's chat template refuses it: {error}") from error

    def _encode(self, text: str) -> list[int]:
        # The template writes the special tokens itself.
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _ended(self, answer: Sequence[int]) -> list[int]:
        """The answer up to the first token that ends it; what a template adds after that is never generated."""
        for index, token in enumerate(answer):
            if token in self._end_tokens:
                return list(answer[: index + 1])
        return [*answer, min(self._end_tokens)]
