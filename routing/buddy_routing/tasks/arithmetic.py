"""Sums, differences, products and exact quotients.

Sums and differences within 20, products to 12 x 12, their quotients, doubles and halves to 50 are tables, known by
heart and so split by phrasing. Sums and differences beyond them are worked out in columns, products and quotients in
tens and ones, and split by their numbers.
"""

import operator
import random
from functools import partial
from itertools import zip_longest

from buddy_routing.tasks.phrasing import Phrasings, ask_with_template
from buddy_routing.tasks.task import Builders, Problem
from buddy_routing.tasks.vocabulary import NUMBER_WORDS

_SYMBOLIC = {
    "+": ("{a} + {b}", "{a} + {b}", "{a}+{b}"),
    "-": ("{a} - {b}", "{a} - {b}", "{a}-{b}"),
    "x": ("{a} x {b}", "{a} * {b}", "{a}x{b}", "{a}*{b}"),
    "/": ("{a} / {b}", "{a} / {b}", "{a}/{b}"),
}
_SPOKEN = {
    "+": ("{a} plus {b}", "{a} plus {b}", "{a} and {b} added up"),
    "-": ("{a} minus {b}", "{a} minus {b}", "{a} take away {b}"),
    "x": ("{a} times {b}", "{a} times {b}", "{a} multiplied by {b}"),
    "/": ("{a} divided by {b}",),
}
_NOUN_PHRASE = {
    "+": "the sum of {a} and {b}",
    "-": "the difference between {a} and {b}",
    "x": "the product of {a} and {b}",
    "/": "{a} over {b}",
}
_ASK_NOUN_PHRASE = Phrasings(
    questions=("What is {e}?", "What's {e}?", "How much is {e}?", "Do you know {e}?", "I need to know {e}."),
    commands=("Work out {e}.", "Calculate {e}.", "Tell me {e}.", "Find {e}.", "Give me {e}."),
)
_ASK_EXPRESSION = Phrasings(
    questions=(
        "What is {e}?",
        "What's {e}?",
        "How much is {e}?",
        "What does {e} equal?",
        "Do you know what {e} is?",
        "I need to know what {e} is.",
        "What do you get for {e}?",
        "What is the answer to {e}?",
        "What is the result of {e}?",
    ),
    commands=(
        "Work out {e}.",
        "Calculate {e}.",
        "Tell me what {e} is.",
        "Solve {e}.",
        "Compute {e}.",
        "Give me the answer to {e}.",
    ),
)
_ASK_SYMBOLIC = Phrasings(questions=("{e}", "{e} =", "Solve: {e}", "{e} equals what?"))
_ASK_VERB = {
    "+": Phrasings(
        questions=(
            "If I add {b} to {a}, what do I get?",
            "What do {a} and {b} add up to?",
            "How much are {a} and {b} together?",
        ),
        commands=("Add {a} and {b}.", "Add {b} to {a}.", "Add {a} and {b} together."),
    ),
    "-": Phrasings(
        questions=(
            "If I take {b} from {a}, what is left?",
            "What is {b} less than {a}?",
            "What is left of {a} after taking away {b}?",
        ),
        commands=("Subtract {b} from {a}.", "Take {b} away from {a}.", "Take {b} from {a}."),
    ),
    "x": Phrasings(
        questions=("If I multiply {a} by {b}, what do I get?", "How many are {a} groups of {b}?"),
        commands=("Multiply {a} by {b}.", "Multiply {a} and {b}."),
    ),
    "/": Phrasings(
        questions=("If I divide {a} by {b}, what do I get?", "How many times does {b} go into {a}?"),
        commands=("Divide {a} by {b}.", "Split {a} into {b} equal parts."),
    ),
}
_NAMES = {"+": "add", "-": "sub", "x": "mul", "/": "div"}
_COMPUTE = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.floordiv}
_TABLE_SUM = 20
_TABLE_FACTOR = 12
_TABLE_DOUBLE = 50


