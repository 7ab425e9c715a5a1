"""One- and two-step stories about everyday amounts, answered with the working and a closing sentence."""

import random
from dataclasses import dataclass
from functools import partial

from buddy_routing.tasks.arithmetic import worked_out
from buddy_routing.tasks.phrasing import type_casually
from buddy_routing.tasks.task import Builders, Problem
from buddy_routing.tasks.vocabulary import NAMES, THINGS, plural


@dataclass(frozen=True, slots=True)
class _Story:
    """A story template and the sentence that states its result {r}; {a}, {b}, {c} are the amounts."""

    text: str
    result: str


_HAS = "{name} has {r} {things}."
_HAS_LEFT = "{name} has {r} {things} left."
_ADD = (
    _Story(
        "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
        _HAS,
    ),
    _Story("{name} had {a} {things} and bought {b} more. How many {things} does {name} have?", _HAS),
    _Story(
        "{name} finds {a} {things} in the morning and {b} {things} at night. How many {things} does {name} have?",
        _HAS,
    ),
    _Story(
        "{name} has {a} {things}. {other} has {b} {things}. How many do they have together?",
        "They have {r} {things}.",
    ),
    _Story(
        "{name} has {a} {things} and {other} has {b}. How many {things} are there in all?",
        "There are {r} {things}.",
    ),
    _Story(
        "There are {a} {things} on the table. {name} puts {b} more there. How many {things} are on the table?",
        "There are {r} {things}.",
    ),
    _Story(
        "A box holds {a} {things}. {name} adds {b} {things}. How many {things} are in it now?",
        "There are {r} {things}.",
    ),
    _Story(
        "{a} people are on a bus. {b} more get on. How many people are on the bus?",
        "There are {r} people on the bus.",
    ),
    _Story(
        "{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages is that?",
        "{name} read {r} pages.",
    ),
    _Story(
        "{name} saved {a} coins. Then {name} got {b} coins from {other}. How many coins does {name} have?",
        "{name} has {r} coins.",
    ),
)
_SUBTRACT = (
    _Story("{name} has {a} {things}. {name} gives {b} to {other}. How many {things} are left?", _HAS_LEFT),
    _Story("{name} had {a} {things} and lost {b}. How many {things} does {name} have left?", _HAS_LEFT),
    _Story(
        "{name} has {a} {things} and gives away {b} of them. How many {things} does {name} still have?",
        _HAS_LEFT,
    ),
    _Story(
        "There were {a} {things} in the box. {name} took {b}. How many {things} are left?",
        "There are {r} {things} left.",
    ),
    _Story(
        "A shop has {a} {things}. It sells {b} of them. How many {things} are left?",
        "There are {r} {things} left.",
    ),
    _Story(
        "There are {a} people on a bus. {b} get off. How many people are still on the bus?",
        "There are {r} people on the bus.",
    ),
    _Story(
        "A book has {a} pages. {name} has read {b} pages. How many pages are left?",
        "There are {r} pages left.",
    ),
    _Story("{name} has {a} dollars and spends {b}. How many dollars are left?", "{name} has {r} dollars left."),
    _Story(
        "{name} has {a} {things}. {other} has {b} {things}. How many more does {name} have?",
        "{name} has {r} more {things}.",
    ),
    _Story("There are {a} birds in a tree. {b} fly away. How many birds are left?", "There are {r} birds left."),
)
_MULTIPLY = (
    _Story(
        "{name} has {a} bags with {b} {things} in each. How many {things} are there?",
        "There are {r} {things}.",
    ),
    _Story(
        "There are {a} boxes. Each box has {b} {things}. How many {things} are there in all?",
        "There are {r} {things}.",
    ),
    _Story("{name} buys {a} packs of {b} {things}. How many {things} does {name} have?", _HAS),
    _Story(
        "{name} reads {b} pages a day for {a} days. How many pages does {name} read?",
        "{name} reads {r} pages.",
    ),
    _Story(
        "One ticket costs {b} dollars. {name} buys {a} tickets. How many dollars does {name} pay?",
        "{name} pays {r} dollars.",
    ),
    _Story(
        "{a} children have {b} {things} each. How many {things} do they have together?",
        "They have {r} {things}.",
    ),
    _Story("{name} saves {b} coins each week. How many coins is that after {a} weeks?", "{name} has {r} coins."),
)
_SHARE = (
    _Story(
        "{name} shares {a} {things} among {b} friends. How many {things} does each friend get?",
        "Each friend gets {r} {things}.",
    ),
    _Story(
        "{a} {things} are put into {b} boxes, the same number in each. How many are in one box?",
        "Each box has {r} {things}.",
    ),
    _Story(
        "{b} children share {a} {things} equally. How many {things} does each child get?",
        "Each child gets {r} {things}.",
    ),
    _Story(
        "{name} puts {a} {things} into {b} equal rows. How many {things} are in a row?",
        "Each row has {r} {things}.",
    ),
)
_ADD_SUBTRACT = (
    _Story(
        "{name} has {a} {things}, gets {b} more and then gives {c} away. How many {things} are left?",
        _HAS_LEFT,
    ),
    _Story(
        "{name} had {a} {things}. {name} bought {b} more and then lost {c}. How many {things} does {name} have?",
        _HAS,
    ),
    _Story(
        "{a} people are on a bus. {b} get on and {c} get off. How many people are on the bus now?",
        "There are {r} people on the bus.",
    ),
    _Story(
        "{name} picks {a} {things}. {other} picks {b}. They give {c} away. How many {things} do they have?",
        "They have {r} {things}.",
    ),
    _Story(
        "A shop has {a} {things}. It gets {b} more and sells {c}. How many {things} are left?",
        "There are {r} {things} left.",
    ),
    _Story(
        "{name} has {a} coins and earns {b} coins. Then {name} spends {c} coins. How many coins are left?",
        "{name} has {r} coins left.",
    ),
)
_MULTIPLY_ADD = (
    _Story("{name} has {a} bags of {b} {things} and {c} more {things}. How many {things} is that?", _HAS),
    _Story(
        "There are {a} boxes with {b} {things} each. {name} adds {c} {things}. How many {things} are there?",
        "There are {r} {things}.",
    ),
    _Story(
        "{name} buys {a} packs of {b} {things}. {other} gives {name} {c} more. How many {things} does {name} have?",
        _HAS,
    ),
    _Story(
        "{name} reads {b} pages a day for {a} days and then {c} pages more. How many pages is that?",
        "{name} reads {r} pages.",
    ),
)
_MULTIPLY_SUBTRACT = (
    _Story("{name} buys {a} packs of {b} {things} and gives {c} away. How many {things} are left?", _HAS_LEFT),
    _Story(
        "There are {a} boxes with {b} {things} each. {name} takes {c} {things}. How many are left?",
        "There are {r} {things} left.",
    ),
    _Story(
        "{name} has {a} bags of {b} {things}. {name} loses {c} {things}. How many {things} are left?",
        _HAS_LEFT,
    ),
)
_OPENINGS = ("",) * 12 + (
    "Please solve this: ",
    "Help me with this: ",
    "Here is a puzzle. ",
    "Solve this problem: ",
)


