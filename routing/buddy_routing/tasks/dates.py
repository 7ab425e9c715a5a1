"""Weekdays, months, years and the clock.

The next weekday or month is known by heart, not worked out, and there are only a few of them: these are held
out by (problem, phrasing) pair, as facts are. Everything with a number in it is held out by problem.
"""

import random
from functools import partial

from buddy_routing.tasks.phrasing import Phrasings, ask, ask_with_template
from buddy_routing.tasks.task import Builders, Problem
from buddy_routing.tasks.vocabulary import NAMES

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_ASK_NEXT_DAY = Phrasings(
    questions=(
        "What day comes {w} {d}?",
        "Which day is {w} {d}?",
        "What day is it the day {w} {d}?",
        "What is the day {w} {d}?",
        "Which day of the week comes {w} {d}?",
        "What weekday is {w} {d}?",
        "What day comes right {w} {d}?",
        "Which day is one day {w} {d}?",
    ),
    commands=(
        "Tell me the day {w} {d}.",
        "Name the day {w} {d}.",
        "Say which day comes {w} {d}.",
        "Give me the day of the week {w} {d}.",
    ),
)
_ASK_RELATIVE_DAY = {
    1: Phrasings(
        questions=(
            "If today is {d}, what day is tomorrow?",
            "Today is {d}. What day is tomorrow?",
            "It is {d} today. What day will it be tomorrow?",
            "If it is {d} today, which day is it tomorrow?",
        )
    ),
    -1: Phrasings(
        questions=(
            "If today is {d}, what day was yesterday?",
            "Today is {d}. What day was it yesterday?",
            "It is {d} today. Which day was yesterday?",
            "If it is {d} today, which day was it yesterday?",
        )
    ),
}
_ASK_NEXT_MONTH = Phrasings(
    questions=(
        "What month comes {w} {d}?",
        "Which month is {w} {d}?",
        "What is the month {w} {d}?",
        "Which month of the year comes {w} {d}?",
        "What month is right {w} {d}?",
        "Which month is one month {w} {d}?",
        "What's the month {w} {d}?",
    ),
    commands=("Tell me the month {w} {d}.", "Name the month {w} {d}.", "Say which month comes {w} {d}."),
)
_ASK_MONTH_LENGTH = Phrasings(
    questions=(
        "How many days are in {d}?",
        "How many days does {d} have?",
        "How many days are there in {d}?",
        "How long is {d} in days?",
        "What is the number of days in {d}?",
        "How many days has {d}?",
        "How many days does the month of {d} have?",
    ),
    commands=(
        "Tell me how many days are in {d}.",
        "Say how many days {d} has.",
        "Give me the number of days in {d}.",
    ),
)
_ASK_DAYS_LATER = Phrasings(
    questions=(
        "What day is {n} days {w} {d}?",
        "What day comes {n} days {w} {d}?",
        "Which day is it {n} days {w} {d}?",
        "Which day of the week is {n} days {w} {d}?",
        "What weekday is {n} days {w} {d}?",
        "{n} days {w} {d} is what day?",
    ),
    commands=(
        "Tell me what day is {n} days {w} {d}.",
        "Work out the day {n} days {w} {d}.",
        "Name the day {n} days {w} {d}.",
    ),
)
_ASK_MONTHS_LATER = Phrasings(
    questions=(
        "What month is {n} months {w} {d}?",
        "What month comes {n} months {w} {d}?",
        "Which month is it {n} months {w} {d}?",
        "{n} months {w} {d} is what month?",
        "Do you know which month is {n} months {w} {d}?",
    ),
    commands=(
        "Tell me which month is {n} months {w} {d}.",
        "Name the month {n} months {w} {d}.",
        "Work out the month {n} months {w} {d}.",
    ),
)
_ASK_CLOCK = Phrasings(
    questions=(
        "What time is it {n} after {t}?",
        "What time is {n} after {t}?",
        "It is {t}. What time will it be in {n}?",
        "It is {t} now. What time is it {n} later?",
        "If it is {t}, what time will it be in {n}?",
        "What is the time {n} after {t}?",
        "A film starts at {t} and lasts {n}. When does it end?",
        "A trip starts at {t} and takes {n}. What time does it end?",
    ),
    commands=("Add {n} to {t}.", "Tell me the time {n} after {t}.", "Work out the time {n} after {t}."),
)
_ASK_YEAR = Phrasings(
    questions=(
        "What year is {n} years after {y}?",
        "What year comes {n} years after {y}?",
        "It is {y}. What year will it be in {n} years?",
        "If it is {y}, what year is it {n} years later?",
        "Which year is {n} years after {y}?",
        "{n} years after {y} is what year?",
    ),
    commands=(
        "Tell me the year {n} years after {y}.",
        "Add {n} years to {y}.",
        "Work out the year {n} years after {y}.",
    ),
)
_ASK_AGE = Phrasings(
    questions=(
        "{name} was born in {a}. How old does {name} turn in {b}?",
        "{name} was born in {a}. How old is {name} at the end of {b}?",
        "How old does someone born in {a} turn in {b}?",
        "If {name} was born in {a}, how old does {name} turn in {b}?",
        "How many years are there from {a} to {b}?",
        "How many years pass from {a} to {b}?",
        "How many years after {a} is {b}?",
    ),
    commands=("Count the years from {a} to {b}.", "Tell me how many years there are from {a} to {b}."),
)


def _direction(rng: random.Random) -> tuple[int, str]:
    return rng.choice(((1, "after"), (-1, "before")))


