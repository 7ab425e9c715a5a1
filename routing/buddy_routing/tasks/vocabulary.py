"""The words that tasks are made of: short, common, and known to a model trained on children's stories."""

from functools import cache


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: tuple[str, ...] = _split(
    "Tom Lily Ben Mia Sam Anna Max Lucy Tim Sue Jack Sara Leo Emma Bob Amy Dan Kate Nick Rosa Finn Ella Joe "
    "Jane Mark Nora Paul Ruby Adam Zoe Omar Lena Carl Ivy Luke Maya Peter Grace Jim Molly"
)

# Countable nouns with regular plurals that a person can own, buy or give away.
THINGS: tuple[str, ...] = _split(
    "apple pear orange banana lemon cookie cake egg nut carrot book pen pencil card coin ball toy car block "
    "stamp shell stone flower balloon marble sticker candle button box cup plate bag hat ring kite doll drum "
    "ribbon badge bottle"
)

ANIMALS: tuple[str, ...] = _split(
    "cat dog cow pig hen duck horse bird rabbit frog bear fox lion goat bee ant monkey tiger turtle snake"
)

OTHER_NOUNS: tuple[str, ...] = _split(
    "sun moon star tree arm hand house boat train bus road river hill garden park school farm shop door "
    "window table chair bed lamp clock phone spoon dish dress shirt coat bench brush watch bush baby city "
    "story cherry puppy pony berry lady party penny family king queen girl boy friend teacher doctor farmer "
    "baker sister brother song game rope gift nest seed rock cloud bridge castle ship plane truck wheel "
    "rocket robot basket bucket pocket jacket blanket pillow mirror ladder hammer finger letter number "
    "picture market forest island mountain kitten planet"
)

NOUNS: tuple[str, ...] = tuple(dict.fromkeys(THINGS + ANIMALS + OTHER_NOUNS))

ADJECTIVES: tuple[str, ...] = _split(
    "big small red blue green old new happy sad fast slow soft hot cold tall short kind brave quiet funny"
)

WORDS: tuple[str, ...] = tuple(dict.fromkeys(NOUNS + ADJECTIVES))

VERBS_OF_ACTION: tuple[str, ...] = _split("sat ran slept played jumped hid walked stood danced ate")

PLACES: tuple[str, ...] = (
    "at home",
    "in the park",
    "by the river",
    "near the door",
    "under the tree",
    "on the hill",
    "in the garden",
    "all day",
    "outside",
    "again",
)

NUMBER_WORDS: tuple[str, ...] = _split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


@cache
def words_of_length(shortest: int, longest: int) -> tuple[str, ...]:
    """The words with `shortest` to `longest` letters, both included."""
    return tuple(word for word in WORDS if shortest <= len(word) <= longest)


def plural(noun: str) -> str:
    """The regular English plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(noun: str) -> str:
    """The noun behind "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
