"""Structured output: what a request asks of its answer's form, as a grammar for the engine.

Besides OpenAI's `response_format`, the fields of vLLM are understood.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from anyio import CapacityLimiter, fail_after, to_thread
from llguidance import LLMatcher, grammar_from
from pydantic import Field, model_validator

from buddy_server.api.field_types import refused
from buddy_server.api.schema import Schema
from buddy_server.engine.constraint import GrammarError, Grammars, shortened
from buddy_server.errors import InvalidRequest, shown

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SCHEMA_BYTES = 2**16
MAX_SCHEMA_DEPTH = 64
"""Lists and objects within each other; a schema in another one's properties is two deeper."""
MAX_PROPERTIES = 500
MAX_CHOICES = 1000
"""Values of all enums."""
MAX_REGEX_CHARS = 4096
"""Of a regular expression, or of all of a schema's together: some take a time that grows with the square."""
MAX_GRAMMAR_CHARS = 8192
MAX_MULTIPLE = 10_000
"""The factors of all multipleOf, without their decimal point, multiplied: as many states they take together."""
COMPILE_S = 3.0
KEYWORDS = (
    "type, properties, required, additionalProperties, patternProperties, minProperties, maxProperties, items, "
    "prefixItems, minItems, maxItems, enum, const, anyOf, allOf, oneOf of other types or other constant texts, $ref "
    "to the schema itself, minLength, maxLength, pattern, format, minimum, maximum, exclusiveMinimum, "
    "exclusiveMaximum, multipleOf"
)
_WHITESPACE = r"[ ]|\n[ ]{0,16}"
"""Between the tokens of JSON: a small model would otherwise write blanks for ever."""
_JSON_OPTIONS: "JsonCompileOptions" = {
    "whitespace_pattern": _WHITESPACE,
    "lenient": False,
    "coerce_one_of": False,
}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JsonSchemaFormat(Schema):
    """`strict` changes nothing: a schema is always kept."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Schema):
    """`schema` is where llama.cpp has it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        self.form()
        return self

    def form(self) -> "Form | None":
        """What it asks for; None for plain text. Raises for a schema that is missing."""
        match self.type, self.json_schema, self.schema_:
            case "text", _, _:
                return None
            case "json_schema", JsonSchemaFormat(schema_=dict(schema)), _:
                return Form("response_format.json_schema.schema", "json", schema)
            case _, _, dict(schema):
                return Form("response_format.schema", "json", schema)
            case "json_object", _, _:
                return Form("response_format", "json", _ANY_OBJECT)
        raise refused("response_format.json_schema.schema", None, "a JSON schema")


class TextFormat(JsonSchemaFormat):
    """`text.format` of /v1/responses, which says the same as `response_format` without a level between."""

    type: Literal["text", "json_object", "json_schema"]

    @model_validator(mode="after")
    def _has_schema(self) -> "TextFormat":
        self.form()
        return self

    def form(self) -> "Form | None":
        """As ResponseFormat.form."""
        match self.type, self.schema_:
            case "text", _:
                return None
            case "json_object", _:
                return Form("text.format", "json", _ANY_OBJECT)
            case "json_schema", dict(schema):
                return Form("text.format.schema", "json", schema)
        raise refused("text.format.schema", None, "a JSON schema")

    def body(self) -> dict[str, Any]:
        """As the response repeats it."""
        return self.model_dump(by_alias=True, exclude_none=True)


class StructuredOutputs(Schema):
    """vLLM's field: exactly one kind of form."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, raw: object) -> object:
        allowed = ("json", "json_object", "regex", "grammar", "choice")
        for option, value in raw.items() if isinstance(raw, dict) else ():
            if option not in allowed and value is not None:
                raise refused(f"structured_outputs.{shown(option)[1:-1]}", value, f"one of {', '.join(allowed)}")
        return raw


class StructuredFields(Schema):
    """The fields that ask for a form. `guided_*` are the older names of what `structured_outputs` has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """The form of the answer, in vLLM's notation."""
    guided_json: dict[str, Any] | str | None = None
    """The same as json in structured_outputs."""
    guided_regex: str | None = None
    """The same as regex in structured_outputs."""
    guided_grammar: str | None = None
    """The same as grammar in structured_outputs."""
    guided_choice: list[str] | None = None
    """The same as choice in structured_outputs."""


