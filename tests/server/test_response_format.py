"""What a request may ask of its answer's form, and what is refused, with the embedded model's tokenizer."""

import json
import random
import string
import time
from collections.abc import Iterator
from typing import Any, Literal

import anyio
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel
from tokenizers import Tokenizer

from buddy_routing.embedded import embedded_model
from buddy_server.api import response_format
from buddy_server.api.response_format import GrammarCompiler, StructuredFields, form_of, grammar_of
from buddy_server.engine.constraint import Grammars
from buddy_server.errors import InvalidRequest
from fakes.site import Site

VOCAB_SIZE = 3072


@pytest.fixture(scope="module")
def embedded_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))


@pytest.fixture(scope="module")
def compiler(embedded_tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(Grammars(embedded_tokenizer, VOCAB_SIZE))


@pytest.fixture(scope="module")
def ll_tokenizer(embedded_tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(embedded_tokenizer.to_str())


def asked(compiler: GrammarCompiler, fields: dict[str, Any]) -> str | None:
    """The grammar of a body with these fields."""
    form = form_of(StructuredFields.model_validate(fields))
    return None if form is None else anyio.run(grammar_of, form, compiler)


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    name: str
    age: int | None = None
    friends: list["Pet"] = []


@pytest.mark.parametrize(
    ("fields", "taken", "not_taken"),
    [
        ({"response_format": {"type": "json_object"}}, ['{}', '{"a": [1, {"b": null}]}', '{\n "a": 1\n}'], ["[]"]),
        (of_schema({"type": "integer"}), ["12", "-3"], ["1.5", '"1"']),
        (of_schema(Pet.model_json_schema()), ['{"kind": "cat", "name": "x", "friends": []}'], ['{"kind": "cow"}']),
        (of_schema({}), ["1", "[null]"], ["x"]),
        ({"response_format": {"type": "json_object", "schema": {"const": 7}}}, ["7"], ["{}"]),
        ({"response_format": {"type": "json_schema", "schema": {"const": 7}}}, ["7"], ["{}"]),
        ({"guided_json": {"const": 1}}, ["1"], ["2"]),
        ({"guided_json": '{"const": 1}'}, ["1"], ["2"]),
        ({"guided_regex": "a+b"}, ["aab"], ["b", "aa"]),
        ({"guided_choice": ["Zoë", 'a "b"\n', "x"]}, ["Zoë", 'a "b"\n', "x"], ["Zo", "y"]),
        ({"guided_grammar": 'start: "a" start | "b"'}, ["b", "aab"], ["a"]),
        ({"guided_grammar": 'root ::= "a" root | [0-9]'}, ["3", "aa3"], ["a"]),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, ["true"], ["1"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["1"]),
        ({"structured_outputs": {"regex": "x"}}, ["x"], ["y"]),
        ({"structured_outputs": {"choice": ["x", "y"]}}, ["x", "y"], ["z"]),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, ["x"], ["y"]),
    ],
)  # fmt: skip
def test_form_takes_what_it_describes_and_nothing_else(
    compiler: GrammarCompiler, ll_tokenizer: LLTokenizer, fields: dict[str, Any], taken: list[str], not_taken: list[str]
) -> None:
    grammar = asked(compiler, fields)
    assert grammar is not None

    def takes(text: str) -> bool:
        matcher = LLMatcher(ll_tokenizer, grammar)
        return matcher.consume_tokens(ll_tokenizer.tokenize_str(text)) and matcher.is_accepting()

    assert [text for text in taken if not takes(text)] == []
    assert [text for text in not_taken if takes(text)] == []


@pytest.mark.parametrize("schema", [{"type": "object"}, Pet.model_json_schema()])
def test_blanks_between_the_tokens_of_json_have_a_limit(
    compiler: GrammarCompiler, ll_tokenizer: LLTokenizer, schema: dict[str, Any]
) -> None:
    grammar = asked(compiler, of_schema(schema))
    assert grammar is not None
    for blanks in ("  ", "\n\n", " \n", "\n" + 17 * " ", "\t"):
        matcher = LLMatcher(ll_tokenizer, grammar)
        tokens = ll_tokenizer.tokenize_str("{" + blanks)
        assert matcher.try_consume_tokens(tokens) < len(tokens), repr(blanks)


@pytest.mark.parametrize("fields", [{}, {"response_format": None}, {"response_format": {"type": "text"}}])
def test_without_a_form_there_is_no_grammar(compiler: GrammarCompiler, fields: dict[str, Any]) -> None:
    assert asked(compiler, fields) is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def words(count: int) -> Iterator[str]:
    rng = random.Random(0)
    return ("".join(rng.choices(string.ascii_lowercase, k=10)) for _ in range(count))


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        (of_schema({"type": "array", "uniqueItems": True}), SCHEMA, '["uniqueItems"]; allowed is the keywords type'),
        (of_schema({"not": {}}), SCHEMA, '["not"]; allowed is the keywords type, properties'),
        (of_schema({"type": "string", "format": "int32"}), SCHEMA, "Unknown format: int32"),
        (of_schema({"$ref": "http://localhost/x"}), SCHEMA, "'http://localhost/x' is not present"),
        (of_schema({"type": "kitten"}), SCHEMA, "Invalid type: kitten"),
        (of_schema({"enum": []}), SCHEMA, "anyOf is empty"),
        (of_schema({"type": "string", "pattern": "(?=a)"}), SCHEMA, "look-around"),
        (of_schema({"x-guidance": {"lenient": True}}), SCHEMA, "x-guidance"),
        (of_schema({"type": "object", "minProperties": 2}), SCHEMA, "minProperties 2; allowed is 1, or the numb"),
        (of_schema({"multipleOf": 99991}), SCHEMA, "it has 99991 as the product of multipleOf; allowed is up to 10000"),
        (of_schema({"multipleOf": 10**4300}), SCHEMA, "allowed is a JSON schema"),
        (of_schema({"examples": [{"multipleOf": 0}], "multipleOf": 99991}), SCHEMA, "99991 as the product"),
        (of_schema({"allOf": [{"multipleOf": -9973}, {"multipleOf": 9967}]}), SCHEMA, "99400891 as the product"),
        (of_schema({"multipleOf": True}), SCHEMA, "allowed is the keywords"),
        (of_schema({"type": "object", "minProperties": 2, "required": 5}), SCHEMA, "minProperties 2"),
        (of_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), SCHEMA, "is not supported"),
        (of_schema(nested(70)), SCHEMA, "nested too deep; allowed is 64 lists and objects"),
        (of_schema({"enum": [*words(1001)]}), SCHEMA, "1001 values of enum; allowed is up to 1000"),
        (of_schema({"properties": {word: {} for word in words(501)}}), SCHEMA, "501 properties; allowed is up to 500"),
        (of_schema({"title": 70000 * "a"}), SCHEMA, "characters; allowed is up to 65536"),
        (of_schema({"pattern": 5000 * "a"}), SCHEMA, "5000 characters of pattern; allowed is up to 4096"),
        (of_schema({"const": "\ud800"}), SCHEMA, "allowed is a JSON schema"),
        ({"guided_json": "{"}, "guided_json", "'{' is not allowed: give a JSON schema"),
        ({"guided_json": "[]"}, "guided_json", "which is an object"),
        ({"guided_json": '{"minimum": NaN}'}, "guided_json", "allowed is a JSON schema"),
        ({"guided_json": "[" * 60000}, "guided_json", "give a JSON schema"),
        ({"guided_regex": "(a"}, "guided_regex", "allowed is the syntax of Rust's regex"),
        ({"guided_regex": r"\w*\d*" * 1000}, "guided_regex", "6000 characters; allowed is up to 4096"),
        ({"guided_regex": r"\w*\d*" * 680}, "guided_regex", "lexer"),
        ({"guided_choice": []}, "guided_choice", "[] is not allowed: give 1 to 1000 texts"),
        ({"guided_grammar": "hm"}, "guided_grammar", "allowed is Lark or GBNF"),
        ({"guided_grammar": "root ::= " + 4000 * "(" + '"a"' + 4000 * ")"}, "guided_grammar", "Lark or GBNF"),
        ({"guided_grammar": "start: " + 4000 * "(" + '"a"' + 4000 * ")"}, "guided_grammar", "deeply nested"),
        ({"guided_grammar": 'start: %json {"multipleOf": 99991}'}, "guided_grammar", "%json"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "is not allowed beside guided_json"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex",
         "is not allowed beside response_format"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "give one of json,"),
        ({"response_format": {"type": "json_schema"}}, SCHEMA, "null is not allowed: give a JSON schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schem": {}}}}, SCHEMA, "give a JSON schema"),
        (of_schema({"oneOf": [{"const": 1}, {"const": 2}]}), SCHEMA, "oneOf constraints are not supported; allowed"),
    ],
)  # fmt: skip
def test_form_that_cannot_be_kept_is_refused_soon_and_named(
    compiler: GrammarCompiler, fields: dict[str, Any], param: str, told: str
) -> None:
    started_s = time.perf_counter()
    with pytest.raises(InvalidRequest) as raised:
        asked(compiler, fields)
    assert raised.value.param == param
    assert told in raised.value.message
    assert len(raised.value.message) < 1000
    assert time.perf_counter() - started_s < 5