def _tell(rng: random.Random, story: _Story, working: str, result: int, key: str, **amounts: int) -> Problem:
    name, other = rng.sample(NAMES, 2)
    things = plural(rng.choice(THINGS))
    text = story.text.format(name=name, other=other, things=things, **amounts)
    prompt = rng.choice(_OPENINGS) + text
    if rng.random() < 0.3:
        prompt = type_casually(rng, prompt, may_lower=not prompt.startswith(name))
    closing = story.result.format(name=name, things=things, r=result)
    return Problem(prompt, f"{working}. {closing}", str(result), key)


def _add(rng: random.Random, highest: int) -> Problem:
    a, b = rng.randint(2, highest), rng.randint(2, highest)
    key = f"story-add:{max(a, b)}:{min(a, b)}"
    return _tell(rng, rng.choice(_ADD), worked_out(a, "+", b), a + b, key, a=a, b=b)


def _subtract(rng: random.Random, highest: int) -> Problem:
    b, result = rng.randint(2, highest // 2), rng.randint(2, highest // 2)
    a = b + result
    return _tell(rng, rng.choice(_SUBTRACT), worked_out(a, "-", b), result, f"story-sub:{a}:{b}", a=a, b=b)


def _multiply(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 9), rng.randint(2, 12)
    key = f"story-mul:{max(a, b)}:{min(a, b)}"
    return _tell(rng, rng.choice(_MULTIPLY), worked_out(a, "x", b), a * b, key, a=a, b=b)


def _share(rng: random.Random) -> Problem:
    b, result = rng.randint(2, 9), rng.randint(2, 12)
    a = b * result
    return _tell(rng, rng.choice(_SHARE), worked_out(a, "/", b), result, f"story-div:{a}:{b}", a=a, b=b)


def _add_subtract(rng: random.Random) -> Problem:
    a, b = rng.randint(3, 20), rng.randint(2, 9)
    c = rng.randint(2, min(9, a + b - 2))
    result = a + b - c
    working = f"{worked_out(a, '+', b)}. {worked_out(a + b, '-', c)}"
    return _tell(rng, rng.choice(_ADD_SUBTRACT), working, result, f"story-add-sub:{a}:{b}:{c}", a=a, b=b, c=c)


def _multiply_then(rng: random.Random, adds: bool) -> Problem:
    a, b, c = rng.randint(2, 9), rng.randint(3, 10), rng.randint(2, 4)
    result = a * b + c if adds else a * b - c
    working = f"{worked_out(a, 'x', b)}. {worked_out(a * b, '+' if adds else '-', c)}"
    story = rng.choice(_MULTIPLY_ADD if adds else _MULTIPLY_SUBTRACT)
    return _tell(rng, story, working, result, f"story-mul-{'add' if adds else 'sub'}:{a}:{b}:{c}", a=a, b=b, c=c)


BUILDERS: Builders = {
    1: (partial(_add, highest=12), partial(_subtract, highest=30)),
    2: (partial(_add, highest=30), partial(_subtract, highest=60), _multiply, _share),
    3: (_add_subtract, partial(_multiply_then, adds=True), partial(_multiply_then, adds=False)),
}
