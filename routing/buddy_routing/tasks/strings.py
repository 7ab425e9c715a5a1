"""Small changes to words: capitals, letters, spelling, reversal, repetition, joining, replacing, plurals."""

import random
from functools import partial

from buddy_routing.tasks.counting import short_sentence
from buddy_routing.tasks.phrasing import Phrasings, ask
from buddy_routing.tasks.task import Builders, Problem
from buddy_routing.tasks.vocabulary import ADJECTIVES, ANIMALS, NOUNS, plural, words_of_length

_ASK_UPPER = Phrasings(
    questions=(
        "What is '{w}' in capital letters?",
        "How do you write {w} in all caps?",
        "What is {w} in upper case?",
        'How does "{w}" look in capitals?',
    ),
    commands=(
        "Write '{w}' in capital letters.",
        "Write the word {w} in capitals.",
        "Make {w} uppercase.",
        "Put the word '{w}' in upper case.",
        "Change {w} to all caps.",
        "Spell {w} with capital letters.",
    ),
)
_ASK_LETTER = Phrasings(
    questions=(
        "What is the {o} letter of '{w}'?",
        "What is the {o} letter in the word {w}?",
        "What's the {o} letter of {w}?",
        "Which letter is {o} in '{w}'?",
        "Which letter comes {o} in the word {w}?",
        "In the word {w}, what is the {o} letter?",
    ),
    commands=(
        "Tell me the {o} letter of {w}.",
        "Give me the {o} letter of the word '{w}'.",
        'Find the {o} letter in "{w}".',
        "Name the {o} letter of {w}.",
    ),
)
_ASK_SPELL = Phrasings(
    questions=(
        "How do you spell {w}?",
        "How is the word {w} spelled?",
        "What letters are in '{w}'?",
        "What are the letters of {w}?",
        "Which letters make the word {w}?",
    ),
    commands=(
        "Spell {w}.",
        "Spell the word {w}.",
        "Spell '{w}' for me.",
        'Spell out "{w}".',
        "Write the letters of {w}.",
        "List the letters in the word '{w}'.",
    ),
)
_ASK_REVERSE = Phrasings(
    questions=(
        "What is '{w}' backwards?",
        "What is {w} spelled backwards?",
        "How do you spell {w} in reverse?",
        "What do you get if you reverse '{w}'?",
    ),
    commands=(
        "Reverse the word {w}.",
        "Reverse '{w}'.",
        "Spell {w} backwards.",
        'Write the word "{w}" backwards.',
        "Turn the word {w} around.",
        "Write {w} in reverse.",
    ),
)
_ASK_REPEAT = Phrasings(
    questions=("What is '{w}' said {n} times?", "What do you get if you write {w} {n} times?"),
    commands=(
        "Repeat the word {w} {n} times.",
        "Say {w} {n} times.",
        "Say '{w}' {n} times.",
        "Write '{w}' {n} times.",
        "Write the word {w} {n} times.",
        'Repeat "{w}" {n} times.',
    ),
)
_ASK_JOIN = Phrasings(
    questions=(
        "What do you get if you join '{a}' and '{b}'?",
        "What word do {a} and {b} make together?",
        "What is {a} and {b} as one word?",
    ),
    commands=(
        "Join '{a}' and '{b}'.",
        "Join the words {a} and {b}.",
        "Put {a} and {b} together into one word.",
        "Combine '{a}' and '{b}' into one word.",
        "Write {a} and {b} as one word.",
        "Stick the words {a} and {b} together.",
    ),
)
_ASK_REPLACE = Phrasings(
    questions=(
        "What is '{s}' with {b} in place of {a}?",
        "What do you get if you change {a} to {b} in '{s}'?",
        "How does '{s}' read with {b} for {a}?",
    ),
    commands=(
        "Replace {a} with {b}: {s}.",
        "Replace '{a}' with '{b}' in '{s}'.",
        "Change {a} to {b} in this sentence: {s}.",
        "Change the word {a} to {b}: {s}.",
        "Swap {a} for {b} in '{s}'.",
        "Put {b} in place of {a}: {s}.",
    ),
)
_ASK_PLURAL = Phrasings(
    questions=(
        "What is the plural of {w}?",
        "What's the plural of '{w}'?",
        "What is the plural form of {w}?",
        "How do you say more than one {w}?",
        "One {w}, two what?",
        "What do you call two of a {w}?",
        "How do you write {w} in the plural?",
    ),
    commands=(
        "Make {w} plural.",
        "Give me the plural of '{w}'.",
        "Write the plural of {w}.",
        "Tell me the plural of {w}.",
    ),
)
_POSITIONS = {"first": 0, "second": 1, "third": 2, "last": -1}


