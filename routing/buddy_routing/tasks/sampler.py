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
    weights: Mapping[str, float] | None = None,
) -> Iterator[Task]:
    """`count` tasks, the same for the same arguments; levels are equally likely.

    `weights` gives the relative frequency of each of `families`; a family it leaves out counts as 1.

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
    weights = weights or {}
    for family, weight in weights.items():
        _check_one_of("weights for family", family, families)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight of {family!r} is {weight}; it must be 0 or more and finite")
    family_weights = [weights.get(family, 1.0) for family in families]
    if not any(family_weights):
        raise ValueError(f"weights {dict(weights)!r} are all 0; at least one must be above 0")
    return _draw(seed, count, split, families, family_weights)


def _draw(seed: int, count: int, split: Split, families: Sequence[str], weights: Sequence[float]) -> Iterator[Task]:
    rng = random.Random(f"{seed}:{split}")
    for _ in range(count):
        family = rng.choices(families, weights)[0]
        yield generate(family, rng.choice(LEVELS), rng, split)


def _check_one_of(what: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; allowed: {', '.join(str(item) for item in allowed)}")
