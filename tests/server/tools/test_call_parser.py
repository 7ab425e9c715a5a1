"""Calls are found in answers of every family, however the answers are cut, and nothing of an answer is lost."""

import random
import time

import pytest

from buddy_server.tools.call_parser import CallParser
from buddy_server.tools.pieces import Piece, TextPiece
from buddy_server.tools.syntax import HERMES, LLAMA3, MISTRAL, PLAIN, Syntax

Parsed = list[str | tuple[str, str]]
"""Texts, and calls as name and arguments."""

ARGUMENTS = '{"a": "x}\\"<tool_call>", "b": [1, {"c": "\\\\"}]}'
FLY, NOW = f'{{"name": "fly", "arguments": {ARGUMENTS}}}', '{"name": "now", "arguments": {}}'

ANSWERS: list[tuple[Syntax, str, Parsed]] = [
    (HERMES, "", []),
    (HERMES, "   ", ["   "]),
    (HERMES, "It is so.\n", ["It is so.\n"]),
    (HERMES, f"<tool_call>\n{FLY}\n</tool_call>", [("fly", ARGUMENTS)]),
    (
        HERMES,
        f"I fly.\n\n<tool_call>\n{FLY}\n</tool_call>\n<tool_call>\n{NOW}\n</tool_call>\n",
        ["I fly.", ("fly", ARGUMENTS), ("now", "{}")],
    ),
    (HERMES, f"<tool_call>{FLY}</tool_call>\n And so\non.", [("fly", ARGUMENTS), "And so\non."]),
    # The order of Hermes 2, and keys of other formats.
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "fly"}</tool_call>', [("fly", '{"x": 1}')]),
    (HERMES, '<tool_call>{"id": "c1", "type": "function", "name": "fly", "parameters": {}}', [("fly", "{}")]),
    (HERMES, '<tool_call>\n{"name": "now"}\n</tool_call>', [("now", "{}")]),
    # A function that the model invented: its client can answer.
    (HERMES, '<tool_call>\n{"name": "swim", "arguments": {}}\n</tool_call>', [("swim", "{}")]),
    # Brackets missing, or too many; no end of the marker.
    (HERMES, f"<tool_call>\n{FLY}}}}}\n</tool_call>", [("fly", ARGUMENTS)]),
    (HERMES, f"<tool_call>\n{FLY[:-1]}\n</tool_call>", [("fly", ARGUMENTS)]),
    (HERMES, f"<tool_call>\n{FLY}\n<tool_call>\n{NOW}", [("fly", ARGUMENTS), ("now", "{}")]),
    # Cut off.
    (HERMES, "so <tool_", ["so <tool_"]),
    (HERMES, '<tool_call>\n{"name": "fl', ['<tool_call>\n{"name": "fl']),
    (HERMES, '<tool_call>\n{"name": "fly", "arguments": {"a": [1', [("fly", '{"a": [1')]),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "na', ['<tool_call>{"arguments": {"x": 1}, "na']),
    # Malformed.
    (HERMES, "a <tool_call> b </tool_call> c", ["a <tool_call> b </tool_call> c"]),
    (HERMES, f"<tool_call> <tool_call>{NOW}", ["<tool_call>", ("now", "{}")]),
    (HERMES, '<tool_call>{"name": "fly", "arguments": 3} ', ['<tool_call>{"name": "fly", "arguments": 3} ']),
    (HERMES, '<tool_call>{"name": "fly\\n", "arguments": {}', ['<tool_call>{"name": "fly\\n", "arguments": {}']),
    (HERMES, '<tool_call>{"name": "fly", "arguments": {\'a\': 1}}', [("fly", "{'a': 1}")]),
    (HERMES, f"<tool_call>{NOW} so </tool_call>", [("now", "{}"), "so </tool_call>"]),
    (LLAMA3, '{"name": "fly", "parameters": {"a": 1}}', [("fly", '{"a": 1}')]),
    (LLAMA3, '\n{"type": "function", "name": "fly", "parameters": {}}', [("fly", "{}")]),
    (LLAMA3, '{"name": "fly", "parameters": {}}; {"name": "now"}', [("fly", "{}"), ("now", "{}")]),
    (LLAMA3, 'so <|python_tag|>{"name": "swim", "parameters": {}}', ["so", ("swim", "{}")]),
    (LLAMA3, '{"name": "Max", "age": 3}', ['{"name": "Max", "age": 3}']),
    (LLAMA3, '{"name": "swim", "parameters": {}}', ['{"name": "swim", "parameters": {}}']),
    (LLAMA3, '{"parameters": {}, "name": "swim"} so', ['{"parameters": {}, "name": "swim"} so']),
    (LLAMA3, 'so {"name": "fly", "parameters": {}}', ['so {"name": "fly", "parameters": {}}']),
    (LLAMA3, "<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    (LLAMA3, '{"name": "fly", "parameters": {}}; so', [("fly", "{}"), "; so"]),
    (MISTRAL, f"[TOOL_CALLS] [{FLY}]", [("fly", ARGUMENTS)]),
    (
        MISTRAL,
        f'So. [TOOL_CALLS][{FLY[:-1]}, "id": "abcdefghi"}}, {NOW}]',
        ["So.", ("fly", ARGUMENTS), ("now", "{}")],
    ),
    (
        MISTRAL,
        f"[TOOL_CALLS]fly[ARGS]{ARGUMENTS}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{{}}",
        [("fly", ARGUMENTS), ("now", "{}")],
    ),
    (MISTRAL, "[TOOL_CALLS] no", ["[TOOL_CALLS] no"]),
    (MISTRAL, f"[TOOL_CALLS] [{NOW}, 3]", [("now", "{}"), ", 3]"]),
    (PLAIN, f"{FLY}\n{NOW}", [("fly", ARGUMENTS), ("now", "{}")]),
    (PLAIN, f"{NOW} so", [("now", "{}"), "so"]),
    (PLAIN, "so", ["so"]),
]  # fmt: skip


