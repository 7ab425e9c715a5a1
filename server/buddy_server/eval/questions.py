"""Questions with checkable answers: the built-in tasks, or the user's own file."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy_routing.tasks import FAMILIES, Split, Task, is_correct, sample_tasks
from buddy_routing.train.example import Example
from buddy_server.tokenizer import ChatTokenizer

EXPECTED = (
    'expected {"task": ..., "prompt": ..., "answer": TEXT}, '
    'or {"task": ..., "prompt": ..., "choices": [TEXT, ...], "answer": INDEX}; "task" may be left out'
)


class QuestionError(ValueError):
    """Questions that cannot be used; the message names the value and what was expected."""


@dataclass(frozen=True, slots=True)
class Question:
    """`is_right` judges the generated answer, `reference` is a right answer. With `choices`, `is_right` judges the
    likeliest choice instead."""

    task: str
    prompt_tokens: tuple[int, ...]
    reference: str
    is_right: Callable[[str], bool]
    choices: tuple[str, ...] = ()


def builtin_questions(
    limit: int,
    seed: int,
    tokenizer: ChatTokenizer,
    split: Split = "heldout",
    families: Sequence[str] = FAMILIES,
) -> list[Question]:
    """`limit` tasks of a split, spread evenly over the `families`. Raises QuestionError for an unknown one."""
    if unknown := set(families) - set(FAMILIES):
        raise QuestionError(f"families {', '.join(sorted(unknown))} are unknown; allowed: {', '.join(FAMILIES)}")
    questions = []
    for index, family in enumerate(families):
        count = limit // len(families) + (index < limit % len(families))
        tasks = sample_tasks(seed, count, split=split, families=(family,))
        questions += [Question(family, _rendered(task.prompt, tokenizer), task.reply, _checker(task)) for task in tasks]
    return questions


def questions_from_file(path: Path, limit: int, seed: int, tokenizer: ChatTokenizer) -> list[Question]:
    """Up to `limit` questions of a JSONL file, drawn by the seed. Raises QuestionError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionError(f"{path} cannot be read: {error}") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise QuestionError(f"{path} holds no questions")
    drawn = sorted(random.Random(seed).sample(rows, min(limit, len(rows))))
    return [_question(line, f"{path} line {number}", path.stem, tokenizer) for number, line in drawn]


def _question(line: str, where: str, default_task: str, tokenizer: ChatTokenizer) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise QuestionError(f"{where}: not JSON ({error.msg}); {EXPECTED}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise QuestionError(f"{where}: has no prompt; {EXPECTED}")
    task, prompt = str(row.get("task", default_task)), _rendered(row["prompt"], tokenizer)
    if "choices" not in row:
        if not isinstance(row.get("answer"), str):
            raise QuestionError(f"{where}: the answer is not a text; {EXPECTED}")
        return Question(task, prompt, row["answer"], lambda reply: ends_with_answer(reply, row["answer"]))
    choices = _choices(row, where)
    right = choices[row["answer"]]
    return Question(task, prompt, right, lambda reply: reply == right, choices)


def _choices(row: dict[str, Any], where: str) -> tuple[str, ...]:
    choices, answer = row["choices"], row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise QuestionError(f"{where}: choices is not a list of two or more texts; {EXPECTED}")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise QuestionError(f"{where}: the answer is {answer!r}, allowed is an index of 0 to {len(choices) - 1}")
    return tuple(choices)


def ends_with_answer(reply: str, answer: str) -> bool:
    """Whether the reply's last words are the answer; case, spaces and closing punctuation are ignored."""
    said, wanted = _words(reply), _words(answer)
    return bool(wanted) and said[-len(wanted) :] == wanted


def _words(text: str) -> Sequence[str]:
    return re.sub(r"[.!?,;:\"'`]+(?=\s|$)", "", text.lower()).split()


def _rendered(prompt: str, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    return tokenizer.render([{"role": "user", "content": prompt}])


def _checker(task: Task) -> Callable[[str], bool]:
    return lambda reply: is_correct(task, reply)


def as_example(question: Question, tokenizer: ChatTokenizer, end_token: int) -> Example:
    """The question with its reference answer, for calibration or search."""
    answer = (*tokenizer.encode_text(question.reference), end_token)
    return Example((*question.prompt_tokens, *answer), len(question.prompt_tokens))
