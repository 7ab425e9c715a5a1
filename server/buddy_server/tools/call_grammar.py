"""Grammars that make an answer consist of valid calls, for llguidance."""

import json
import re
from collections.abc import Mapping
from typing import Any

from buddy_server.tools.choice import Function, ToolChoice
from buddy_server.tools.syntax import Syntax

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As chat templates write JSON, and without white space that a weak model could repeat for ever."""
_LARGEST = 2**53 - 1
"""Every client can read integers up to this. Without a bound, a weak model writes digits without end."""
_DATA = ("const", "default", "enum", "examples")
"""Keywords whose values are no schemas."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose values are objects of schemas, under names that are no keywords."""
_CLOSED = {"type", "properties", "required", "title", "description", "$defs", "definitions", "$schema"}
"""A schema with these keywords alone means no other properties than it names, though JSON Schema would allow them."""


def call_grammar(
    syntax: Syntax, choice: ToolChoice, marker_ids: Mapping[str, int], text_grammar: str | None = None
) -> str:
    """The grammar, serialized, of the answers that `choice` allows. `marker_ids` are those markers that are tokens.
    With a `text_grammar`, an answer that may be text is either calls, which need a marker then, or what that allows.

    Schemas are not checked here. In those of functions that are not strict, llguidance ignores what it does not know.
    """
    markers = {name: f"<[{marker_ids[name]}]>" if name in marker_ids else json.dumps(name) for name in syntax.markers}
    first, more, last = (_with_markers(rule, markers) for rule in (syntax.first, syntax.more, syntax.last))
    num_more = min(choice.max_calls, syntax.max_calls) - 1
    calls = f"{first} ({more}){{0,{num_more}}} {last}" if num_more else f"{first} {last}"
    opening = markers.get(syntax.marker, "")
    # A marker spelled in other tokens would begin a call, too. Of text, a lazy rule stops at the first marker.
    is_lazy = not syntax.may_be_bare and syntax.marker not in marker_ids
    no_marker = "" if is_lazy or not syntax.marker else rf" & ~/(.|\n)*{re.escape(syntax.marker)}(.|\n)*/"
    text_grammars = [] if text_grammar is None or choice.must_call else json.loads(text_grammar)["grammars"]
    if choice.must_call:
        rules = [f"start: {'' if syntax.may_be_bare else opening} {calls}"]
    elif text_grammars:
        text_grammars[0]["name"] = "text"
        rules = [f"start: @text | {opening} {calls}"]
    elif syntax.may_be_bare:
        # Text does not begin like a call, or it would not have to become one.
        marked = f"| {opening} {calls}" if opening else ""
        rules = [f"start: TEXT? | {calls} {marked}", rf"TEXT: /\s*[^\s{{](.|\n)*/{no_marker}"]
    else:
        options = "[lazy]" if is_lazy else ""
        rules = [f"start: TEXT | lead {calls}", f"lead{options}: TEXT {opening}", rf"TEXT: /(.|\n)*/{no_marker}"]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(choice.functions))))
    for index, function in enumerate(choice.functions):
        rules.append(f"call_{index}: {_call(syntax, function, markers)}")
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, *text_grammars]})


def _call(syntax: Syntax, function: Function, markers: Mapping[str, str]) -> str:
    arguments = f"%json {json.dumps(_schema(function))}"
    if syntax.key is None:
        return f"{json.dumps(function.name)} {markers['[ARGS]']} {arguments}"
    before = f'{{"name": {json.dumps(function.name)}, "{syntax.key}": '
    return f'{json.dumps(before)} {arguments} "}}"'


def _schema(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments: always an object, and without properties that no schema names."""
    schema: dict[str, Any] = {"type": "object", **_bounded(function.parameters or {"properties": {}})}
    if "properties" in schema and schema.keys() <= _CLOSED:
        schema["additionalProperties"] = False
    return schema | {"x-guidance": _JSON_STYLE | {"lenient": not function.is_strict}}


def _bounded(schema: Any) -> Any:
    """A JSON schema, or a part of one, in which numbers have a lowest and a highest value."""
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    bounded = {key: value if key in _DATA else _bounded(value) for key, value in schema.items()}
    for key in _NAMED:
        if isinstance(named := schema.get(key), Mapping):
            bounded[key] = {name: _bounded(part) for name, part in named.items()}
    kinds = schema.get("type")
    is_number = any(kind in ("integer", "number") for kind in (kinds if isinstance(kinds, list) else [kinds]))
    if is_number and "multipleOf" not in schema:
        given = [schema.get(key, 0) for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")]
        if all(isinstance(bound, int | float) and abs(bound) < _LARGEST for bound in given):
            return {"minimum": -_LARGEST, "maximum": _LARGEST} | bounded
    return bounded


def _with_markers(rule: str, markers: Mapping[str, str]) -> str:
    return " ".join(markers.get(word, word) for word in rule.split(" "))
