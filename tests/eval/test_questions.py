"""Questions of a user's file: what is right, and what is wrong with the file."""

import json
from pathlib import Path

import pytest

from buddy_server.eval.questions import QuestionError, ends_with_answer, questions_from_file
from buddy_server.tokenizer import ChatTokenizer
from fakes.tokenizer import build_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer.from_directory(build_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("The answer is 12.", "12", True),
        ("It is Paris!", "paris", True),
        ("12 or 13", "12", False),
        ("112", "12", False),
        ("New York", "york", True),
        ("", "", False),
    ],
)
def test_reply_is_right_when_it_ends_with_the_answer(reply: str, answer: str, right: bool) -> None:
    assert ends_with_answer(reply, answer) == right


def test_questions_are_drawn_by_the_seed_and_keep_their_tasks(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{"task": f"t{n % 2}", "prompt": "hi", "answer": str(n)} for n in range(10)]
    rows.append({"prompt": "be", "choices": ["a", "bird"], "answer": 1})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    everything = questions_from_file(path, 100, 0, tokenizer)
    assert [question.task for question in everything] == ["t0", "t1"] * 5 + ["mine"]
    assert everything[-1].choices == ("a", "bird")
    assert (everything[-1].is_right("bird"), everything[-1].is_right("a")) == (True, False)
    some = questions_from_file(path, 4, 1, tokenizer)
    again = questions_from_file(path, 4, 1, tokenizer)
    assert [question.reference for question in some] == [question.reference for question in again]
    assert len({question.reference for question in some}) == 4


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nonsense", "line 1: not JSON"),
        ('{"answer": "12"}', "line 1: has no prompt"),
        ('{"prompt": "hi", "answer": 12}', "line 1: the answer is not a text"),
        ('{"prompt": "hi", "choices": ["a"], "answer": 0}', "two or more"),
        ('{"prompt": "hi", "choices": ["a", "b"], "answer": 2}', "the answer is 2, allowed is an index of 0 to 1"),
    ],
)
def test_a_bad_line_is_named(line: str, told: str, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(line)
    with pytest.raises(QuestionError) as caught:
        questions_from_file(path, 10, 0, tokenizer)
    assert told in str(caught.value)
