"""How each model family writes calls: as patterns that find them in an answer, and as rules of a grammar.

Patterns have to decide with the text that they match, whatever may follow, since answers arrive in parts.
"""

from dataclasses import dataclass, replace
from typing import Literal

import regex

from buddy_server.tools.choice import MAX_CALLS

_NAME = r"(?P<name>[\w.-]{1,64})"
SPACE = r"\s{0,32}"
"""White space is bounded, since a weak model writes it without end."""
_EXTRA = rf'"(?:id|type)"{SPACE}:{SPACE}"[^"\\]{{0,64}}"'
_EXTRAS = rf"(?:{_EXTRA}{SPACE},{SPACE}){{0,2}}"
_ARGUMENTS = rf'"(?:arguments|parameters)"{SPACE}:{SPACE}(?=\{{)'
_CALL = (
    rf"\{{{SPACE}(?:"
    rf'{_EXTRAS}"name"{SPACE}:{SPACE}"{_NAME}"{SPACE}(?:,{SPACE}{_EXTRAS}{_ARGUMENTS}|(?=\}}))'
    rf"|{_ARGUMENTS})"
)
"""The beginning of a call as a JSON object, up to its arguments, which may come before the name."""

LATE_NAME = regex.compile(rf'{SPACE},{SPACE}"name"{SPACE}:{SPACE}"{_NAME}"')
"""The name of a call, behind its arguments."""
CALL_END = regex.compile(rf"{SPACE},{SPACE}{_EXTRA}|{SPACE}\}}")
"""What may follow the arguments within their call."""


@dataclass(frozen=True, slots=True)
class Syntax:
    """`marker` begins calls, in the middle of a text as well. If `may_be_bare`, calls at the beginning of an answer
    need none, but then they must name functions that the model was given: any other JSON is an answer.

    `head` matches from the marker's end, or from a separator's, to the arguments of a call. `separator` stands between
    two calls that share a marker, `closing` behind the last one.

    The rules `first` and `more`, for one call each, and `last` make an answer of calls, in llguidance's Lark notation;
    in them, names from `markers` stand for themselves, and "call" for a call's JSON. `key` is the name that
    the arguments have in there; None for a call that is not an object, but a name and then the arguments. At most
    `max_calls` calls make an answer.
    """

    marker: str
    head: "regex.Pattern[str]"
    separator: "regex.Pattern[str] | None" = None
    closing: "regex.Pattern[str] | None" = None
    may_be_bare: bool = False
    markers: tuple[str, ...] = ()
    first: str = "call"
    more: str = ""
    last: str = ""
    key: Literal["arguments", "parameters"] | None = "arguments"
    max_calls: int = MAX_CALLS


HERMES = Syntax(
    marker="<tool_call>",
    head=regex.compile(rf"{SPACE}{_CALL}"),
    closing=regex.compile(rf"{SPACE}</tool_call>"),
    markers=("<tool_call>", "</tool_call>"),
    first='"\\n" call "\\n" </tool_call>',
    more='"\\n" <tool_call> "\\n" call "\\n" </tool_call>',
)
"""Nous Research's Hermes models, Qwen 2.5 and Qwen 3."""

LLAMA3 = Syntax(
    marker="<|python_tag|>",
    head=regex.compile(rf"{SPACE}{_CALL}"),
    separator=regex.compile(rf"{SPACE};?{SPACE}(?=\{{)"),
    may_be_bare=True,
    markers=("<|python_tag|>",),
    key="parameters",
    max_calls=1,
)
"""Llama 3.1, 3.2 and 3.3, as JSON. Their templates refuse messages with more than one call, so none is made to have
more."""

MISTRAL = Syntax(
    marker="[TOOL_CALLS]",
    head=regex.compile(
        rf"{SPACE}(?:\[{SPACE})?{_CALL}"
        rf"|{SPACE}{_NAME}(?:\[CALL_ID\]\w{{0,64}})?(?:\[ARGS\])?{SPACE}(?=\{{)"
    ),
    separator=regex.compile(rf"{SPACE},{SPACE}(?=\{{)"),
    closing=regex.compile(rf"{SPACE}\]"),
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    first='" "? "[" call',
    more='", " call',
    last='"]"',
)
"""Mistral models until 2024: a list of JSON objects."""

MISTRAL_ARGS = replace(MISTRAL, first="call", more="[TOOL_CALLS] call", last="", key=None)
"""Mistral models since 2025: the name and then the arguments, after a marker for each call. Both kinds are parsed the
same way."""

PLAIN = Syntax(
    marker="",
    head=regex.compile(_CALL),
    separator=regex.compile(rf"{SPACE}(?=\{{)"),
    may_be_bare=True,
    more='"\\n" call',
)
"""JSON objects, one a line, for models of no known family."""
