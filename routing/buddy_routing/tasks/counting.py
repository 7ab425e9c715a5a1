"""Letters, list items and words counted one by one, and counting from one number to another."""

import random
from collections.abc import Sequence
from functools import partial

from buddy_routing.tasks.comparison import join_list
from buddy_routing.tasks.phrasing import Phrasings, ask
from buddy_routing.tasks.task import Builders, Problem
from buddy_routing.tasks.vocabulary import (
    ADJECTIVES,
    ANIMALS,
    PLACES,
    THINGS,
    VERBS_OF_ACTION,
    words_of_length,
)

_ASK_LETTERS = Phrasings(
    questions=(
        "How many letters are in '{w}'?",
        "How many letters are there in the word {w}?",
        "How many letters does {w} have?",
        'How many letters does the word "{w}" have?',
        "How long is the word {w}?",
        "What is the number of letters in '{w}'?",
        "{w}: how many letters is that?",
    ),
    commands=(
        "Count the letters in '{w}'.",
        "Count the letters in the word {w}.",
        "Count how many letters {w} has.",
        "Tell me how many letters are in the word {w}.",
        'Say how many letters "{w}" has.',
    ),
)
_ASK_ONE_LETTER = Phrasings(
    questions=(
        "How many times does the letter {c} occur in '{w}'?",
        "How many {c}'s are in the word {w}?",
        "How often is the letter {c} in {w}?",
        "How many times is {c} in the word '{w}'?",
        "In the word {w}, how many {c}'s are there?",
        "How many of the letter {c} does {w} have?",
    ),
    commands=(
        "Count the {c}'s in '{w}'.",
        "Count the letter {c} in the word {w}.",
        "Tell me how many {c}'s are in {w}.",
        "Count how often the letter {c} is in the word {w}.",
    ),
)
_ASK_ITEM = Phrasings(
    questions=(
        "How many times does {x} appear in this list: {list}?",
        "How many times is {x} in the list {list}?",
        "How often does {x} occur here: {list}?",
        "How many times do you see {x}: {list}?",
        "In the list {list}, how many times is {x} there?",
        "How often is the word {x} in {list}?",
    ),
    commands=(
        "Count how often {x} occurs: {list}.",
        "Count the word {x} in this list: {list}.",
        "Tell me how many times {x} is here: {list}.",
        "Count how many times {x} is in the list {list}.",
    ),
)
_ASK_WORDS = Phrasings(
    questions=(
        "How many words are in '{s}'?",
        "How many words are in this sentence: {s}?",
        'How many words does "{s}" have?',
        "What is the number of words in '{s}'?",
        "How many words are there here: {s}?",
    ),
    commands=(
        "Count the words: {s}.",
        "Count the words in '{s}'.",
        "Count how many words this has: {s}.",
        "Tell me how many words are in '{s}'.",
        "Say how many words this sentence has: {s}.",
    ),
)
_ASK_COUNT = Phrasings(
    questions=(
        "What are the numbers from {a} to {b}?",
        "What numbers go from {a} to {b}?",
        "Which numbers do you say to count from {a} to {b}?",
    ),
    commands=(
        "Count from {a} to {b}.",
        "Count to {b} from {a}.",
        "Count from {a} to {b} for me.",
        "Start at {a} and count to {b}.",
        "List the numbers from {a} to {b}.",
        "Write the numbers from {a} to {b}.",
        "Say the numbers from {a} to {b}.",
    ),
)
_ASK_STEPS = Phrasings(
    questions=(
        "How do you count by {k} from {a} to {b}?",
        "What do you get counting by {k} from {a} to {b}?",
    ),
    commands=(
        "Count by {k} from {a} to {b}.",
        "Count from {a} to {b} by {k}.",
        "Count from {a} to {b} in steps of {k}.",
        "Skip count by {k} from {a} to {b}.",
        "Start at {a} and count by {k} to {b}.",
        "Go from {a} to {b} in steps of {k}.",
    ),
)
_ASK_DOWN = Phrasings(
    questions=("How do you count down from {a} to {b}?", "What are the numbers going down from {a} to {b}?"),
    commands=(
        "Count down from {a} to {b}.",
        "Count backwards from {a} to {b}.",
        "Count from {a} down to {b}.",
        "Count back from {a} to {b}.",
        "Start at {a} and count down to {b}.",
        "List the numbers from {a} down to {b}.",
    ),
)