def _problem(rng: random.Random, a: int, op: str, b: int) -> Problem:
    draw = rng.random()
    if draw < 0.35:
        expression = rng.choice(_SYMBOLIC[op]).format(a=a, b=b)
        prompt, template = ask_with_template(rng, rng.choice((_ASK_SYMBOLIC, _ASK_EXPRESSION)), e=expression)
    elif draw < 0.45:
        prompt, template = ask_with_template(rng, _ASK_NOUN_PHRASE, e=_NOUN_PHRASE[op].format(a=a, b=b))
    elif draw < 0.7:
        spelled = max(a, b) < len(NUMBER_WORDS) and rng.random() < 0.2
        left, right = (NUMBER_WORDS[a], NUMBER_WORDS[b]) if spelled else (str(a), str(b))
        expression = rng.choice(_SPOKEN[op]).format(a=left, b=right)
        prompt, template = ask_with_template(rng, _ASK_EXPRESSION, e=expression)
    else:
        prompt, template = ask_with_template(rng, _ASK_VERB[op], a=a, b=b)
    key = f"{_key(op, a, b)}:{template}" if _in_table(a, op, b) else _key(op, a, b)
    return Problem(prompt, f"{worked_out(a, op, b)}.", str(_COMPUTE[op](a, b)), key)


