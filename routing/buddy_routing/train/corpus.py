"""The texts from which the embedded model learns, as documents and as packed token arrays.

Sources and licences are in DATA.md, next to the texts. Every source is split by position: the model never sees the last
twentieth of its documents, of which one half is held out and the other for validation. Tasks have their own split
(buddy_routing.tasks).
"""

import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from tqdm import tqdm

from buddy_routing.tasks import Split, sample_tasks, story_requests
from buddy_routing.train.demo_plan import BOOKS, INSTRUCTIONS, KIDS_STORIES, TINY_STORIES, WORD_PROBLEMS
from buddy_routing.train.document import Document
from buddy_routing.train.tokenizer import TrainingTokenizer

T = TypeVar("T")
SEPARATOR = "<|endoftext|>"
BOOK_PIECE_CHARS = 1000
CONVERSATION_SHARE = 0.2
"""Share of the answers to tasks after which the conversation continues."""
SYSTEM_SHARE = 0.08
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are Buddy.",
    "Be kind.",
    "Answer briefly.",
    "You are a friendly teacher.",
    "You help children with their homework.",
)


@dataclass(frozen=True)
class Corpus:
    """The documents of one split of the data directory."""

    directory: Path
    split: Split

    def _part(self, documents: Sequence[str]) -> Sequence[str]:
        cut = len(documents) - len(documents) // 20
        half = (cut + len(documents)) // 2
        parts = {"train": documents[:cut], "heldout": documents[cut:half], "validation": documents[half:]}
        return parts[self.split]

    def _stories_of(self, name: str) -> Sequence[str]:
        text = (self.directory / name).read_text(encoding="utf-8")
        return self._part([story.strip() for story in text.split(SEPARATOR) if len(story.strip()) > 100])

    @cached_property
    def tiny_stories(self) -> Sequence[str]:
        return self._stories_of(TINY_STORIES)

    @cached_property
    def kids_stories(self) -> Sequence[str]:
        # Line breaks follow the pages of a picture book, not the sentences.
        return [re.sub(r"\s*\n\s*", " ", story) for story in self._stories_of(KIDS_STORIES)]

    @cached_property
    def book_pieces(self) -> Sequence[str]:
        """Books, cut at paragraphs into pieces of about a context length."""
        pieces: list[str] = []
        with tarfile.open(self.directory / BOOKS) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                file = archive.extractfile(member) if member.name.endswith(".md") else None
                if file is not None:
                    pieces.extend(_book_pieces(file.read().decode("utf-8")))
        return self._part(pieces)

    @cached_property
    def instructions(self) -> Sequence[Document]:
        rows = json.loads((self.directory / INSTRUCTIONS).read_text(encoding="utf-8"))
        packed = [json.dumps(row) for row in rows]
        documents = []
        for row in map(json.loads, self._part(packed)):
            prompt = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
            documents.append(Document(row["output"], prompt))
        return documents

    @cached_property
    def word_problems(self) -> Sequence[Document]:
        lines = self._part((self.directory / WORD_PROBLEMS).read_text(encoding="utf-8").splitlines())
        documents = []
        for row in map(json.loads, lines):
            working = re.sub(r"<<.*?>>", "", row["answer"]).replace("\n#### ", "\nThe answer is ")
            documents.append(Document(working + ".", row["question"]))
        return documents

    def plain(self, kind: Literal["stories", "books"]) -> Callable[[random.Random], Iterator[Document]]:
        texts = self.book_pieces if kind == "books" else [*self.tiny_stories, *self.kids_stories]
        return lambda rng: (Document(text) for text in _endlessly(texts, rng))

    def conversations(
        self, kind: Literal["instructions", "word_problems"]
    ) -> Callable[[random.Random], Iterator[Document]]:
        documents = self.instructions if kind == "instructions" else self.word_problems
        return lambda rng: _endlessly(documents, rng)

    def tasks(self, rng: random.Random) -> Iterator[Document]:
        """Questions, some after a system message or later in a conversation."""
        while True:
            earlier: list[tuple[str, str]] = []
            for task in sample_tasks(rng.getrandbits(63), 10_000, split=self.split):
                system = [("system", rng.choice(SYSTEM_MESSAGES))] if rng.random() < SYSTEM_SHARE else []
                yield Document(task.reply, task.prompt, (*system, *earlier))
                earlier += [("user", task.prompt), ("assistant", task.reply)]
                if rng.random() > CONVERSATION_SHARE:
                    earlier = []

    def told_stories(self, rng: random.Random) -> Iterator[Document]:
        """Stories that answer requests naming their content."""
        while True:
            for request in story_requests(self.tiny_stories, rng.getrandbits(63)):
                yield Document(request.reply, request.prompt)

    def router_mix(self, seed: int) -> Iterator[Document]:
        """Conversations for training a router: tasks and stories, in the form in which users ask them."""
        rng = random.Random(seed)
        tasks, stories = (
            self.tasks(random.Random(rng.random())),
            self.told_stories(random.Random(rng.random())),
        )
        while True:
            yield next(stories) if rng.random() < 0.25 else next(tasks)


