"""Draws tasks by family, level, seed and split."""

import random
from collections.abc import Iterator, Mapping, Sequence

from buddy_routing.tasks import (
    arithmetic,
    chat,
    comparison,
    conversion,
    counting,
    dates,
    facts,
    sorting,
    strings,
    word_problems,
)
from buddy_routing.tasks.task import LEVELS, SPLITS, Builders, Split, Task, split_of

_BUILDERS: Mapping[str, Builders] = {
    "arithmetic": arithmetic.BUILDERS,
    "comparison": comparison.BUILDERS,
    "sorting": sorting.BUILDERS,
    "counting": counting.BUILDERS,
    "strings": strings.BUILDERS,
    "conversion": conversion.BUILDERS,
    "dates": dates.BUILDERS,
    "word_problems": word_problems.BUILDERS,
    "facts": facts.BUILDERS,
    "chat": chat.BUILDERS,
}

FAMILIES: tuple[str, ...] = tuple(_BUILDERS)


def generate(family: str, level: int, rng: random.Random, split: Split = "train") -> Task:
    """One task. The kind of problem is drawn anew until the problem's key falls into `split`.

    Raises:
        ValueError: the family, level or split is unknown.
    """
    _check_one_of("family", family, FAMILIES)
    _check_one_of("level", level, LEVELS)
    _check_one_of("split", split, SPLITS)
    builders = _BUILDERS[family][level]
    while True:
        problem = rng.choice(builders)(rng)
        if split_of(problem.key) == split:
            return Task(family, level, problem.prompt, problem.reply, problem.answer, problem.key)


def sample_tasks(
    seed: int,
    count: int,
    split: Split = "train",
    families: Sequence[str] = FAMILIES,
) -> Iterator[Task]:
    """`count` tasks, the same for the same arguments; `families` and levels are equally likely.

    Raises:
        ValueError: an argument is unknown or out of range; raised by the call, before any task is drawn.
    """
    if count < 0:
        raise ValueError(f"count is {count}; it must be 0 or more")
    if not families:
        raise ValueError(f"families is empty; allowed: {', '.join(FAMILIES)}")
    for family in families:
        _check_one_of("family", family, FAMILIES)
    _check_one_of("split", split, SPLITS)
    return _draw(seed, count, split, families)


def _draw(seed: int, count: int, split: Split, families: Sequence[str]) -> Iterator[Task]:
    rng = random.Random(f"{seed}:{split}")
    for _ in range(count):
        yield generate(rng.choice(families), rng.choice(LEVELS), rng, split)


def _check_one_of(what: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; allowed: {', '.join(str(item) for item in allowed)}")
