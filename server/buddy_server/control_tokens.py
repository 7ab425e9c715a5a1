"""Control tokens: a chat template may write them, a user may not.

Tokenizers find their added tokens (`<|assistant|>`, `[INST]`, `<tool_call>`) anywhere in a text. A user who writes one
could forge other roles' turns, so control tokens are recognized only in what the template wrote.

transformers' `sanitize_control_tokens` has the same aim. It misses the keys of arguments and the tokens that arise
where texts meet, and splits texts before tokenizing; here the tokenizer sees the whole prompt.
"""

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from buddy_server.errors import InvalidRequest
from buddy_server.stand_ins import ASCII, StandIns
from buddy_server.user_text import UserText

_WINDOW_CHARS = 2**16
"""How much one pattern call searches: nothing else in the process runs meanwhile."""


@dataclass(frozen=True, slots=True)
class Marked:
    """Messages and tools for a template, in which stand-ins replace the characters that users wrote.

    `may_begin` tells whether one of those characters is the first of a control token.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    stand_ins: StandIns
    may_begin: bool


class ControlTokens:
    """The added tokens of `tokenizer`, special or not. Tokens of one character or only white space count as text. Safe
    to use from any thread."""

    def __init__(self, tokenizer: Tokenizer, unknown: int | None) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {t.content: i for i, t in added.items() if len(t.content) > 1 and not t.content.isspace()}
        # The token `unknown` represents any text that the model has no other token for.
        self._tokens = frozenset(self._ids.values()) - {unknown}
        self._pattern = re.compile(_any_of(self._ids)) if self._ids else re.compile("(?!)")
        self._longest = max(map(len, self._ids), default=0)
        self._first_chars = sorted({name[0] for name in self._ids})
        self._tokenizer = tokenizer
        # The same tokenizer, except that control tokens have names that nobody can guess, so no text contains one.
        secret = secrets.token_hex(8)
        self._names = {name: f"\U0010fffd{secret}:{token}\U0010fffd" for name, token in self._ids.items()}
        self._break = f"\U0010fffd{secret}\U0010fffd"
        self._strict = Tokenizer(tokenizer.model)
        for part in ("normalizer", "pre_tokenizer"):
            if (value := getattr(tokenizer, part)) is not None:
                setattr(self._strict, part, value)
        self._strict.add_tokens([self._renamed(token) for _, token in sorted(added.items())])
        self._strict.add_tokens([AddedToken(self._break, normalized=False)])
        new_id = self._strict.token_to_id
        self._originals = {new_id(self._names.get(t.content, t.content)): i for i, t in added.items()}
        self._break_id = new_id(self._break)

    def mark(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Marked:
        """Mark all texts but the roles, the keys of `tools` included. Whatever a template does to a marked text (cut
        it, join it, remove a part, change letters), the text does not become a control token.

        Raises InvalidRequest if no characters are free to serve as stand-ins.
        """
        texts = {text for message in messages for key in message if key != "role" for text in _texts(message[key])}
        texts.update(_texts(tools))
        stand_ins = ASCII if all(map(str.isascii, texts)) else StandIns(texts)
        marked = {text: UserText(stand_ins.hide(text), text, stand_ins) for text in texts}
        return Marked(
            [{key: value if key == "role" else _with(value, marked) for key, value in m.items()} for m in messages],
            [_with(tool, marked) for tool in tools],
            stand_ins,
            any(char in text for text in texts for char in self._first_chars),
        )

    def encode(self, unmarked: str, rendered: str, marked: Marked) -> list[int]:
        """The tokens of a template's output: `unmarked` for messages, `rendered` for the same messages `marked`. These
        are the template's own control tokens, and text.

        If users' texts add no control tokens, these are the tokens that the tokenizer itself gives for `unmarked`.
        Raises InvalidRequest for a text that can only be a control token.
        """
        honest, found = list(self._spans(rendered)), list(self._spans(unmarked))
        written = [rendered[start:end] for start, end in honest]
        # The texts between them may differ in length, where a template does not recognize marked characters. That is
        # accepted only if no user began a control token.
        if written == [unmarked[start:end] for start, end in found] and (honest == found or not marked.may_begin):
            tokens = encode(self._tokenizer, unmarked)
            # A normalizer may turn other texts into control tokens.
            if Counter(filter(self._tokens.__contains__, tokens)) <= Counter(map(self._ids.__getitem__, written)):
                return tokens
        return self._encode_strictly(marked.stand_ins, rendered)

    def _encode_strictly(self, stand_ins: StandIns, rendered: str) -> list[int]:
        text = stand_ins.show(self._rewritten(rendered, self._names.__getitem__))
        while True:
            encoding = _encoding(self._strict, text)
            # A control token may also be in the model's ordinary vocabulary; then the text is split inside it.
            cuts = [at for token, at in zip(encoding.ids, encoding.offsets, strict=True) if self._is_leaked(token)]
            if not cuts:
                return [self._originals.get(token, token) for token in encoding.ids if token != self._break_id]
            if any(end - start < 2 for start, end in cuts):
                raise InvalidRequest("The messages contain a text that is a control token.", param="messages")
            for start, _ in reversed(cuts):
                text = text[: start + 1] + self._break + text[start + 1 :]

    def _is_leaked(self, token: int) -> bool:
        return token in self._tokens and token not in self._originals

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where control tokens occur in `text`: the earliest first, and of those with the same start the longest."""
        start = 0
        while start < len(text):
            end = start + _WINDOW_CHARS
            for match in self._pattern.finditer(text, start, end + self._longest):
                if match.start() >= end:
                    break
                yield match.span()
                start = match.end()
            start = max(start, end)

    def _rewritten(self, text: str, rewrite: Callable[[str], str]) -> str:
        """`text` with each control token replaced by what `rewrite` makes of it."""
        written, end = StringIO(), 0
        for start, stop in self._spans(text):
            written.write(text[end:start])
            written.write(rewrite(text[start:stop]))
            end = stop
        written.write(text[end:])
        return written.getvalue()

    def _renamed(self, token: AddedToken) -> AddedToken:
        if token.content not in self._names:
            return token
        name = self._names[token.content]
        return AddedToken(name, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """The tokens of `text`; other threads may run meanwhile."""
    # A batch, because the other methods hold the GIL.
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def _encoding(tokenizer: Tokenizer, text: str) -> Encoding:
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _with(value: Any, texts: Mapping[str, str]) -> Any:
    """A JSON value with its texts replaced."""
    if isinstance(value, str):
        return texts[value]
    if isinstance(value, Mapping):
        return {texts[key]: _with(inner, texts) for key, inner in value.items()}
    return [_with(inner, texts) for inner in value] if isinstance(value, list | tuple) else value


def _any_of(words: Iterable[str]) -> str:
    """A pattern that matches the longest of `words`, in one pass."""
    by_first: dict[str, list[str]] = {}
    words = set(words)
    for word in words - {""}:
        by_first.setdefault(word[0], []).append(word[1:])
    branches = "|".join(re.escape(first) + _any_of(rests) for first, rests in sorted(by_first.items()))
    if not branches:
        return ""
    if "" in words:
        return f"(?:{branches})?"
    return f"(?:{branches})" if len(by_first) > 1 else branches