def _book_pieces(text: str) -> Iterator[str]:
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += " ".join(paragraph.split()) + "\n"
        if len(piece) >= BOOK_PIECE_CHARS:
            yield piece.strip()
            piece = ""


def _endlessly(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    order = list(items)
    while True:
        rng.shuffle(order)
        yield from order


Mixture = Mapping[str, float]
"""Shares of tokens by source name (they need not sum to one)."""

# Tasks come first: they need the most examples, and the few stories repeat several times anyway.
PRETRAIN: Mixture = {
    "tasks": 64,
    "told_stories": 16,
    "stories": 8,
    "books": 5,
    "instructions": 3,
    "word_problems": 4,
}
TUNE: Mixture = {"tasks": 66, "told_stories": 24, "instructions": 5, "word_problems": 3, "stories": 2}


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Documents end to end. `begins` marks their first tokens. `counted` marks the tokens of answers and plain texts:
    their prediction is trained, and they are routed one by one, as the server routes generated tokens."""

    tokens: np.ndarray  # [num_tokens] uint16
    begins: np.ndarray  # [num_tokens] bool
    counted: np.ndarray  # [num_tokens] bool

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, tokens=self.tokens, begins=self.begins, counted=self.counted)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "PackedTokens":
        with np.load(path) as arrays:
            return cls(arrays["tokens"], arrays["begins"], arrays["counted"])

    def batch(self, step: int, batch_size: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Batch number `step`: tokens, begins and counted, [batch_size, num_tokens + 1]; wraps around at the end."""
        rows = (step * batch_size + np.arange(batch_size))[:, None] * num_tokens
        index = (rows + np.arange(num_tokens + 1)) % len(self.tokens)
        return self.tokens[index].astype(np.int64), self.begins[index], self.counted[index]


def pack(corpus: Corpus, mixture: Mixture, tokenizer: TrainingTokenizer, num_tokens: int, seed: int) -> PackedTokens:
    """At least `num_tokens` of documents drawn from the mixture; the same seed gives the same tokens."""
    makers: dict[str, Callable[[random.Random], Iterator[Document]]] = {
        "tasks": corpus.tasks,
        "stories": corpus.plain("stories"),
        "told_stories": corpus.told_stories,
        "books": corpus.plain("books"),
        "instructions": corpus.conversations("instructions"),
        "word_problems": corpus.conversations("word_problems"),
    }
    rng = random.Random(seed)
    streams = {name: makers[name](random.Random(rng.getrandbits(63))) for name in mixture}
    written = dict.fromkeys(streams, 1.0)
    tokens: list[np.ndarray] = []
    begins: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    total = 0
    with tqdm(total=num_tokens, desc="tokens", unit="tok", unit_scale=True) as bar:
        while total < num_tokens:
            # The source furthest below its share is next; a few documents at a time keep the order mixed.
            name = min(streams, key=lambda source: written[source] / mixture[source])
            for _ in range(4):
                ids, is_answer = tokenizer.encode_document(next(streams[name]))
                tokens.append(np.array(ids, dtype=np.uint16))
                begins.append(np.arange(len(ids)) == 0)
                counted.append(np.array(is_answer))
                written[name] += len(ids)
                total += len(ids)
                bar.update(len(ids))
    return PackedTokens(np.concatenate(tokens), np.concatenate(begins), np.concatenate(counted))