def _numbered(prompt: str, items: Sequence[str], counted: Sequence[bool], key: str) -> Problem:
    """A reply that walks over the items and writes the running count behind each one that counts."""
    marks = []
    total = 0
    for item, counts in zip(items, counted, strict=True):
        total += counts
        marks.append(f"{item} {total}" if counts else item)
    return Problem(prompt, f"{', '.join(marks)}. The answer is {total}.", str(total), key)


def _letters(rng: random.Random, shortest: int, longest: int) -> Problem:
    word = rng.choice(words_of_length(shortest, longest))
    return _numbered(ask(rng, _ASK_LETTERS, w=word), word, [True] * len(word), f"letters:{word}")


def _one_letter(rng: random.Random) -> Problem:
    word = rng.choice(words_of_length(4, 8))
    repeated = [c for c in word if word.count(c) > 1]
    letter = rng.choice(repeated if repeated and rng.random() < 0.8 else list(word))
    prompt = ask(rng, _ASK_ONE_LETTER, c=letter, w=word)
    return _numbered(prompt, word, [c == letter for c in word], f"letter-count:{letter}:{word}")


def _items(rng: random.Random, shortest: int, longest: int) -> Problem:
    pool = rng.sample(rng.choice((THINGS, ANIMALS)), 3)
    items = [rng.choice(pool) for _ in range(rng.randint(shortest, longest))]
    wanted = rng.choice(items)
    prompt = ask(rng, _ASK_ITEM, x=wanted, list=join_list(rng, items))
    return _numbered(prompt, items, [item == wanted for item in items], f"item-count:{wanted}:{':'.join(items)}")


def _words(rng: random.Random) -> Problem:
    sentence = short_sentence(rng)
    words = sentence.split()
    return _numbered(ask(rng, _ASK_WORDS, s=sentence), words, [True] * len(words), f"words:{sentence}")


def short_sentence(rng: random.Random) -> str:
    """A lower-case sentence of three to seven words without a full stop."""
    words = [
        "the",
        rng.choice(ADJECTIVES),
        rng.choice(ANIMALS),
        rng.choice(VERBS_OF_ACTION),
        rng.choice(PLACES),
    ]
    if rng.random() < 0.5:
        del words[1]
    if rng.random() < 0.2:
        del words[-1]
    return " ".join(words)


def _count(rng: random.Random, highest: int, longest: int) -> Problem:
    a = rng.randint(1, highest - 3)
    b = rng.randint(a + 2, min(a + longest, highest))
    return _sequence(ask(rng, _ASK_COUNT, a=a, b=b), range(a, b + 1))


def _count_in_steps(rng: random.Random) -> Problem:
    step = rng.choice((2, 3, 5, 10))
    a = rng.randint(0, 10) * (step if rng.random() < 0.7 else 1)
    b = a + step * rng.randint(3, 7)
    return _sequence(ask(rng, _ASK_STEPS, a=a, b=b, k=step), range(a, b + 1, step))


def _count_down(rng: random.Random) -> Problem:
    b = rng.randint(1, 60)
    a = b + rng.randint(3, 8)
    return _sequence(ask(rng, _ASK_DOWN, a=a, b=b), range(a, b - 1, -1))


def _sequence(prompt: str, numbers: range) -> Problem:
    answer = ", ".join(str(n) for n in numbers)
    return Problem(prompt, f"{answer}.", answer, f"count:{numbers.start}:{numbers[-1]}:{numbers.step}")


BUILDERS: Builders = {
    1: (partial(_letters, shortest=3, longest=4), partial(_count, highest=30, longest=7)),
    2: (
        partial(_letters, shortest=5, longest=8),
        partial(_items, shortest=4, longest=5),
        _words,
        partial(_count, highest=99, longest=9),
    ),
    3: (partial(_items, shortest=6, longest=9), _one_letter, _count_in_steps, _count_down),
}
