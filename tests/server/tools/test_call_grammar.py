"""Grammars allow exactly the calls that the tools allow, as the matcher sees it that the engine uses."""

from functools import cache
from typing import Any

import llguidance
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from buddy_routing.embedded import embedded_model
from buddy_server.tools.call_grammar import call_grammar
from buddy_server.tools.choice import Function, ToolChoice
from buddy_server.tools.syntax import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PLAIN, Syntax
from fakes.families import FAMILIES

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"to": {"$ref": "#/$defs/place"}, "n": {"type": "integer"}},
    "required": ["to"],
    "$defs": {"place": {"type": "string"}},
}
FUNCTIONS = (Function("fly", SCHEMA), Function("now"))

FLY, NOW = '{"name": "fly", "arguments": {"to": "a }}", "n": 3}}', '{"name": "now", "arguments": {}}'
WRONG = [
    FLY.replace("fly", "flee"),
    FLY.replace("3", '"3"'),
    FLY.replace('"to": "a }}", ', ""),
    FLY.replace('"n"', '"m"'),
    NOW.replace("{}", '{"a": 1}'),
    NOW.replace("{}", "{}}"),
    FLY.replace(": 3", ":  3"),
]


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def llama(*calls: str) -> str:
    return "; ".join(calls).replace("arguments", "parameters")


def mistral(*calls: str) -> str:
    return f"[TOOL_CALLS] [{', '.join(calls)}]"


def mistral_args(*calls: str) -> str:
    return "".join(f"[TOOL_CALLS]{call[10:13]}[ARGS]{call.split(': ', 2)[2][:-1]}" for call in calls)


def plain(*calls: str) -> str:
    return "\n".join(calls)


CASES = [
    (family, syntax, write)
    for family in ("qwen3", "llama3", "embedded")
    for syntax, write in ((HERMES, hermes), (LLAMA3, llama), (MISTRAL, mistral), (PLAIN, plain))
] + [("mistral", MISTRAL, mistral), ("mistral", MISTRAL_ARGS, mistral_args)]


@cache
def loaded(family: str) -> tuple[PreTrainedTokenizerBase, llguidance.LLTokenizer]:
    published = AutoTokenizer.from_pretrained(embedded_model()) if family == "embedded" else FAMILIES[family]()
    return published, llguidance.LLTokenizer(published.backend_tokenizer.to_str())


