"""Which of several numbers, people or lengths is the larger or the smaller."""

import random
from functools import partial

from buddy_routing.tasks.phrasing import Phrasings, ask
from buddy_routing.tasks.task import Builders, Problem
from buddy_routing.tasks.vocabulary import NAMES

_ASK_OF_TWO = Phrasings(
    questions=(
        "Which is {w}, {a} or {b}?",
        "Which number is {w}: {a} or {b}?",
        "What is {w}, {a} or {b}?",
        "Which one is {w}, {a} or {b}?",
        "{a} or {b}: which is {w}?",
        "Is {a} or {b} {w}?",
        "Of {a} and {b}, which is {w}?",
        "Do you know which is {w}, {a} or {b}?",
    ),
    commands=(
        "Tell me which is {w}, {a} or {b}.",
        "Pick the {w} number: {a} or {b}.",
        "Give me the {w} of {a} and {b}.",
        "Choose the {w} one: {a} or {b}.",
    ),
)
_ASK_OF_MANY = Phrasings(
    questions=(
        "Which number is the {w}: {list}?",
        "What is the {w} of {list}?",
        "Which is the {w} number in {list}?",
        "What's the {w} number here: {list}?",
        "Which of these is the {w}: {list}?",
        "{list}: which is the {w}?",
        "Out of {list}, which is the {w}?",
    ),
    commands=(
        "Find the {w} number: {list}.",
        "Tell me the {w} of {list}.",
        "Pick the {w} number from {list}.",
        "Give me the {w} number in this list: {list}.",
        "Say which is the {w}: {list}.",
    ),
)
_ASK_GREATER = Phrasings(
    questions=(
        "Is {a} {w} than {b}?",
        "Is the number {a} {w} than {b}?",
        "Is it true that {a} is {w} than {b}?",
        "Would you say {a} is {w} than {b}?",
        "{a} is {w} than {b}, yes or no?",
        "Yes or no: is {a} {w} than {b}?",
        "I think {a} is {w} than {b}. Is that right?",
        "Do you agree that {a} is {w} than {b}?",
    ),
    commands=(
        "Tell me if {a} is {w} than {b}.",
        "Check if {a} is {w} than {b}.",
        "Say if {a} is {w} than {b}.",
    ),
)
_MORE_OF_TWO = ("bigger", "larger", "greater", "higher")
_LESS_OF_TWO = ("smaller", "lower")
_MORE_OF_MANY = ("biggest", "largest", "greatest", "highest")
_LESS_OF_MANY = ("smallest", "lowest")


def _of_two(rng: random.Random, highest: int) -> Problem:
    a, b = rng.sample(range(1, highest + 1), 2)
    more = rng.random() < 0.5
    answer = max(a, b) if more else min(a, b)
    prompt = ask(rng, _ASK_OF_TWO, a=a, b=b, w=rng.choice(_MORE_OF_TWO if more else _LESS_OF_TWO))
    word = "bigger" if more else "smaller"
    return Problem(prompt, f"The {word} number is {answer}.", str(answer), f"{word}:{max(a, b)}:{min(a, b)}")


def _of_many(rng: random.Random, count: int, highest: int) -> Problem:
    numbers = rng.sample(range(1, highest + 1), count)
    more = rng.random() < 0.5
    answer = max(numbers) if more else min(numbers)
    w = rng.choice(_MORE_OF_MANY if more else _LESS_OF_MANY)
    prompt = ask(rng, _ASK_OF_MANY, list=join_list(rng, [str(n) for n in numbers]), w=w)
    word = "biggest" if more else "smallest"
    key = f"{word}:{':'.join(str(n) for n in sorted(numbers))}"
    return Problem(prompt, f"The {word} number is {answer}.", str(answer), key)


def join_list(rng: random.Random, items: list[str]) -> str:
    """The items with commas, sometimes with "and" before the last."""
    if rng.random() < 0.35:
        return f"{', '.join(items[:-1])} and {items[-1]}"
    return ", ".join(items)


def _is_greater(rng: random.Random, highest: int) -> Problem:
    a, b = rng.sample(range(1, highest + 1), 2)
    asks_more = rng.random() < 0.5
    words = ("bigger", "greater", "more", "larger") if asks_more else ("smaller", "less")
    prompt = ask(rng, _ASK_GREATER, a=a, b=b, w=rng.choice(words))
    yes = (a > b) == asks_more
    reply = f"{'Yes' if yes else 'No'}, {a} is {'more' if a > b else 'less'} than {b}."
    high, low = (a, b) if asks_more else (b, a)
    return Problem(prompt, reply, "yes" if yes else "no", f"greater:{high}:{low}")


