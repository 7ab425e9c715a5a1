"""Numbers put in order of size and words in order of the alphabet."""

import random
from functools import partial

from buddy_routing.tasks.comparison import join_list
from buddy_routing.tasks.phrasing import Phrasings, ask
from buddy_routing.tasks.task import Builders, Problem
from buddy_routing.tasks.vocabulary import NOUNS

_ASK_UP = Phrasings(
    questions=(
        "What is {list} in order from smallest to largest?",
        "How do you sort {list} from low to high?",
        "What order do {list} go in, smallest first?",
        "What are the numbers {list} in order, smallest first?",
    ),
    commands=(
        "Sort these numbers: {list}.",
        "Sort {list}.",
        "Sort {list} from smallest to biggest.",
        "Put {list} in order.",
        "Put these numbers in order from smallest to largest: {list}.",
        "Order these numbers from low to high: {list}.",
        "Arrange {list} in ascending order.",
        "Sort these in ascending order: {list}.",
        "List these numbers from least to greatest: {list}.",
    ),
)
_ASK_DOWN = Phrasings(
    questions=(
        "What is {list} in order from largest to smallest?",
        "How do you sort {list} from high to low?",
        "What order do {list} go in, biggest first?",
        "What are the numbers {list} in order, biggest first?",
    ),
    commands=(
        "Sort {list} from biggest to smallest.",
        "Put these numbers in order from largest to smallest: {list}.",
        "Order these numbers from high to low: {list}.",
        "Arrange {list} in descending order.",
        "Sort these in descending order: {list}.",
        "List these numbers from greatest to least: {list}.",
        "Sort these numbers with the biggest first: {list}.",
    ),
)
_ASK_WORDS = Phrasings(
    questions=(
        "What is {list} in alphabetical order?",
        "How do you sort {list} by the alphabet?",
        "What are these words in alphabetical order: {list}?",
        "In what order would a dictionary list {list}?",
    ),
    commands=(
        "Sort these words: {list}.",
        "Sort {list} alphabetically.",
        "Put {list} in alphabetical order.",
        "Put these words in ABC order: {list}.",
        "Order these words from A to Z: {list}.",
        "Arrange {list} in alphabetical order.",
        "List these words alphabetically: {list}.",
    ),
)


def _shuffled(rng: random.Random, ordered: list[str]) -> list[str]:
    """The items in an order that is not already the answer."""
    shuffled = list(ordered)
    while shuffled == ordered:
        rng.shuffle(shuffled)
    return shuffled


def _numbers(rng: random.Random, count: int, highest: int) -> Problem:
    descending = rng.random() < 0.4
    ordered = [str(n) for n in sorted(rng.sample(range(1, highest + 1), count), reverse=descending)]
    prompt = ask(rng, _ASK_DOWN if descending else _ASK_UP, list=join_list(rng, _shuffled(rng, ordered)))
    answer = ", ".join(ordered)
    return Problem(prompt, f"{answer}.", answer, f"sort:{':'.join(ordered)}")


def _words(rng: random.Random, count: int, distinct_initials: bool) -> Problem:
    ordered = sorted(rng.sample(NOUNS, count))
    while distinct_initials and len({word[0] for word in ordered}) < count:
        ordered = sorted(rng.sample(NOUNS, count))
    answer = ", ".join(ordered)
    prompt = ask(rng, _ASK_WORDS, list=join_list(rng, _shuffled(rng, ordered)))
    return Problem(prompt, f"{answer}.", answer, f"sort:{':'.join(ordered)}")


BUILDERS: Builders = {
    1: (partial(_numbers, count=3, highest=20),),
    2: (
        partial(_numbers, count=3, highest=99),
        partial(_numbers, count=4, highest=50),
        partial(_words, count=3, distinct_initials=True),
    ),
    3: (
        partial(_numbers, count=5, highest=99),
        partial(_words, count=4, distinct_initials=True),
        partial(_words, count=3, distinct_initials=False),
    ),
}