def parsed(syntax: Syntax, parts: list[str], only_calls: bool = False) -> Parsed:
    parser = CallParser(syntax, {"fly", "now"}, only_calls)
    pieces: list[Piece] = [piece for part in parts for piece in parser.add(part)]
    merged: Parsed = []
    for piece in [*pieces, *parser.finish()]:
        last = merged[-1] if merged else None
        if isinstance(piece, TextPiece):
            merged[len(merged) - isinstance(last, str) :] = [(last if isinstance(last, str) else "") + piece.text]
        elif piece.name is not None:
            merged.append((piece.name, piece.arguments))
        else:
            assert isinstance(last, tuple)
            merged[-1] = (last[0], last[1] + piece.arguments)
    return merged


@pytest.mark.parametrize("syntax", [HERMES, LLAMA3, MISTRAL, PLAIN])
def test_a_call_that_is_cut_off_is_no_text_where_there_can_be_calls_only(syntax: Syntax) -> None:
    whole = f"{syntax.marker}{FLY}"
    for cut in range(len(whole)):
        assert not any(isinstance(piece, str) for piece in parsed(syntax, [whole[:cut]], only_calls=True))
    assert parsed(syntax, [f"{whole}\n{FLY[:5]}"], only_calls=True) == [("fly", ARGUMENTS)]


@pytest.mark.parametrize(("syntax", "answer", "expected"), ANSWERS)
def test_calls_and_texts_are_the_same_however_an_answer_is_cut(syntax: Syntax, answer: str, expected: Parsed) -> None:
    assert parsed(syntax, [answer]) == expected
    assert parsed(syntax, list(answer)) == expected
    for cut in range(len(answer)):
        assert parsed(syntax, [answer[:cut], "", answer[cut:]]) == expected


@pytest.mark.parametrize("syntax", [HERMES, LLAMA3, MISTRAL, PLAIN])
def test_answers_made_of_scraps_of_calls_are_parsed_alike_however_cut(syntax: Syntax) -> None:
    rng = random.Random(0)
    scraps = [
        *("{", "}", "[", "]", ",", ":", '"', "\\", " ", "\n", ";", "x", '"name": "fly"', '"arguments": {', "fly"),
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", FLY, NOW, "{}"),
    ]
    for _ in range(1000):
        answer = "".join(rng.choices(scraps, k=rng.randint(1, 12)))
        whole = parsed(syntax, [answer])
        cuts = sorted(rng.choices(range(len(answer) + 1), k=5))
        assert parsed(syntax, [answer[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]) == whole
        # Texts arrive in order, and whole if there is no call among them.
        texts = [part for part in whole if isinstance(part, str)]
        rest = iter(answer)
        assert all(char in rest for char in "".join(texts))
        assert len(texts) < len(whole) or "".join(texts) == answer


def test_text_and_arguments_are_not_held_back() -> None:
    parser = CallParser(HERMES, {"fly"})
    assert parser.add("So, 1 <") == [TextPiece("So, 1")]
    assert parser.add(" 2 ") == [TextPiece(" < 2")]
    parser.add('<tool_call>\n{"name": "fly", "arguments": {"to": "the ')
    [piece] = parser.add("cat")
    assert not isinstance(piece, TextPiece)
    assert (piece.index, piece.name, piece.arguments) == (0, None, "cat")


def test_white_space_without_end_is_passed_on() -> None:
    parser = CallParser(LLAMA3, {"fly"})
    texts = [piece for _ in range(1000) for piece in parser.add("\n\n")]
    assert len(texts) > 900


def test_scraps_of_calls_without_end_take_time_in_proportion() -> None:
    answer = '<tool_call>{"arguments": {' * 5000
    started_s = time.perf_counter()
    assert parsed(HERMES, [answer]) == [answer]
    assert time.perf_counter() - started_s < 1