def _upper(rng: random.Random, shortest: int, longest: int) -> Problem:
    word = rng.choice(words_of_length(shortest, longest))
    reply = f"{', '.join(word.upper())}. The answer is {word.upper()}."
    return Problem(ask(rng, _ASK_UPPER, w=word), reply, word.upper(), f"upper:{word}")


def _spell(rng: random.Random, shortest: int, longest: int) -> Problem:
    word = rng.choice(words_of_length(shortest, longest))
    letters = ", ".join(word)
    return Problem(ask(rng, _ASK_SPELL, w=word), f"{letters}.", letters, f"spell:{word}")


def _letter(rng: random.Random, ordinals: tuple[str, ...], longest: int) -> Problem:
    word = rng.choice(words_of_length(3, longest))
    ordinal = rng.choice(ordinals)
    letter = word[_POSITIONS[ordinal]]
    prompt = ask(rng, _ASK_LETTER, o=ordinal, w=word)
    reply = f"{', '.join(word)}. The {ordinal} letter is {letter}."
    return Problem(prompt, reply, letter, f"letter:{ordinal}:{word}")


def _reverse(rng: random.Random, shortest: int, longest: int) -> Problem:
    word = rng.choice(words_of_length(shortest, longest))
    backwards = word[::-1]
    reply = f"{', '.join(word)}. Backwards: {', '.join(backwards)}. The answer is {backwards}."
    return Problem(ask(rng, _ASK_REVERSE, w=word), reply, backwards, f"reverse:{word}")


def _repeat(rng: random.Random, most: int) -> Problem:
    word = rng.choice(words_of_length(2, 6))
    times = rng.randint(2, most)
    answer = " ".join([word] * times)
    return Problem(ask(rng, _ASK_REPEAT, w=word, n=times), f"{answer}.", answer, f"repeat:{word}:{times}")


def _join(rng: random.Random) -> Problem:
    a, b = rng.sample(words_of_length(3, 5), 2)
    return Problem(ask(rng, _ASK_JOIN, a=a, b=b), f"{a}{b}.", a + b, f"join:{a}:{b}")


def _replace(rng: random.Random) -> Problem:
    sentence = short_sentence(rng)
    pool = rng.choice([pool for pool in (ANIMALS, ADJECTIVES) if set(pool) & set(sentence.split())])
    old = next(word for word in sentence.split() if word in pool)
    new = rng.choice([word for word in pool if word != old])
    answer = " ".join(new if word == old else word for word in sentence.split())
    prompt = ask(rng, _ASK_REPLACE, a=old, b=new, s=sentence)
    return Problem(prompt, f"{answer}.", answer, f"replace:{old}:{new}:{sentence}")


def _plural(rng: random.Random) -> Problem:
    noun = rng.choice(NOUNS)
    many = plural(noun)
    return Problem(ask(rng, _ASK_PLURAL, w=noun), f"The plural of {noun} is {many}.", many, f"plural:{noun}")


BUILDERS: Builders = {
    1: (
        partial(_spell, shortest=3, longest=5),
        partial(_upper, shortest=3, longest=4),
        partial(_letter, ordinals=("first", "last"), longest=5),
        partial(_repeat, most=3),
        _plural,
    ),
    2: (
        partial(_spell, shortest=5, longest=8),
        partial(_upper, shortest=5, longest=8),
        partial(_letter, ordinals=("first", "second", "last"), longest=8),
        partial(_repeat, most=5),
        partial(_reverse, shortest=3, longest=4),
        _join,
    ),
    3: (
        partial(_reverse, shortest=5, longest=7),
        partial(_letter, ordinals=("third", "last"), longest=8),
        _replace,
    ),
}
