"""Limits the JSON of one request before it is parsed, because the parsed values are a hundred times as large."""

import re

from buddy_server.errors import InvalidRequest, shown

MAX_VALUES = 2**18
"""Numbers, texts and so on, which includes the token ids of all prompts together."""
MAX_CONTAINERS = 2**14
"""Lists and objects. A parser spends hundreds of bytes on an empty one."""
MAX_DEPTH = 64
MAX_TEXTS = 2**16
"""Texts, including the names of fields. This module looks at each, which takes about a microsecond."""
_STRING = re.compile(rb'"[^"]*+"?')


class JsonBound:
    """Counts the values in the JSON texts of one request. It counts strings, and commas and brackets outside them, so
    it bounds malformed JSON as well."""

    def __init__(self) -> None:
        self._num_commas = 0
        self._num_containers = 0
        self._num_texts = 0

    def add(self, text: bytes, field: str | None = None) -> None:
        """Raise InvalidRequest if `text` and the earlier texts together hold too much, or `text` is nested too deep.

        The error names `field`, or else the field of the object in `text` where it occurs.
        """
        # After this, no escaped quote can begin or end a string.
        text = text.replace(rb"\\", b"").replace(rb"\"", b"")
        depth = start = 0
        names_fields = field is None
        for string in _STRING.finditer(text):
            depth = self._add_between(text[start : string.start()], depth, field)
            start = string.end()
            self._num_texts += 1
            if self._num_texts > MAX_TEXTS:
                raise _too_much(field, f"more texts than the {MAX_TEXTS}")
            if names_fields and depth == 1 and text[start : start + 20].lstrip().startswith(b":"):
                field = string[0].strip(b'"').decode(errors="replace")[:64]
        self._add_between(text[start:], depth, field)

    def _add_between(self, text: bytes, depth: int, field: str | None) -> int:
        """Count the text between two strings, `depth` levels deep. Returns the depth after it."""
        num_opened = text.count(b"[") + text.count(b"{")
        self._num_commas += text.count(b",")
        self._num_containers += num_opened
        if self._num_commas > MAX_VALUES:
            raise _too_much(field, f"more values than the {MAX_VALUES}")
        if self._num_containers > MAX_CONTAINERS:
            raise _too_much(field, f"more lists and objects than the {MAX_CONTAINERS}")
        if depth + num_opened <= MAX_DEPTH:
            return depth + num_opened - text.count(b"]") - text.count(b"}")
        for char in text:
            depth += (char in b"[{") - (char in b"]}")
            if depth > MAX_DEPTH:
                raise _too_much(field, f"more lists and objects within each other than the {MAX_DEPTH}")
        return depth


def _too_much(field: str | None, what: str) -> InvalidRequest:
    where = shown(field)[1:-1] if field else "The request body"
    return InvalidRequest(f"{where}: there are {what} allowed in a request", param=field)