# noun for the key, "more" word, "less" word, superlatives, how a person is described, range of values
_PEOPLE = (
    ("age", "older", "younger", "oldest", "youngest", "{name} is {n} years old", 3, 90),
    ("height", "taller", "shorter", "tallest", "shortest", "{name} is {n} cm tall", 90, 195),
    ("stock", "richer", "poorer", "richest", "poorest", "{name} has {n} dollars", 2, 99),
    ("pace", "faster", "slower", "fastest", "slowest", "{name} runs {n} km in an hour", 4, 30),
)


def _people(rng: random.Random, count: int) -> Problem:
    """Who is oldest and so on; the working names the number that decides."""
    noun, more_word, less_word, most_word, least_word, fact, low, high = rng.choice(_PEOPLE)
    names = rng.sample(NAMES, count)
    values = rng.sample(range(low, high + 1), count)
    more = rng.random() < 0.5
    decisive = max(values) if more else min(values)
    if count == 2:
        word = more_word if more else less_word
        working = f"{decisive} is {'more' if more else 'less'} than {min(values) if more else max(values)}"
    else:
        word = f"the {most_word if more else least_word}"
        working = f"The {'biggest' if more else 'smallest'} number is {decisive}"
    facts = [fact.format(name=name, n=n) for name, n in zip(names, values, strict=True)]
    facts_text = " and ".join(facts) if rng.random() < 0.5 and count == 2 else ". ".join(facts)
    phrasings = Phrasings(
        questions=(
            "{facts}. Who is {w}?",
            "{facts}. Which of them is {w}?",
            "{facts}. So who is {w}?",
            "{facts}. Do you know who is {w}?",
            "{facts}. Can you tell me who is {w}?",
            "{facts}. Tell me who is {w}.",
            "{facts}. Please say who is {w}.",
            "Who is {w}? {facts}.",
        )
    )
    answer = names[values.index(decisive)]
    key = f"{noun}-{'most' if more else 'least'}:{':'.join(str(n) for n in sorted(values))}"
    return Problem(ask(rng, phrasings, facts=facts_text, w=word), f"{working}. The answer is {answer}.", answer, key)


_QUANTITIES = (
    ("longer", "shorter", "m", "cm", 100),
    ("longer", "shorter", "km", "m", 1000),
    ("heavier", "lighter", "kg", "g", 1000),
    ("longer", "shorter", "hours", "minutes", 60),
)


def _quantities(rng: random.Random) -> Problem:
    """Two amounts in different units, brought to the small one first."""
    more_word, less_word, large_unit, small_unit, factor = rng.choice(_QUANTITIES)
    large = rng.randint(2, 9)
    step = 10 if factor < 1000 else 100
    small = rng.choice([n for n in range(step, factor * 10, step) if n != large * factor])
    more = rng.random() < 0.5
    amounts = {large * factor: f"{large} {large_unit}", small: f"{small} {small_unit}"}
    high, low = max(amounts), min(amounts)
    answer = amounts[high if more else low]
    first, second = rng.sample(list(amounts.values()), 2)
    prompt = ask(rng, _ASK_OF_TWO_AMOUNTS, a=first, b=second, w=more_word if more else less_word)
    working = f"{large} {large_unit} = {large * factor} {small_unit}. {high} is more than {low}"
    key = f"{'more' if more else 'less'}:{large}{large_unit}:{small}{small_unit}"
    return Problem(prompt, f"{working}. The answer is {answer}.", answer, key)


_ASK_OF_TWO_AMOUNTS = Phrasings(
    questions=(
        "Which is {w}, {a} or {b}?",
        "What is {w}, {a} or {b}?",
        "Which one is {w}: {a} or {b}?",
        "{a} or {b}: which is {w}?",
        "Is {a} or {b} {w}?",
        "Do you know which is {w}, {a} or {b}?",
    ),
    commands=("Tell me which is {w}, {a} or {b}.", "Say which is {w}: {a} or {b}."),
)

BUILDERS: Builders = {
    1: (
        partial(_of_two, highest=50),
        partial(_is_greater, highest=20),
        partial(_of_many, count=3, highest=20),
    ),
    2: (
        partial(_of_two, highest=999),
        partial(_is_greater, highest=200),
        partial(_of_many, count=3, highest=99),
        partial(_people, count=2),
    ),
    3: (
        partial(_of_many, count=4, highest=99),
        partial(_of_many, count=5, highest=99),
        partial(_people, count=3),
        _quantities,
    ),
}