def test_grammar_that_takes_too_long_to_prepare_is_refused(
    embedded_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(embedded_tokenizer, VOCAB_SIZE)
    monkeypatch.setattr(response_format, "COMPILE_S", 0.05)
    monkeypatch.setattr(grammars, "compiled", lambda grammar: time.sleep(0.5))
    with pytest.raises(InvalidRequest, match="takes longer than"):
        asked(GrammarCompiler(grammars), {"guided_regex": "a"})


def test_waiting_for_the_grammars_of_others_takes_no_grammar_too_long(
    embedded_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(embedded_tokenizer, VOCAB_SIZE)
    monkeypatch.setattr(response_format, "COMPILE_S", 0.5)
    monkeypatch.setattr(grammars, "compiled", lambda grammar: time.sleep(0.2))
    compiler = GrammarCompiler(grammars)

    async def make_together() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(compiler.make, lambda: "grammar", "field", "others")

    anyio.run(make_together)


def test_both_endpoints_pass_the_grammar_on(site: Site) -> None:
    site.chat(response_format={"type": "json_object"})
    body = {"model": site.engine.info.model_id, "prompt": "hi", "guided_regex": "a"}
    site.http.post("/v1/completions", json=body)
    chat, plain = (request.grammar for request in site.engine.requests)
    assert chat is not None
    assert json.loads(chat)["grammars"][0]["json_schema"]["type"] == "object"
    assert plain == LLMatcher.grammar_from_regex("a")


def test_refusal_over_http_names_the_field(site: Site) -> None:
    response = site.chat(**of_schema({"not": {}}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == SCHEMA
    assert site.chat(response_format={"type": "xml"}).json()["error"]["param"] == "response_format.type"