def _next_day(rng: random.Random) -> Problem:
    step, word = _direction(rng)
    index = rng.randrange(7)
    answer = DAYS[(index + step) % 7]
    if rng.random() < 0.3:
        prompt, template = ask_with_template(rng, _ASK_RELATIVE_DAY[step], d=DAYS[index])
        key = f"tomorrow:{step}:{DAYS[index]}:{template}"
        return Problem(prompt, f"{'Tomorrow is' if step > 0 else 'Yesterday was'} {answer}.", answer, key)
    prompt, template = ask_with_template(rng, _ASK_NEXT_DAY, w=word, d=DAYS[index])
    return Problem(prompt, f"The day {word} {DAYS[index]} is {answer}.", answer, f"day:{step}:{DAYS[index]}:{template}")


def _next_month(rng: random.Random) -> Problem:
    step, word = _direction(rng)
    month = rng.choice(MONTHS)
    answer = MONTHS[(MONTHS.index(month) + step) % 12]
    prompt, template = ask_with_template(rng, _ASK_NEXT_MONTH, w=word, d=month)
    return Problem(prompt, f"The month {word} {month} is {answer}.", answer, f"month:{step}:{month}:{template}")


def _month_length(rng: random.Random) -> Problem:
    index = rng.randrange(12)
    prompt, template = ask_with_template(rng, _ASK_MONTH_LENGTH, d=MONTHS[index])
    days = _MONTH_LENGTHS[index]
    return Problem(prompt, f"{MONTHS[index]} has {days} days.", str(days), f"month-length:{MONTHS[index]}:{template}")


def _days_later(rng: random.Random, fewest: int, most: int) -> Problem:
    """Whole weeks are taken off first, then the days are walked one by one."""
    step, word = _direction(rng)
    index, n = rng.randrange(7), rng.randint(fewest, most)
    rest = n % 7
    walk = ", ".join(DAYS[(index + step * i) % 7] for i in range(1, rest + 1))
    weeks = f"{n} - {n - rest} = {rest}" if n > 7 and rest else ""
    if not rest:
        weeks = f"{n} days is {n // 7} week{'s' if n > 7 else ''}"
    answer = DAYS[(index + step * n) % 7]
    reply = f"{'. '.join(part for part in (weeks, walk) if part)}. The answer is {answer}."
    return Problem(
        ask(rng, _ASK_DAYS_LATER, n=n, w=word, d=DAYS[index]), reply, answer, f"day:{step * n}:{DAYS[index]}"
    )


def _months_later(rng: random.Random) -> Problem:
    step, word = _direction(rng)
    index, n = rng.randrange(12), rng.randint(2, 6)
    walk = [MONTHS[(index + step * i) % 12] for i in range(1, n + 1)]
    prompt = ask(rng, _ASK_MONTHS_LATER, n=n, w=word, d=MONTHS[index])
    return Problem(
        prompt, f"{', '.join(walk)}. The answer is {walk[-1]}.", walk[-1], f"month:{step * n}:{MONTHS[index]}"
    )


def _clock_hours(rng: random.Random) -> Problem:
    hour, n = rng.randint(1, 12), rng.randint(1, 11)
    minute = rng.choice((0, 0, 15, 30, 45))
    later = hour + n
    wrapped = (later - 1) % 12 + 1
    working = f"{hour} + {n} = {later}" + (f", {later} - 12 = {wrapped}" if later > 12 else "")
    answer = f"{wrapped}:{minute:02d}"
    prompt = ask(rng, _ASK_CLOCK, n=f"{n} hour{'s' if n > 1 else ''}", t=f"{hour}:{minute:02d}")
    return Problem(prompt, f"{working}. The answer is {answer}.", answer, f"clock:{hour}:{minute}:{60 * n}")


def _clock_minutes(rng: random.Random, crosses_hour: bool) -> Problem:
    hour = rng.randint(1, 12)
    minute = 5 * rng.randint(2, 10)
    n = 5 * (rng.randint(12 - minute // 5, 11) if crosses_hour else rng.randint(1, 11 - minute // 5))
    total = minute + n
    working = f"{minute} + {n} = {total}"
    next_hour = hour
    if crosses_hour:
        next_hour = hour % 12 + 1
        working += f", {total} - 60 = {total - 60}"
    answer = f"{next_hour}:{total % 60:02d}"
    prompt = ask(rng, _ASK_CLOCK, n=f"{n} minutes", t=f"{hour}:{minute:02d}")
    return Problem(prompt, f"{working}. The answer is {answer}.", answer, f"clock:{hour}:{minute}:{n}")


def _year_later(rng: random.Random) -> Problem:
    year, n = rng.randint(1950, 2020), rng.randint(2, 20)
    prompt = ask(rng, _ASK_YEAR, n=n, y=year)
    return Problem(prompt, f"{year} + {n} = {year + n}.", str(year + n), f"year:{year}:{n}")


def _age(rng: random.Random) -> Problem:
    born, age = rng.randint(1950, 2010), rng.randint(2, 40)
    prompt = ask(rng, _ASK_AGE, name=rng.choice(NAMES), a=born, b=born + age)
    return Problem(prompt, f"{born + age} - {born} = {age}.", str(age), f"age:{born}:{age}")


BUILDERS: Builders = {
    1: (_next_day, _next_month, _month_length),
    2: (
        partial(_days_later, fewest=2, most=7),
        _months_later,
        _clock_hours,
        partial(_clock_minutes, crosses_hour=False),
        _year_later,
    ),
    3: (partial(_days_later, fewest=4, most=20), partial(_clock_minutes, crosses_hour=True), _age),
}
