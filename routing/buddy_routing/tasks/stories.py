"""Requests for a story, made from the story itself."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from buddy_routing.tasks.phrasing import Phrasings, ask
from buddy_routing.tasks.vocabulary import with_article


def _set_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_SENTENCE_START = re.compile('(?:^|[.!?:\n])[\\s"\'\u201c\u201d\u2018\u2019]*$|["\u201c\u2018]$')
_MIN_OCCURRENCES = 2

_NOT_NAMES = _set_of(
    "I Mom Dad Mommy Daddy Mum Mummy Papa Mama Grandma Grandpa Once One The They He She It But And So When "
    "Then You We Yes No Oh Ok Okay Hello Hi Thank Thanks Please What Why How Where Let Look Wow Monday "
    "Tuesday Wednesday Thursday Friday Saturday Sunday Christmas Mr Mrs Miss Sir Dr God TV End Moral"
)
_ADJECTIVES = _set_of(
    "amazing angry bad beautiful best better big black blue bossy brave bright broken brown busy careful "
    "cheap clean clear clever clumsy cold colorful cool cozy curious cute dark deep delicious different "
    "dirty dry empty enormous famous fancy fast favorite fluffy fresh friendly fun funny furry generous "
    "gentle giant golden good gray great green grey happy hard heavy helpful hot huge hungry important juicy "
    "kind large lazy little lonely long lost loud lovely magic magical mighty naughty new nice noisy old "
    "orange peaceful perfect pink polite poor pretty purple quiet rare real red rich rough round sad safe "
    "scary shiny short shy silly silver simple sleepy small smart smooth soft special sparkly spicy strange "
    "strong sweet tall tasty thick thin thirsty tiny ugly unusual useful warm wet white wide wild wise "
    "wonderful wooden yellow young yummy"
)
# Nouns too vague, too common or too abstract to ask a story about.
_NOT_THINGS = _ADJECTIVES | _set_of(
    "adventure afternoon bath bit boy brother call chance child choice couple course dad daddy day deal "
    "decision distance evening face father few friend game girl grandma grandpa group hand home hour house "
    "hug idea job kid land lesson look lot man mess middle minute mom moment mommy month mother nap night "
    "noise pair part pile place plan problem question reason rest ride show side sister smile sound step "
    "story surprise task team thing time trip trouble try turn voice walk way week while woman word work "
    "world year name one room figure "
    "print mark can will"
)

_THING_PHRASE = re.compile(
    rf"\b(?:a|an)\s+(?:(?:{'|'.join(sorted(_ADJECTIVES))})\s+)?(?P<thing>[a-z]{{3,12}})"
    r"(?=[.,!?;]|\s+(?:and|or|but|in|on|at|with|for|from|of|that|who|was|is|had|were|named|called|under|near|into|by)\b)"
)

_ASK_NAME_THING = Phrasings(
    questions=(
        "I want a story about {name} and {thing}.",
        "Do you know a story about {name} and {thing}?",
        "I would like to read about {name} and {thing}.",
    ),
    commands=(
        "Tell me a story about {name} and {thing}.",
        "Write a short story about {name} and {thing}.",
        "Write a story where {name} sees {thing}.",
        "Make up a story about {name} with {thing} in it.",
        "Tell a short story with {name} and {thing}.",
        "Write a children's story about {name} and {thing}.",
    ),
)
_ASK_NAME = Phrasings(
    questions=(
        "I want to hear a story about {name}.",
        "Do you know a story about {name}?",
        "A story about {name}?",
    ),
    commands=(
        "Tell me a story about {name}.",
        "Write a story about {name}.",
        "Write a short story with {name} in it.",
        "Make up a story about {name}.",
        "Tell a story where the main character is called {name}.",
    ),
)
_ASK_THING = Phrasings(
    questions=("I want a story about {thing}.", "Do you know a story with {thing}?"),
    commands=(
        "Tell me a story about {thing}.",
        "Tell a story with {thing} in it.",
        "Write a short story about {thing}.",
        "Write a story that has {thing} in it.",
        "Make up a story about {thing}.",
    ),
)
_ASK_TWO_THINGS = Phrasings(
    questions=("Do you know a story about {thing} and {other}?",),
    commands=(
        "Tell me a story about {thing} and {other}.",
        "Write a story with {thing} and {other} in it.",
        "Make up a short story about {thing} and {other}.",
    ),
)
_ASK_ANY = Phrasings(
    questions=("I want to hear a story.", "Do you know a story?", "Can I have a story?"),
    commands=(
        "Tell me a story.",
        "Write a short story.",
        "Tell me a bedtime story.",
        "Make up a story for me.",
        "Write a story for a child.",
    ),
)


@dataclass(frozen=True, slots=True)
class StoryTask:
    """A request, the story that answers it, and the words a story must mention to answer it."""

    prompt: str
    reply: str
    required: tuple[str, ...]


def story_requests(stories: Sequence[str], seed: int) -> Iterator[StoryTask]:
    """One request for each story, in order; the same for the same stories and seed."""
    rng = random.Random(seed)
    for story in stories:
        name, things = main_character(story), story_things(story)
        yield _request(rng, story, name, things)


def _request(rng: random.Random, story: str, name: str | None, things: Sequence[str]) -> StoryTask:
    draw = rng.random()
    thing = rng.choice(things) if things else None
    if name and thing and draw < 0.45:
        prompt = ask(rng, _ASK_NAME_THING, name=name, thing=with_article(thing))
        return StoryTask(prompt, story, (name, thing))
    if name and draw < 0.65:
        return StoryTask(ask(rng, _ASK_NAME, name=name), story, (name,))
    if len(things) >= 2 and draw < 0.75:
        first, second = things[:2]
        prompt = ask(rng, _ASK_TWO_THINGS, thing=with_article(first), other=with_article(second))
        return StoryTask(prompt, story, (first, second))
    if thing and draw < 0.92:
        return StoryTask(ask(rng, _ASK_THING, thing=with_article(thing)), story, (thing,))
    return StoryTask(ask(rng, _ASK_ANY), story, ())


def main_character(story: str) -> str | None:
    """The most frequent word that is always capitalised and does so at least once inside a sentence."""
    counts: Counter[str] = Counter()
    inside_sentence: set[str] = set()
    for match in _WORD.finditer(story):
        word = match.group().removesuffix("'s")
        counts[word] += 1
        if not _SENTENCE_START.search(story[max(0, match.start() - 8) : match.start()]):
            inside_sentence.add(word)
    names = {
        word: counts[word]
        for word in sorted(inside_sentence)
        if word.istitle() and len(word) > 1 and word not in _NOT_NAMES and word.lower() not in counts
    }
    name = max(names, key=lambda word: names[word], default="")
    return name if names.get(name, 0) >= _MIN_OCCURRENCES else None


def story_things(story: str) -> tuple[str, ...]:
    """Up to two concrete things that the story mentions at least twice, most frequent first.

    A thing is a word that once ends a phrase like "a ball" or "a big ball": behind the article there is at
    most one known adjective, and what follows is punctuation or a word that cannot continue the phrase.
    """
    counts = Counter(_WORD.findall(story))
    candidates = dict.fromkeys(match["thing"] for match in _THING_PHRASE.finditer(story))
    frequent = [word for word in candidates if counts[word] >= _MIN_OCCURRENCES and word not in _NOT_THINGS]
    return tuple(sorted(frequent, key=lambda word: -counts[word])[:2])


def mentions_required(task: StoryTask, reply: str) -> bool:
    """Whether each required word occurs in the reply as a word, in any case; a plural "s" is allowed."""
    return all(re.search(rf"\b{re.escape(word)}(?:s|es)?\b", reply, re.IGNORECASE) for word in task.required)
