"""Small everyday facts.

A fact cannot be guessed, so the facts themselves are all in the training split; what is held out is the
pair of a fact and a phrasing template. Held-out accuracy therefore says whether a known fact is found again
when it is asked in a way it was never asked in before.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from buddy_routing.tasks.phrasing import Phrasings, ask_with_template
from buddy_routing.tasks.task import Builders, Problem
from buddy_routing.tasks.vocabulary import with_article


@dataclass(frozen=True, slots=True)
class _FactKind:
    """Facts of one shape: subject -> answer; `reply` has {s} and {a} and ends with the answer."""

    name: str
    phrasings: Phrasings
    reply: str
    facts: Mapping[str, str]


def _pairs(text: str) -> dict[str, str]:
    """Reads "subject=answer" entries separated by commas."""
    return {subject: answer for part in text.split(", ") for subject, answer in [part.split("=")]}


_COLOURS = _FactKind(
    "colour",
    Phrasings(
        questions=(
            "What color is {s}?",
            "What colour is {s}?",
            "Which color is {s}?",
            "What is the color of {s}?",
            "What's the colour of {s}?",
            "Do you know what color {s} is?",
            "What color is {s} most of the time?",
            "What color is {s} usually?",
        ),
        commands=("Tell me the color of {s}.", "Name the colour of {s}.", "Say what color {s} is."),
    ),
    "{s} is {a}.",
    _pairs(
        "a banana=yellow, the sky=blue, grass=green, snow=white, a lemon=yellow, a carrot=orange, a "
        "strawberry=red, a cherry=red, milk=white, coal=black, chocolate=brown, the sun=yellow, a "
        "leaf=green, a frog=green, a tomato=red, blood=red, the sea=blue, a pumpkin=orange, a flamingo=pink, "
        "a polar bear=white, a crow=black, an elephant=gray, a cucumber=green, a swan=white, a fire "
        "truck=red, a plum=purple, salt=white, a pea=green, a ripe orange=orange"
    ),
)
_SOUNDS = _FactKind(
    "sound",
    Phrasings(
        questions=(
            "What does {s} say?",
            "What sound does {s} make?",
            "Which sound does {s} make?",
            "What noise does {s} make?",
            "How does {s} sound?",
            "What sound comes from {s}?",
            "Do you know what {s} says?",
            "What is the sound of {s}?",
        ),
        commands=("Tell me what {s} says.", "Make the sound of {s}.", "Say what sound {s} makes."),
    ),
    "{s} says {a}.",
    _pairs(
        "a cow=moo, a dog=woof, a cat=meow, a duck=quack, a sheep=baa, a pig=oink, a bee=buzz, a "
        "frog=ribbit, a horse=neigh, a lion=roar, an owl=hoot, a snake=hiss, a mouse=squeak, a hen=cluck, a "
        "chick=peep, a wolf=howl, a rooster=cock-a-doodle-doo, a turkey=gobble, a bird=tweet, a crow=caw"
    ),
)
_OPPOSITE_PAIRS = (
    "hot cold, big small, up down, day night, good bad, happy sad, fast slow, new old, wet dry, open closed, "
    "full empty, hard soft, high low, long short, light dark, loud quiet, rich poor, strong weak, thick "
    "thin, early late, in out, left right, near far, clean dirty, true false, first last, sweet sour, heavy "
    "light, on off, push pull, black white, start stop, win lose, love hate, buy sell, give take, young old, "
    "before after, always never"
)
_OPPOSITES = _FactKind(
    "opposite",
    Phrasings(
        questions=(
            "What is the opposite of {s}?",
            "What's the opposite of '{s}'?",
            "Which word is the opposite of {s}?",
            "What word means the opposite of {s}?",
            "Do you know the opposite of {s}?",
            "What is the opposite word to {s}?",
            "The opposite of {s} is what?",
        ),
        commands=(
            "Tell me the opposite of {s}.",
            "Give me a word that means the opposite of '{s}'.",
            "Name the opposite of the word {s}.",
            "Say the opposite of {s}.",
        ),
    ),
    "The opposite of {s} is {a}.",
    {first: second for pair in _OPPOSITE_PAIRS.split(", ") for first, second in [pair.split()]}
    | _pairs(
        "cold=hot, small=big, down=up, night=day, bad=good, sad=happy, slow=fast, dry=wet, empty=full, "
        "soft=hard, low=high"
    )
    | _pairs(
        "short=long, dark=light, quiet=loud, poor=rich, weak=strong, late=early, out=in, right=left, "
        "far=near, last=first"
    ),
)
_YOUNG = _FactKind(
    "young",
    Phrasings(
        questions=(
            "What is a baby {s} called?",
            "What do you call a baby {s}?",
            "What is a young {s} called?",
            "What do we call a young {s}?",
            "What is the name for a baby {s}?",
            "What is the young of a {s} called?",
            "Do you know the word for a baby {s}?",
            "A baby {s} is called what?",
        ),
        commands=(
            "Tell me what a baby {s} is called.",
            "Name the baby of a {s}.",
            "Give me the word for a young {s}.",
        ),
    ),
    "A baby {s} is called a {a}.",
    _pairs(
        "dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb, chicken=chick, duck=duckling, pig=piglet, "
        "bear=cub, lion=cub, frog=tadpole, goat=kid, kangaroo=joey, deer=fawn, goose=gosling, swan=cygnet, "
        "tiger=cub, fox=cub, whale=calf"
    ),
)
_LEGS = _FactKind(
    "legs",
    Phrasings(
        questions=(
            "How many legs does {s} have?",
            "How many legs has {s}?",
            "How many legs are on {s}?",
            "What number of legs does {s} have?",
            "How many legs do you see on {s}?",
            "Do you know how many legs {s} has?",
        ),
        commands=("Tell me how many legs {s} has.", "Count the legs of {s}.", "Say how many legs {s} has."),
    ),
    "{s} has {a} legs.",
    _pairs(
        "a dog=4, a cat=4, a spider=8, an ant=6, a bird=2, a person=2, a bee=6, a horse=4, a cow=4, a "
        "duck=2, a hen=2, a fly=6, a sheep=4, a pig=4, a snake=0, a fish=0, an elephant=4, a lion=4, a "
        "butterfly=6, a worm=0"
    ),
)
_ROUTINES = _FactKind(
    "time",
    Phrasings(
        questions=(
            "What do you call {s}?",
            "What is {s}?",
            "What's {s}?",
            "What is the word for {s}?",
            "Do you know {s}?",
            "What is the name of {s}?",
        ),
        commands=("Tell me {s}.", "Name {s}.", "Give me the name of {s}."),
    ),
    "It is {a}.",
    _pairs(
        "the coldest season=winter, the hottest season=summer, the season after winter=spring, the season "
        "after spring=summer, the season after summer=autumn, the season after autumn=winter, the season "
        "before winter=autumn, the season when leaves fall=autumn, the season when snow falls=winter, the "
        "meal we eat in the morning=breakfast, the meal we eat at noon=lunch, the meal we eat in the "
        "evening=dinner, the time of day when the sun rises=morning, the time of day when we sleep=night, "
        "the middle of the day=noon, the middle of the night=midnight, the first month of the year=January, "
        "the last month of the year=December, the largest planet=Jupiter, the planet we live on=Earth, the "
        "red planet=Mars, the largest ocean=the Pacific, the largest animal=the blue whale, the tallest "
        "animal=the giraffe, the fastest land animal=the cheetah, the tallest mountain=Mount Everest, the "
        "first letter of the alphabet=A, the last letter of the alphabet=Z, the room where we cook=the "
        "kitchen, the room where we sleep=the bedroom, the color of red and yellow mixed=orange, the color "
        "of blue and yellow mixed=green, the color of red and blue mixed=purple, the food that bees "
        "make=honey, the animal that gives us wool=the sheep, the bird that cannot fly and lives on ice=the "
        "penguin, frozen water=ice"
    ),
)
_CAPITALS = _FactKind(
    "capital",
    Phrasings(
        questions=(
            "What is the capital of {s}?",
            "What's the capital of {s}?",
            "What is the capital city of {s}?",
            "Which city is the capital of {s}?",
            "What city is {s}'s capital?",
            "Do you know the capital of {s}?",
            "The capital of {s} is which city?",
            "Which is the capital city of {s}?",
            "What is the name of the capital of {s}?",
        ),
        commands=(
            "Tell me the capital of {s}.",
            "Name the capital of {s}.",
            "Give me the capital city of {s}.",
            "Say what the capital of {s} is.",
        ),
    ),
    "The capital of {s} is {a}.",
    _pairs(
        "France=Paris, England=London, Germany=Berlin, Italy=Rome, Spain=Madrid, Portugal=Lisbon, "
        "Austria=Vienna, Greece=Athens, Poland=Warsaw, Sweden=Stockholm, Norway=Oslo, Denmark=Copenhagen, "
        "Finland=Helsinki, Ireland=Dublin, Belgium=Brussels, Hungary=Budapest, Russia=Moscow, Ukraine=Kyiv, "
        "Turkey=Ankara, Egypt=Cairo, Kenya=Nairobi, Nigeria=Abuja, Morocco=Rabat, Ghana=Accra, "
        "China=Beijing, Japan=Tokyo, India=New Delhi, Thailand=Bangkok, Vietnam=Hanoi, Iran=Tehran, "
        "Iraq=Baghdad, Canada=Ottawa, Mexico=Mexico City, Brazil=Brasilia, Peru=Lima, Chile=Santiago, "
        "Argentina=Buenos Aires, Cuba=Havana, Australia=Canberra, New Zealand=Wellington, "
        "Scotland=Edinburgh, Nepal=Kathmandu"
    ),
)
_MEMBERS = {
    "animal": "dog cat cow horse lion tiger rabbit frog snake monkey elephant bear sheep pig goat",
    "fruit": "apple banana pear lemon plum cherry peach mango melon",
    "vegetable": "carrot potato onion cabbage pea leek",
    "toy": "doll kite teddy yo-yo puzzle",
    "vehicle": "car bus train truck bike boat plane",
    "tool": "hammer saw drill shovel screwdriver",
    "color": "red blue green yellow pink purple",
}
_CATEGORIES = {member: category for category, members in _MEMBERS.items() for member in members.split()}
_ASK_CATEGORY = Phrasings(
    questions=(
        "Is {s} {x} or {y}?",
        "What is {s}, {x} or {y}?",
        "Would you call {s} {x} or {y}?",
        "Which is right: is {s} {x} or {y}?",
        "Do you think {s} is {x} or {y}?",
        "What kind of thing is {s}: {x} or {y}?",
        "{s} is what: {x} or {y}?",
    ),
    commands=(
        "Tell me if {s} is {x} or {y}.",
        "Say whether {s} is {x} or {y}.",
        "Decide if {s} is {x} or {y}.",
    ),
)


def _fact(rng: random.Random, kind: _FactKind) -> Problem:
    subject = rng.choice(list(kind.facts))
    answer = kind.facts[subject]
    prompt, template = ask_with_template(rng, kind.phrasings, s=subject)
    reply = kind.reply.format(s=subject, a=answer)
    bare_answer = answer.removeprefix("the ")
    return Problem(prompt, reply[0].upper() + reply[1:], bare_answer, f"{kind.name}:{subject}:{template}")


def _category(rng: random.Random) -> Problem:
    """The wrong choice and the order of the two choices do not make it another fact."""
    member = rng.choice(list(_CATEGORIES))
    answer = _CATEGORIES[member]
    wrong = rng.choice([category for category in _MEMBERS if category != answer])
    subject = member if answer == "color" else with_article(member)
    first, second = rng.sample((with_article(answer), with_article(wrong)), 2)
    prompt, template = ask_with_template(rng, _ASK_CATEGORY, s=subject, x=first, y=second)
    reply = f"{subject[0].upper()}{subject[1:]} is {with_article(answer)}."
    return Problem(prompt, reply, answer, f"category:{member}:{template}")


BUILDERS: Builders = {
    1: (partial(_fact, kind=_COLOURS), partial(_fact, kind=_SOUNDS), partial(_fact, kind=_OPPOSITES)),
    2: (partial(_fact, kind=_YOUNG), partial(_fact, kind=_LEGS), _category),
    3: (partial(_fact, kind=_ROUTINES), partial(_fact, kind=_CAPITALS)),
}
