"""Everyday units turned into one another, in whole numbers."""

import random
from dataclasses import dataclass
from functools import partial

from buddy_routing.tasks.phrasing import Phrasings, ask, ask_with_template
from buddy_routing.tasks.task import Builders, Problem

_ASK_MANY = Phrasings(
    questions=(
        "How many {to} are in {n} {fro}?",
        "How many {to} are there in {n} {fro}?",
        "How many {to} is {n} {fro}?",
        "How many {to} make {n} {fro}?",
        "What is {n} {fro} in {to}?",
        "What's {n} {fro} in {to}?",
        "{n} {fro} is how many {to}?",
        "{n} {fro} in {to}?",
        "Do you know how many {to} are in {n} {fro}?",
    ),
    commands=(
        "Convert {n} {fro} to {to}.",
        "Convert {n} {fro} into {to}.",
        "Change {n} {fro} to {to}.",
        "Turn {n} {fro} into {to}.",
        "Give me {n} {fro} in {to}.",
        "Tell me how many {to} are in {n} {fro}.",
    ),
)


@dataclass(frozen=True, slots=True)
class _Units:
    """`factor` small units make one large unit. Prompts use any of the names, replies the first."""

    large: tuple[tuple[str, str], ...]  # (singular, plural)
    small: tuple[str, ...]
    factor: int
    max_count: int


_ASK_DOZEN = Phrasings(
    questions=(
        "How many {to} are in {n} {fro}?",
        "How many {to} are there in {n} {fro}?",
        "How many {to} is {n} {fro}?",
        "How many {to} make {n} {fro}?",
        "{n} {fro} is how many {to}?",
        "Do you know how many {to} {n} {fro} is?",
    ),
    commands=("Tell me how many {to} {n} {fro} is.", "Work out how many {to} are in {n} {fro}."),
)
_UNITS = (
    _Units((("m", "m"), ("meter", "meters"), ("metre", "metres")), ("cm", "centimeters", "cm"), 100, 50),
    _Units((("km", "km"), ("kilometer", "kilometers")), ("m", "meters", "metres"), 1000, 50),
    _Units((("kg", "kg"), ("kilogram", "kilograms"), ("kilo", "kilos")), ("g", "grams"), 1000, 50),
    _Units((("cm", "cm"), ("centimeter", "centimeters")), ("mm", "millimeters"), 10, 99),
    _Units((("hour", "hours"),), ("minutes",), 60, 12),
    _Units((("minute", "minutes"),), ("seconds",), 60, 12),
    _Units((("week", "weeks"),), ("days",), 7, 12),
    _Units((("day", "days"),), ("hours",), 24, 9),
    _Units((("year", "years"),), ("months",), 12, 12),
    _Units((("dollar", "dollars"),), ("cents",), 100, 50),
    _Units((("dozen", "dozen"),), ("eggs",), 12, 12),
)
_MIXABLE = tuple(units for units in _UNITS if units.small[0] in ("cm", "minutes", "seconds", "days", "months", "cents"))


def _to_small(rng: random.Random, most: int) -> Problem:
    units = rng.choice(_UNITS)
    count = rng.randint(1, min(most, units.max_count))
    large, small = _names(rng, units, count)
    total = count * units.factor
    prompt, template = ask_with_template(rng, _phrasings(units), n=count, fro=large, to=small)
    reply = _reply(units, count, f"{count} x {units.factor} = {total}")
    return Problem(prompt, reply, str(total), _split_key(units, count, template))


def _phrasings(units: _Units) -> Phrasings:
    return _ASK_DOZEN if units.large[0][0] == "dozen" else _ASK_MANY


def _reply(units: _Units, count: int, working: str) -> str:
    singular, plural = units.large[0]
    total = count * units.factor
    return f"{working}. {count} {singular if count == 1 else plural} = {total} {units.small[0]}."


def _to_large(rng: random.Random, most: int) -> Problem:
    units = rng.choice(_UNITS)
    count = rng.randint(2, min(most, units.max_count))
    large, small = _names(rng, units, count)
    total = count * units.factor
    prompt, template = ask_with_template(rng, _phrasings(units), n=total, fro=small, to=large)
    reply = f"{total} / {units.factor} = {count}. {total} {units.small[0]} = {count} {units.large[0][1]}."
    return Problem(prompt, reply, str(count), f"back-{_split_key(units, count, template)}")


def _mixed(rng: random.Random) -> Problem:
    units = rng.choice(_MIXABLE)
    count, rest = rng.randint(1, min(9, units.max_count)), rng.randint(2, units.factor - 1)
    large, small = _names(rng, units, count)
    whole = count * units.factor
    prompt = ask(rng, _ASK_MANY, n=count, fro=f"{large} and {rest} {small}", to=small)
    total = whole + rest
    reply = f"{count} x {units.factor} = {whole}, {whole} + {rest} = {total}. The answer is {total}."
    return Problem(prompt, reply, str(total), f"{_key(units, count)}:{rest}")


def _names(rng: random.Random, units: _Units, count: int) -> tuple[str, str]:
    singular, plural = rng.choice(units.large)
    return singular if count == 1 else plural, rng.choice(units.small)


def _key(units: _Units, count: int) -> str:
    return f"convert:{units.large[0][0]}:{units.small[0]}:{count}"


def _split_key(units: _Units, count: int, template: str) -> str:
    """Factors of ten are worked out; the tables of 7, 12, 24 and 60 are known by heart and split by phrasing."""
    return _key(units, count) if units.factor in (10, 100, 1000) else f"{_key(units, count)}:{template}"


BUILDERS: Builders = {
    1: (partial(_to_small, most=10),),
    2: (partial(_to_small, most=99), partial(_to_large, most=10)),
    3: (partial(_to_large, most=99), _mixed),
}
