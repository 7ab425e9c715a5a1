"""The task a model is asked, and the split its underlying problem belongs to."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "heldout"]

SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")
LEVELS: tuple[int, ...] = (1, 2, 3)

NUM_PARTS = 32
"""Parts of all problems, of which one is for validation and one is held out."""


@dataclass(frozen=True, slots=True)
class Task:
    """One request with its reference reply.

    `level` runs from 1 (easy) to 3 (hard). `answer` is what `is_correct` looks for at the end of a reply.
    `key` names the underlying problem, for example "add:34:25"; what is known by heart has its phrasing behind.
    """

    family: str
    level: int
    prompt: str
    reply: str
    answer: str
    key: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What a builder draws: a `Task` that does not yet know its family and level."""

    prompt: str
    reply: str
    answer: str
    key: str


Builder = Callable[[random.Random], Problem]
Builders = Mapping[int, tuple[Builder, ...]]  # level -> the kinds of problem drawn at that level


def split_of(key: str) -> Split:
    """The split of a problem, by hash, the same on every machine. The model is trained on the first, what chooses for
    the model on problems new to it (the Budget Predictor) on the second, and results are measured on the third."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    parts: Mapping[int, Split] = {0: "heldout", NUM_PARTS // 2: "validation"}
    return parts.get(int.from_bytes(digest, "big") % NUM_PARTS, "train")