def _in_table(a: int, op: str, b: int) -> bool:
    match op:
        case "+":
            return a + b <= _TABLE_SUM
        case "-":
            return a <= _TABLE_SUM
        case "x":
            return max(a, b) <= _TABLE_FACTOR
        case _:
            return max(b, a // b) <= _TABLE_FACTOR


def worked_out(a: int, op: str, b: int) -> str:
    """`a op b` with its answer and no full stop: at once from a table, or with the working before it."""
    answer, working = _COMPUTE[op](a, b), _working(a, op, b)
    return f"{a} {op} {b}: {working}. The answer is {answer}" if working else f"{a} {op} {b} = {answer}"


def _working(a: int, op: str, b: int) -> str:
    """Columns or tens and ones; nothing for what a table holds."""
    if _in_table(a, op, b):
        return ""
    match op:
        case "+":
            return _addition_columns(a, b)
        case "-":
            return _subtraction_columns(a, b)
        case "x":
            tens, ones = a // 10 * 10, a % 10
            return f"{tens} x {b} = {tens * b}, {ones} x {b} = {ones * b}" if ones else ""
        case _:
            tens, ones = a // b // 10 * 10, a // b % 10
            return f"{tens * b} / {b} = {tens}, {ones * b} / {b} = {ones}" if ones else ""


def _key(op: str, a: int, b: int) -> str:
    """Swapping the operands of a sum or product is the same problem: the larger one comes first."""
    if op in "+x":
        a, b = max(a, b), min(a, b)
    return f"{_NAMES[op]}:{a}:{b}"


def _add_small(rng: random.Random) -> Problem:
    total = rng.randint(2, _TABLE_SUM)
    a = rng.randint(1, total - 1)
    return _problem(rng, a, "+", total - a)


def _subtract_small(rng: random.Random) -> Problem:
    a = rng.randint(2, _TABLE_SUM)
    b = rng.randint(1, a)
    return _problem(rng, a, "-", b)


def _add_columns(rng: random.Random, low: int, high: int) -> Problem:
    a, b = rng.randint(low, high), rng.randint(low, high)
    return _problem(rng, a, "+", b)


def _subtract_columns(rng: random.Random, low: int, high: int) -> Problem:
    b, a = sorted((rng.randint(low, high), rng.randint(low, high)))
    return _problem(rng, a, "-", b)


def _addition_columns(a: int, b: int) -> str:
    """Column sums from the ones up, the carry written as "+ 1"; columns with nothing to add are left out."""
    steps = []
    carry = 0
    for x, y in zip_longest(reversed(str(max(a, b))), reversed(str(min(a, b)))):
        parts = [x, *([y] if y else []), *(["1"] if carry else [])]
        total = sum(int(part) for part in parts)
        if len(parts) > 1:
            steps.append(f"{' + '.join(parts)} = {total}")
        carry = total // 10
    return ", ".join(steps)


def _subtraction_columns(a: int, b: int) -> str:
    """Column differences from the ones up, the borrow written as "- 1"; columns with nothing to take are left out."""
    steps = []
    borrow = 0
    for x, y in zip_longest(reversed(str(a)), reversed(str(b))):
        taken = int(y or 0) + borrow
        top = int(x) + (10 if int(x) < taken else 0)
        parts = [str(top), *([y] if y else []), *(["1"] if borrow else [])]
        if len(parts) > 1:
            steps.append(f"{' - '.join(parts)} = {top - taken}")
        borrow = int(top > 9)
    return ", ".join(steps)


def _add_to_two_digits(rng: random.Random) -> Problem:
    a, b = rng.randint(10, 99), rng.randint(1, 9)
    if rng.random() < 0.5:
        return _problem(rng, a, "-", b)
    return _problem(rng, a, "+", b)


def _times_table(rng: random.Random, highest: int) -> Problem:
    a, b = rng.randint(1, highest), rng.randint(1, min(highest + 5, _TABLE_FACTOR))
    if rng.random() < 0.5:
        a, b = b, a
    return _problem(rng, a, "x", b)


_ASK_DOUBLE = Phrasings(
    questions=(
        "What is double {n}?",
        "What's twice {n}?",
        "What is two times {n}?",
        "How much is double {n}?",
        "Double {n} is what?",
    ),
    commands=("Double {n}.", "Double the number {n}.", "Tell me the double of {n}.", "Work out twice {n}."),
)
_ASK_HALF = Phrasings(
    questions=(
        "What is half of {n}?",
        "What's half of {n}?",
        "How much is half of {n}?",
        "What is one half of {n}?",
        "Half of {n} is what?",
    ),
    commands=(
        "Halve {n}.",
        "Halve the number {n}.",
        "Tell me half of {n}.",
        "Cut {n} in half.",
        "Work out half of {n}.",
    ),
)


def _double(rng: random.Random) -> Problem:
    n = rng.randint(2, _TABLE_DOUBLE)
    prompt, template = ask_with_template(rng, _ASK_DOUBLE, n=n)
    return Problem(prompt, f"2 x {n} = {2 * n}.", str(2 * n), f"double:{n}:{template}")


def _halve(rng: random.Random) -> Problem:
    n = 2 * rng.randint(1, _TABLE_DOUBLE)
    prompt, template = ask_with_template(rng, _ASK_HALF, n=n)
    return Problem(prompt, f"{n} / 2 = {n // 2}.", str(n // 2), f"half:{n}:{template}")


def _multiply_two_digits(rng: random.Random) -> Problem:
    return _problem(rng, rng.randint(_TABLE_FACTOR + 1, 99), "x", rng.randint(2, 9))


def _divide_table(rng: random.Random) -> Problem:
    b, answer = rng.randint(2, _TABLE_FACTOR), rng.randint(1, _TABLE_FACTOR)
    return _problem(rng, b * answer, "/", b)


def _divide_two_digits(rng: random.Random) -> Problem:
    b, answer = rng.randint(2, 9), rng.randint(_TABLE_FACTOR + 1, 49)
    return _problem(rng, b * answer, "/", b)


BUILDERS: Builders = {
    1: (_add_small, _subtract_small, partial(_times_table, highest=5)),
    2: (
        _add_to_two_digits,
        partial(_add_columns, low=10, high=99),
        partial(_subtract_columns, low=10, high=99),
        partial(_times_table, highest=_TABLE_FACTOR),
        _double,
        _halve,
    ),
    3: (
        partial(_add_columns, low=100, high=999),
        partial(_subtract_columns, low=100, high=999),
        _multiply_two_digits,
        _divide_table,
        _divide_two_digits,
    ),
}
