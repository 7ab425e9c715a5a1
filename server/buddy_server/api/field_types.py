"""Request fields with a format of their own. Validation stops at the first error and names it: on a list of a million
values, more is not worth the time."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from buddy_server.errors import InvalidRequest, shown

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 64
MAX_BIASES = 4096
MAX_PROMPTS = 128
MAX_CONTENT_PARTS = 1024

Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1)]


def refused(param: str, value: object, allowed: str) -> InvalidRequest:
    """The error for a value that is not allowed."""
    return InvalidRequest(f"{param}: {shown(value)} is not allowed: give {allowed}", param=param)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _joined_text(value: object, fields: Mapping[str, str]) -> object:
    """Joins a list of text parts into one text, one part per line, as vLLM and llama.cpp do. `fields` names, for each
    type of part, the field with its text."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_CONTENT_PARTS:
        raise ValueError(f"content has {len(value)} parts, allowed are {MAX_CONTENT_PARTS}")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(fields.get(kind)) if isinstance(kind, str) else None
        if not isinstance(text, str):
            raise ValueError(
                f"part {index} of it, {shown(part)}, is not supported: content is a string or a list of text parts"
            )
        texts.append(text)
    return "\n".join(texts)


def _stops(value: object) -> list[str]:
    allowed = f"a text or up to {MAX_STOPS} texts, each of 1 to {MAX_STOP_CHARS} characters"
    listed: list[Any] = value if isinstance(value, list) else [value]
    if len(listed) > MAX_STOPS:
        raise refused("stop", value, allowed)
    for index, stop in enumerate(listed):
        if not (isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS):
            raise refused("stop" if listed is not value else f"stop[{index}]", stop, allowed)
    return listed


def _stop_token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKENS:
        raise refused("stop_token_ids", value, f"a list of up to {MAX_STOP_TOKENS} token ids")
    return _token_ids("stop_token_ids", value)


def _token_ids(param: str, values: list[Any]) -> list[int]:
    for index, token in enumerate(values):
        if not _is_integer(token) or token < 0:
            raise refused(f"{param}[{index}]", token, "token ids, which are integers from 0")
    return values


def _logit_bias(value: object) -> dict[int, float]:
    allowed = f"an object of up to {MAX_BIASES} token ids, each with a number from -100 to 100"
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise refused("logit_bias", value, allowed)
    for key, bias in value.items():
        # Python accepts other decimal digits as well, and a long number is not worth parsing.
        if not re.fullmatch("[0-9]{1,9}", key):
            raise InvalidRequest(f"logit_bias: {shown(key)} is not a token id: give {allowed}", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias: {shown(bias)} for token {key} is not allowed: give {allowed}", param="logit_bias"
            )
    return {int(key): float(bias) for key, bias in value.items()}


def _prompts(value: Any) -> list[str] | list[list[int]]:
    allowed = f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise refused("prompt", value, allowed)
    if _is_integer(value[0]):
        return [_token_ids("prompt", value)]
    if len(value) > MAX_PROMPTS:
        raise refused("prompt", value, f"{allowed}; there are {len(value)}")
    kind = str if isinstance(value[0], str) else list
    for index, prompt in enumerate(value):
        if not isinstance(prompt, kind) or prompt == []:
            raise refused(f"prompt[{index}]", prompt, allowed)
        if isinstance(prompt, list):
            _token_ids(f"prompt[{index}]", prompt)
    return value


def _any_of(*schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(schemas)})


def _list_of(items: dict[str, Any], most: int | None = None, least: int = 0) -> dict[str, Any]:
    bounds = {"maxItems": most} if most is not None else {}
    return {"type": "array", "items": items, "minItems": least, **bounds}


_STRING = {"type": "string"}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_TOKEN = {"type": "integer", "minimum": 0}
_TOKENS = _list_of(_TOKEN, least=1)
_PARTS = {"text": "text", "refusal": "refusal"}
_ITEM_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


def _text_schema(parts: Mapping[str, str]) -> WithJsonSchema:
    part = [
        {"type": "object", "required": ["type", field], "properties": {"type": {"const": kind}, field: _STRING}}
        for kind, field in parts.items()
    ]
    return _any_of(_STRING, _list_of({"anyOf": part}, MAX_CONTENT_PARTS), {"type": "null"})


Text = Annotated[str | None, BeforeValidator(partial(_joined_text, fields=_PARTS)), _text_schema(_PARTS)]
ItemText = Annotated[str | None, BeforeValidator(partial(_joined_text, fields=_ITEM_PARTS)), _text_schema(_ITEM_PARTS)]
"""The same in an item of /v1/responses."""
Stops = Annotated[list[str], PlainValidator(_stops), _any_of(_STOP, _list_of(_STOP, MAX_STOPS))]
StopTokenIds = Annotated[list[int], PlainValidator(_stop_token_ids), WithJsonSchema(_list_of(_TOKEN, MAX_STOP_TOKENS))]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        }
    ),
]
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts),
    _any_of(_STRING, _TOKENS, _list_of(_STRING, MAX_PROMPTS, 1), _list_of(_TOKENS, MAX_PROMPTS, 1)),
]
"""Always a list, of texts or of token ids."""
