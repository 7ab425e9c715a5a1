"""Many ordinary ways to ask for the same thing."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Templates for one kind of request.

    `questions` are used as they stand. `commands` start with a verb and may become "Please ...",
    "Can you ...?" and the like, so a command must not also be listed in one of those forms.
    """

    questions: tuple[str, ...]
    commands: tuple[str, ...] = ()


def ask(rng: random.Random, phrasings: Phrasings, **fields: object) -> str:
    """A prompt from a random template, with the small variations of everyday typing."""
    return ask_with_template(rng, phrasings, **fields)[0]


def ask_with_template(rng: random.Random, phrasings: Phrasings, **fields: object) -> tuple[str, str]:
    """Like `ask`, and the template, for kinds held out by phrasing: keys survive edits of the lists."""
    num_questions = len(phrasings.questions)
    index = rng.randrange(num_questions + len(phrasings.commands))
    if index < num_questions:
        template = phrasings.questions[index]
        text = _vary_question(rng, template, template.format(**fields))
    else:
        template = phrasings.commands[index - num_questions]
        text = _vary_command(rng, template.format(**fields), can_end_in_please=":" not in template)
    return type_casually(rng, text, may_lower=template[0].isalpha()), template


def type_casually(rng: random.Random, text: str, may_lower: bool = True) -> str:
    """Sometimes starts in lower case, if that is allowed, and sometimes leaves the final mark out."""
    if may_lower and rng.random() < 0.2 and not text.startswith(("I ", "I'")):
        text = _lower_first(text)
    if rng.random() < 0.2:
        text = text.rstrip(".?!")
    return text


def _vary_question(rng: random.Random, template: str, text: str) -> str:
    draw = rng.random()
    starts_with_word = template[0].isalpha() and not template.startswith("I ")
    if draw < 0.04 and starts_with_word:
        return f"Hi Buddy, {_lower_first(text)}"
    is_plain_question = template.startswith(("What", "How", "Which")) and ":" not in template
    if draw < 0.10 and is_plain_question:
        return f"{text[:-1]}, please?"
    return text


def _vary_command(rng: random.Random, text: str, can_end_in_please: bool) -> str:
    draw = rng.random()
    bare = _lower_first(text).rstrip(".")
    if draw < 0.15:
        return f"Please {bare}."
    if draw < 0.25:
        return f"Can you {bare}?"
    if draw < 0.32:
        return f"Could you {bare}?"
    if draw < 0.37:
        return f"Could you please {bare}?"
    if draw < 0.42 and can_end_in_please:
        return f"{text.rstrip('.')}, please."
    return text


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