class GrammarCompiler:
    """Makes grammars and finds out whether the engine could use them. Two at a time: that may take seconds."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._turns = CapacityLimiter(2)

    async def make(self, grammar: Callable[[], str], param: str, allowed: str) -> str:
        """What `grammar` returns. Raises what it raises, and InvalidRequest for `param` if the engine could not use it;
        `allowed` says what it could."""

        def compiled() -> str:
            made = grammar()
            self._grammars.compiled(made)
            return made

        try:
            # Waiting for others' grammars does not count.
            async with self._turns:
                with fail_after(COMPILE_S):
                    return await to_thread.run_sync(compiled, abandon_on_cancel=True)
        except GrammarError as error:
            raise _refused(param, str(error), allowed) from None
        except TimeoutError:
            raise _refused(param, f"it takes longer than {COMPILE_S:.0f} seconds to prepare", "a simpler one") from None


def json_grammar(schema: Mapping[str, Any] | str, param: str) -> str:
    """The grammar of the JSON values that `schema`, or a text of it, describes. Raises InvalidRequest for a schema
    that is too large or asks for what its grammar would not ensure; compiling it finds what else is wrong."""
    if isinstance(schema, str):
        _check_length(schema, MAX_SCHEMA_BYTES, param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise refused(param, schema, "a JSON schema") from None
        if not isinstance(schema, dict):
            raise refused(param, schema, "a JSON schema, which is an object")
    objects = list(_objects(schema, param))
    try:
        text = json.dumps(schema, allow_nan=False)
        _check_length(text, MAX_SCHEMA_BYTES, param)
        _check_objects(objects, param)
        if "x-guidance" in schema:
            raise _refused(param, "x-guidance", f"the keywords {KEYWORDS}")
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise _refused(param, shortened(str(error)), "a JSON schema") from None


def _check_objects(objects: Iterable[dict[str, Any]], param: str) -> None:
    """Raise InvalidRequest if a schema's objects ask for too much together, or for what a grammar would not ensure."""
    num_properties = num_choices = num_chars = 0
    factors: set[int] = set()
    for node in objects:
        properties, choices, patterns = (node.get(key) for key in ("properties", "enum", "patternProperties"))
        num_properties += len(properties) if isinstance(properties, dict) else 0
        num_choices += len(choices) if isinstance(choices, list) else 0
        num_chars += len(pattern) if isinstance(pattern := node.get("pattern"), str) else 0
        num_chars += sum(map(len, patterns)) if isinstance(patterns, dict) else 0
        factor = node.get("multipleOf")
        # What is no number, and 0, the compiler refuses; negative ones work like positive ones.
        if isinstance(factor, int | float) and not isinstance(factor, bool) and factor:
            factors.add(_without_point(abs(factor)))
        num_required = len(required) if isinstance(required := node.get("required"), list) else 0
        if isinstance(least := node.get("minProperties"), int) and least > max(1, num_required):
            # Names that no property declares may be written twice.
            raise _refused(param, f"minProperties {least}", "1, or the number of required properties")
    for count, most, what in (
        (num_properties, MAX_PROPERTIES, "properties"),
        (num_choices, MAX_CHOICES, "values of enum"),
        (num_chars, MAX_REGEX_CHARS, "characters of pattern"),
        (prod(factors), MAX_MULTIPLE, "as the product of multipleOf"),
    ):
        if count > most:
            raise _refused(param, f"it has {shown(count)} {what}", f"up to {most}")


@dataclass(frozen=True, slots=True)
class Form:
    """What the field `param` asks of an answer's text: a `kind` of form, and the form."""

    param: str
    kind: Literal["json", "regex", "grammar", "choice"]
    value: Any


def _forms(fields: StructuredFields) -> Iterator[Form]:
    if fields.response_format is not None and (form := fields.response_format.form()) is not None:
        yield form
    outputs = fields.structured_outputs or StructuredOutputs()
    if outputs.json_object:
        yield Form("structured_outputs.json_object", "json", _ANY_OBJECT)
    for kind in ("json", "regex", "grammar", "choice"):
        older = getattr(fields, f"guided_{kind}")
        newer = outputs.json_ if kind == "json" else getattr(outputs, kind)
        for param, value in ((f"guided_{kind}", older), (f"structured_outputs.{kind}", newer)):
            if value is not None:
                yield Form(param, kind, value)


def _regex_grammar(regex: str, param: str) -> str:
    _check_length(regex, MAX_REGEX_CHARS, param)
    return LLMatcher.grammar_from_regex(regex)


def _choice_grammar(texts: list[str], param: str) -> str:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise refused(param, texts, f"1 to {MAX_CHOICES} texts")
    _check_length("".join(texts), MAX_SCHEMA_BYTES, param)
    return grammar_from("choice", json.dumps(texts))


def _context_free_grammar(text: str, param: str) -> str:
    _check_length(text, MAX_GRAMMAR_CHARS, param)
    for directive in ("%json", "%llguidance"):
        if directive in text:
            raise _refused(param, directive, "Lark or GBNF without it")
    try:
        return grammar_from("grammar", text)
    except ValueError as error:
        raise _refused(param, shortened(str(error)), "Lark or GBNF") from None


def _objects(schema: Mapping[str, Any], param: str) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value. Raises InvalidRequest where it is nested too deep."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if not isinstance(value, dict | list):
            continue
        if depth > MAX_SCHEMA_DEPTH:
            raise _refused(param, "it is nested too deep", f"{MAX_SCHEMA_DEPTH} lists and objects within each other")
        if isinstance(value, dict):
            yield value
        waiting += [(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value)]


def _without_point(number: float) -> int:
    """The number times the power of ten that makes it whole."""
    exact = Decimal(str(number)).normalize()
    exponent = int(exact.as_tuple().exponent)
    return int(exact.scaleb(-min(exponent, 0)))


def _check_length(text: str, most: int, param: str) -> None:
    if len(text) > most:
        raise _refused(param, f"it has {len(text)} characters", f"up to {most}")


def _refused(param: str, reason: str, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported: {reason}; allowed is {allowed}", param=param)


_KINDS: Mapping[str, tuple[Callable[[Any, str], str], str]] = {
    "json": (json_grammar, f"the keywords {KEYWORDS}"),
    "regex": (_regex_grammar, "the syntax of Rust's regex, without look-around"),
    "grammar": (_context_free_grammar, "Lark or GBNF"),
    "choice": (_choice_grammar, "texts"),
}
"""How each kind of form becomes a grammar, and what is allowed where it cannot."""


def form_of(fields: StructuredFields) -> Form | None:
    """The form that `fields` ask for. Raises InvalidRequest for more than one."""
    forms = list(_forms(fields))
    if len(forms) > 1:
        first, second = forms[0].param, forms[1].param
        raise InvalidRequest(f"{second} is not allowed beside {first}: give one of them", param=second)
    return forms[0] if forms else None


async def grammar_of(form: Form, compiler: GrammarCompiler) -> str:
    """The grammar of `form`, in llguidance's format. Raises InvalidRequest for what cannot be kept or is too large."""
    make, allowed = _KINDS[form.kind]
    return await compiler.make(partial(make, form.value, form.param), form.param, allowed)
