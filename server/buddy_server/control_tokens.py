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
from functools import cache
from io import StringIO
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from buddy_server.errors import InvalidRequest
from buddy_server.user_text import UserText

_WINDOW_CHARS = 2**16
"""How much one pattern call searches: nothing else in the process runs meanwhile."""
_RUN_CHARS = 2**12
"""How many stand-ins are replaced at a time, for the same reason."""
_PRIVATE = range(0xF0000, 0x10FFFE)
"""Unicode's private-use characters (planes 15 and 16)."""


@dataclass(frozen=True, slots=True)
class Marked:
    """Messages for a template, in which stand-in characters mark what comes from users."""

    messages: list[dict[str, Any]]
    stand_ins: re.Pattern[str] | None
    originals: Mapping[int, int]

    def plain(self, text: str) -> str:
        """`text` with the users' characters in place of their stand-ins."""
        if self.stand_ins is None:
            return text
        return self.stand_ins.sub(lambda run: run[0].translate(self.originals), text)


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
        self._all = "\0".join(self._ids)
        self._beginnings = frozenset(name[:end] for name in self._ids for end in range(1, len(name)))
        self._endings = frozenset(name[start:] for name in self._ids for start in range(1, len(name)))
        self._alphabet = sorted({ord(char) for name in self._ids for char in name})
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

    def mark(self, messages: Sequence[Mapping[str, Any]]) -> Marked:
        """Mark `messages`, all texts but the roles: control tokens in a text, and parts of them at its ends that
        adjacent text could complete.

        Raises InvalidRequest if no characters are free to serve as stand-ins.
        """
        texts = {text for message in messages for key in message if key != "role" for text in _texts(message[key])}
        found = [text for text in texts if next(self._spans(text), None) or any(self._edges(text))]
        if not found:
            return Marked([dict(message) for message in messages], None, {})
        first = self._free_characters(texts)
        stand_ins = {char: first + index for index, char in enumerate(self._alphabet)}
        marked = {text: UserText(self._marked(text, stand_ins), text) for text in found}
        return Marked(
            [{key: value if key == "role" else _with(value, marked) for key, value in m.items()} for m in messages],
            re.compile(f"[{chr(first)}-{chr(first + len(self._alphabet) - 1)}]{{1,{_RUN_CHARS}}}"),
            {stand_in: char for char, stand_in in stand_ins.items()},
        )

    def encode(self, rendered: str, marked: Marked) -> list[int]:
        """The tokens of a template's output for `marked`: the template's own control tokens, and text.

        If no user's text contains control tokens, these are the tokens that the tokenizer itself gives. Raises
        InvalidRequest for a text that can only be a control token.
        """
        plain = marked.plain(rendered)
        honest = list(self._spans(rendered))
        if marked.stand_ins is None or honest == list(self._spans(plain)):
            tokens = encode(self._tokenizer, plain)
            written = Counter(self._ids[rendered[start:end]] for start, end in honest)
            # A normalizer may turn other texts into control tokens.
            if Counter(filter(self._tokens.__contains__, tokens)) <= written:
                return tokens
        return self._encode_strictly(marked, rendered)

    def _encode_strictly(self, marked: Marked, rendered: str) -> list[int]:
        text = marked.plain(self._rewritten(rendered, self._names.__getitem__))
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

    def _marked(self, text: str, stand_ins: Mapping[int, int]) -> str:
        """`text` with stand-ins in its control tokens and at its edges."""
        printed = self._rewritten(text, cache(lambda name: name.translate(stand_ins)))
        for start, end in self._edges(text):
            # A character that is already a stand-in stays one.
            printed = "".join((printed[:start], printed[start:end].translate(stand_ins), printed[end:]))
        return printed

    def _edges(self, text: str) -> Iterator[tuple[int, int]]:
        """The parts of `text` that could become a control token with adjacent text. Templates strip texts."""
        bare = text.strip()
        if bare and len(bare) < self._longest and bare in self._all:
            yield 0, len(text)
            return
        for end in {len(text), len(text.rstrip())}:
            lengths = range(min(end, self._longest - 1), 0, -1)
            yield from [(end - n, end) for n in lengths if text[end - n : end] in self._beginnings][:1]
        for start in {0, len(text) - len(text.lstrip())}:
            lengths = range(min(len(text) - start, self._longest - 1), 0, -1)
            yield from [(start, start + n) for n in lengths if text[start : start + n] in self._endings][:1]

    def _free_characters(self, texts: Iterable[str]) -> int:
        """The first character of a range as long as the alphabet, none of which occurs in `texts`."""
        pattern = re.compile(f"[{chr(_PRIVATE.start)}-{chr(_PRIVATE.stop - 1)}]")
        taken = {ord(char) for text in texts for char in pattern.findall(text)}
        size = len(self._alphabet)
        for first in range(_PRIVATE.start, _PRIVATE.stop - size, size):
            if taken.isdisjoint(range(first, first + size)):
                return first
        raise InvalidRequest("The messages contain too many private-use characters.", param="messages")

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
    """A JSON value with some of its texts replaced."""
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, Mapping):
        return {texts.get(key, key): _with(inner, texts) for key, inner in value.items()}
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
