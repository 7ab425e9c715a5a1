"""Turns chat messages into prompt tokens, with the model's own published template and tokenizer."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from buddy_server.chat_template import RENDER_ERRORS, ChatTemplate
from buddy_server.control_tokens import ControlTokens, encode
from buddy_server.engine.detokenizer import Detokenizer
from buddy_server.errors import InvalidRequest
from buddy_server.template_messages import Message, template_messages
from buddy_server.tools.tool_format import ToolFormat, find_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASON_CHARS = 200
_FEW_TOKEN_CHARS = 2
"""Fewer characters per token than in ordinary text: texts with no more than this, at the limit, are not checked."""
_PIECE_CHARS = 2**14
_CUT_TOKENS = 64
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class PromptTooLong(Exception):
    """A prompt with more tokens than allowed: at least `num_tokens`, where counting stopped."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens)
        self.num_tokens = num_tokens


class ChatTokenizer:
    """A Hugging Face tokenizer with its chat template. Safe to call from any thread.

    With a `limit`, texts that are far too long for that many tokens raise PromptTooLong before they are tokenized as a
    whole.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        # transformers' own `encode` changes these before every use, under a lock that a long text would hold.
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = tokenizer.split_special_tokens
        self._spells_bytes = b"ByteLevel" in (self._backend.decoder.__getstate__() if self._backend.decoder else b"")
        self._control = ControlTokens(self._backend, tokenizer.unk_token_id)

    @classmethod
    def from_directory(cls, path: Path, chat_template: str | None = None) -> "ChatTokenizer":
        """The tokenizer in a Hugging Face model directory, with `chat_template` in place of its own if there is one.
        Downloads nothing and runs none of the model's code.

        Raises transformers' own ValueError or OSError if the directory contains none.
        """
        # Imported here, not with this module, because transformers imports torch if it is installed.
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        return cls(tokenizer)

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer itself, without the template."""
        return self._backend

    @property
    def start_token_id(self) -> int:
        """The token that texts began with in training; the end token for models without one."""
        ids = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        return next(token for token in ids if token is not None)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The tokens of plain text, without special tokens around it. Control tokens in the text count as such."""
        return tuple(encode(self._backend, text))

    def encode_prompt(self, text: str, limit: int | None = None, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The tokens of a text to continue, with the special tokens that the tokenizer itself puts around texts.
        Control tokens in the text count as such, because the client writes the whole prompt."""
        self._check_length(text, limit)
        return tuple(encode(self._backend, text, add_special_tokens=add_special_tokens))

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def names(self, tokens: Sequence[int]) -> list[str | None]:
        """The vocabulary's names of `tokens`; None where a model has more tokens than its tokenizer."""
        return [self._backend.id_to_token(token) for token in tokens]

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of a token that may be part of a character; None for tokenizers without such tokens."""
        name = self._backend.id_to_token(token)
        if name is None:
            return None
        if self._spells_bytes and all(char in _BYTE_OF for char in name):
            return bytes(_BYTE_OF[char] for char in name)
        return bytes.fromhex(name[3:5]) if _BYTE_TOKEN.fullmatch(name) else None

    def offsets(self, start: int = 0) -> "TextOffsets":
        """Locates tokens in a text that begins at offset `start` of another."""
        return TextOffsets(Detokenizer(self._backend, ()), start)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model is told of tools and calls them. Only for a model that `render` works for."""
        added = {token.content: number for number, token in self._backend.get_added_tokens_decoder().items()}
        return find_format(self._tool_template.source, self._tool_template.renders_tools, added)

    def render(
        self,
        messages: Sequence[Message],
        limit: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> tuple[int, ...]:
        """The prompt tokens of a conversation, with `add_generation_prompt` up to where the assistant's answer begins.
        `tools` are as in the OpenAI API; a model whose template knows none is told nothing of them.

        Only the template's control tokens count as such. In messages and tools they are text, except in roles, which
        must be known ones. Raises InvalidRequest if the model's template refuses the conversation, or there is no
        template.
        """
        if self._tokenizer.chat_template is None:
            raise InvalidRequest("This model has no chat template: it was not made for conversations.", param="model")
        with _refusals(str):
            template = self._tool_template if tools else self._template
            prepared = template_messages(messages, template.source)
            shown_tools = tools if template.renders_tools else ()
            unmarked = template.render(prepared, shown_tools, add_generation_prompt)
        self._check_length(unmarked, limit)
        marked = self._control.mark(prepared, shown_tools)
        with _refusals(marked.stand_ins.show):
            rendered = template.render(marked.messages, marked.tools, add_generation_prompt)
        return tuple(self._control.encode(unmarked, rendered, marked))

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer.get_chat_template(), self._tokenizer.special_tokens_map)

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        """The template for requests with tools; some models have one of their own for them."""
        source = self._tokenizer.get_chat_template(tools=[{}])
        same = source == self._template.source
        return self._template if same else ChatTemplate(source, self._tokenizer.special_tokens_map)

    def _check_length(self, text: str, limit: int | None) -> None:
        """Raise PromptTooLong if `text` certainly has more tokens than `limit`.

        Counts in pieces, because the tokens of a very long text fill hundreds of megabytes.
        """
        if limit is None or len(text) <= limit * _FEW_TOKEN_CHARS:
            return
        num_tokens = 0
        for start in range(0, len(text), _PIECE_CHARS):
            piece = encode(self._backend, text[start : start + _PIECE_CHARS])
            # The cut adds tokens that the whole text does not have.
            num_tokens += max(0, len(piece) - _CUT_TOKENS)
            if num_tokens > limit:
                raise PromptTooLong(num_tokens)


class TextOffsets:
    """Where the tokens of one text begin in it, in characters. Tokens that share a character begin where it begins."""

    def __init__(self, detokenizer: Detokenizer, start: int) -> None:
        self._detokenizer = detokenizer
        self._end = start

    def next(self, token: int) -> int:
        """The offset of the next token of the text."""
        start = self._end
        self._end += len(self._detokenizer.add(token))
        return start


def import_transformers_without_torch() -> None:
    """Import transformers now, and without torch, which it would otherwise import for a tokenizer. For a process that
    computes nothing; torch stays if it is already imported."""
    # A module that is None here cannot be imported, and counts as not installed.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    # Otherwise transformers warns that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # noqa: F401


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers use for bytes (GPT-2): printable bytes stand for themselves, others
    start at U+0100."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


@contextmanager
def _refusals(plain: Callable[[str], str]) -> Iterator[None]:
    """Turns the errors of a template into those of its request; `plain` turns stand-ins into what they stand for."""
    try:
        yield
    except RENDER_ERRORS as error:
        reason = plain(str(error))[:_REASON_CHARS]
        raise InvalidRequest(
            f"The chat template of this model refuses these messages: {reason}", param="messages"
        ) from error
