"""Finds calls in an answer while it arrives."""

from collections.abc import Callable, Collection, Generator
from typing import TypeAlias

import regex

from buddy_server.tools.object_end import ObjectEnd
from buddy_server.tools.pieces import CallPiece, Piece, TextPiece
from buddy_server.tools.syntax import CALL_END, LATE_NAME, SPACE, Syntax

_BARE = regex.compile(rf"{SPACE}(?=\{{)")
Match: TypeAlias = regex.Match[str]
Pattern: TypeAlias = regex.Pattern[str]


class CallParser:
    """A ToolParser for any syntax. `names` are the functions that the model was given.

    A call begins with its name and the bracket of its arguments; whatever begins like one and goes on otherwise is
    text, marker included. Arguments are passed on as they arrive, so they are what the model made of them. After a
    marker, a call of an unknown function is a call too, since the client can tell the model. White space around calls
    is dropped; with `only_calls` all text is, since it can only be the beginning of a call that was cut off.
    """

    def __init__(self, syntax: Syntax, names: Collection[str], only_calls: bool = False) -> None:
        self._syntax = syntax
        self._names = names
        self._only_calls = only_calls
        self._opening = regex.compile(SPACE + regex.escape(syntax.marker)) if syntax.marker else None
        self._text = ""
        self._has_ended = False
        self._num_calls = 0
        self._is_after_call = False
        self._pieces: list[Piece] = []
        self._parsing = self._parse()

    def add(self, text: str) -> list[Piece]:
        self._text += text
        next(self._parsing)
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        self._has_ended = True
        next(self._parsing, None)
        return self._pieces

    # Everything below waits for more text where it yields. Once the answer has ended, none comes.

    def _parse(self) -> Generator[None]:
        if self._syntax.may_be_bare and (bare := (yield from self._take(_BARE))):
            yield from self._calls(bare[0], self._names)
        while opening := (yield from self._text_before_calls()):
            yield from self._calls(opening[0], None)

    def _text_before_calls(self) -> Generator[None, None, Match | None]:
        """Passes text on up to the next marker, which it returns with the white space before; None without any."""
        while True:
            found = None
            if self._opening is not None:
                found = self._opening.search(self._text, partial=not self._has_ended)
            if found is not None and not found.partial:
                self._say(self._cut(found.end())[: found.start()])
                return found
            self._say(self._cut(len(self._text) if found is None else found.start()))
            if self._has_ended:
                return None
            yield

    def _calls(self, opening: str, names: Collection[str] | None) -> Generator[None]:
        """The calls behind `opening`. If no call of one of `names` (None: of any) follows, it is text."""
        while (no_call := (yield from self._call(names))) is None:
            while (yield from self._take(CALL_END)):
                pass
            if self._syntax.closing and (yield from self._take(self._syntax.closing)):
                return
            if not self._syntax.separator or not (separator := (yield from self._take(self._syntax.separator))):
                return
            opening = separator[0]
        self._say(opening + no_call)

    def _call(self, names: Collection[str] | None) -> Generator[None, None, str | None]:
        """One call, up to the end of its arguments. If there is none, returns the text in which one was looked for."""
        head = yield from self._take(self._syntax.head)
        if head is None:
            return ""
        if head["name"] is None:
            return (yield from self._call_named_late(head[0], names))
        if names is not None and head["name"] not in names:
            return head[0]
        if self._text.startswith("{"):
            self._begin(head["name"], "")
            yield from self._object(self._argue)
        else:
            self._begin(head["name"], "{}")
        return None

    def _call_named_late(self, head: str, names: Collection[str] | None) -> Generator[None, None, str | None]:
        """The same for a call that has its name behind its arguments, which are held back until then."""
        parts: list[str] = []
        yield from self._object(parts.append)
        arguments = "".join(parts)
        late = yield from self._take(LATE_NAME)
        if late is None or (names is not None and late["name"] not in names):
            return head + arguments + (late[0] if late else "")
        self._begin(late["name"], arguments)
        return None

    def _object(self, receive: Callable[[str], object]) -> Generator[None]:
        """Passes a JSON object on, as it arrives."""
        objects_end = ObjectEnd()
        while True:
            end = objects_end.find(self._text)
            receive(self._cut(len(self._text) if end is None else end))
            if end is not None or self._has_ended:
                return
            yield

    def _take(self, pattern: Pattern) -> Generator[None, None, Match | None]:
        """Removes what `pattern` matches at the beginning of the text; None if it cannot match, whatever follows."""
        while True:
            match = pattern.match(self._text, partial=not self._has_ended)
            if match is None or not match.partial:
                break
            yield
        if match is not None:
            self._cut(match.end())
        return match

    def _cut(self, length: int) -> str:
        cut, self._text = self._text[:length], self._text[length:]
        return cut

    def _say(self, text: str) -> None:
        if self._is_after_call:
            text = text.lstrip()
        if text and not self._only_calls:
            self._is_after_call = False
            self._pieces.append(TextPiece(text))

    def _begin(self, name: str, arguments: str) -> None:
        self._pieces.append(CallPiece(self._num_calls, name, arguments))
        self._num_calls += 1
        self._is_after_call = True

    def _argue(self, text: str) -> None:
        if text:
            self._pieces.append(CallPiece(self._num_calls - 1, None, text))
