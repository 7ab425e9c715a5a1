"""Finds the end of a JSON object whose text arrives in parts."""

import re

_NEXT_OUTSIDE = re.compile(r'["{}\[\]]')
_NEXT_IN_STRING = re.compile(r'["\\]')


class ObjectEnd:
    """Follows brackets and strings alone: models write invalid JSON, and their clients are used to it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """Where in `text`, the next part, the object ends; None if it goes on."""
        at = 0
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_NEXT_IN_STRING if self._in_string else _NEXT_OUTSIDE).search(text, at)
            if found is None:
                break
            at = found.end()
            match found[0]:
                case "\\":
                    self._is_escaped = True
                case '"':
                    self._in_string = not self._in_string
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth == 0:
                        return at
        return None