def allows(family: str, syntax: Syntax, choice: ToolChoice, answer: str, text_grammar: str | None = None) -> bool:
    published, tokenizer = loaded(family)
    vocabulary = published.get_vocab()
    markers = {marker: vocabulary[marker] for marker in syntax.markers if marker in vocabulary}
    matcher = llguidance.LLMatcher(tokenizer, call_grammar(syntax, choice, markers, text_grammar))
    assert not matcher.is_error(), matcher.get_error()
    tokens = published.encode(answer, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(("family", "syntax", "write"), CASES)
def test_an_answer_that_must_call_is_valid_calls_and_nothing_else(family: str, syntax: Syntax, write: Any) -> None:
    choice = ToolChoice(FUNCTIONS, must_call=True)
    assert allows(family, syntax, choice, write(FLY))
    assert allows(family, syntax, choice, write(NOW))
    assert allows(family, syntax, choice, write(NOW, FLY, NOW)) == (syntax.max_calls > 2)
    for wrong in ("", "so", "so " + write(NOW), write(NOW) + " so", *map(write, WRONG)):
        assert not allows(family, syntax, choice, wrong), wrong


@pytest.mark.parametrize(("family", "syntax", "write"), CASES)
def test_an_answer_that_may_call_is_text_or_valid_calls(family: str, syntax: Syntax, write: Any) -> None:
    choice = ToolChoice(FUNCTIONS)
    for right in ("", "so {[< \n", write(FLY)):
        assert allows(family, syntax, choice, right), right
    if not syntax.may_be_bare:
        assert allows(family, syntax, choice, "so\n" + write(FLY))
        assert not allows(family, syntax, choice, "so " + write(WRONG[0]))
    for wrong in map(write, WRONG):
        assert not allows(family, syntax, choice, wrong), wrong


@pytest.mark.parametrize(("family", "syntax"), [case[:2] for case in CASES if case[1].marker and case[0] != "mistral"])
def test_a_marker_spelled_in_other_tokens_does_not_free_a_call_of_its_grammar(family: str, syntax: Syntax) -> None:
    published, tokenizer = loaded(family)
    vocabulary = published.get_vocab()
    markers = {marker: vocabulary[marker] for marker in syntax.markers if marker in vocabulary}
    answer = f'so {syntax.marker}[{{"name": "fly", "arguments": {{"n": 3}}}}'
    tokens = [token for char in answer for token in published.encode(char, add_special_tokens=False)]
    matcher = llguidance.LLMatcher(tokenizer, call_grammar(syntax, ToolChoice(FUNCTIONS), markers))
    assert matcher.try_consume_tokens(tokens) < len(tokens)


@pytest.mark.parametrize(("family", "syntax", "write"), CASES)
@pytest.mark.parametrize("must_call", [True, False])
def test_a_single_call_is_a_single_one(family: str, syntax: Syntax, write: Any, must_call: bool) -> None:
    choice = ToolChoice(FUNCTIONS, must_call, max_calls=1)
    assert allows(family, syntax, choice, write(FLY))
    assert not allows(family, syntax, choice, write(FLY, FLY))


def test_only_chosen_functions_may_be_called() -> None:
    choice = ToolChoice(FUNCTIONS[:1], must_call=True, max_calls=1)
    assert allows("embedded", PLAIN, choice, FLY)
    assert not allows("embedded", PLAIN, choice, NOW)


@pytest.mark.parametrize(
    ("family", "syntax", "write"), [case for case in CASES if case[1].marker and case[0] != "mistral"]
)
def test_text_beside_calls_keeps_to_its_own_grammar(family: str, syntax: Syntax, write: Any) -> None:
    text_grammar = llguidance.LLMatcher.grammar_from_json_schema({"properties": {"to": {"type": "integer"}}})
    marker = syntax.marker if syntax.may_be_bare else ""
    for answer, is_allowed in (
        ('{"to": 3}', True),
        ('{"to": "', False),
        (marker + write(FLY), True),
        (marker + write(WRONG[0]), False),
    ):
        assert allows(family, syntax, ToolChoice(FUNCTIONS), answer, text_grammar) == is_allowed, answer
    must_call = ToolChoice(FUNCTIONS, must_call=True)
    assert allows(family, syntax, must_call, write(FLY), text_grammar)
    assert not allows(family, syntax, must_call, '{"to": 3}', text_grammar)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "integer"}, ("3", "-9007199254740991"), ("9007199254740992", "1" * 30)),
        ({"type": "number"}, ("0.1", "-3"), ("9007199254740993", "1e400")),
        ({"type": ["integer", "null"]}, ("3", "null"), ("1" * 30,)),
        ({"type": "integer", "exclusiveMinimum": 3}, ("4",), ("3", "1" * 30)),
        ({"type": "integer", "minimum": 10**17}, ("100000000000000000",), ("3",)),
        ({"type": "array", "items": {"anyOf": [{"type": "integer"}]}}, ("[1, 2]",), (f"[{'1' * 30}]",)),
        ({"enum": [{"type": "integer"}]}, ('{"type": "integer"}',), ("3",)),
    ],
)
def test_numbers_have_an_end(schema: dict[str, Any], right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    parameters = {"type": "object", "properties": {"n": schema}}
    choice = ToolChoice((Function("add", parameters),), must_call=True)
    for value, is_allowed in (*((value, True) for value in right), *((value, False) for value in wrong)):
        call = f'{{"name": "add", "arguments": {{"n": {value}}}}}'
        assert allows("embedded", PLAIN, choice, call) == is_allowed, value


def test_number_has_an_end_if_it_is_named_like_a_keyword_too() -> None:
    parameters = {"type": "object", "properties": {"default": {"type": "integer"}}, "required": ["default"]}
    choice = ToolChoice((Function("add", parameters),), must_call=True)
    for value, is_allowed in (("3", True), ("1" * 30, False)):
        call = f'{{"name": "add", "arguments": {{"default": {value}}}}}'
        assert allows("embedded", PLAIN, choice, call) == is_allowed


def test_of_a_function_that_is_not_strict_what_cannot_be_enforced_is_ignored() -> None:
    schema = SCHEMA | {"not": {"required": ["n"]}, "dependentRequired": {"n": ["to"]}}
    choice = ToolChoice((Function("fly", schema),), must_call=True)
    assert allows("embedded", PLAIN, choice, FLY)
    assert not allows("embedded", PLAIN, choice, WRONG[1])
    with pytest.raises(AssertionError, match="not"):
        allows("embedded", PLAIN, ToolChoice((Function("fly", schema, is_strict=True),), must_call=True), FLY)
