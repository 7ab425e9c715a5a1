"""A router's training data: conversations as tokens, packed into rows that the decoder runs at once."""

# B rows, T tokens

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POOL_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Example:
    """One answer and everything before it: the first `num_prompt` of `ids` are given, the rest is learnt."""

    ids: tuple[int, ...]
    num_prompt: int


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """Examples end to end in rows, each attending only to itself (`RoutedDecoder.dense`'s `starts`)."""

    tokens: Tensor  # [B, T] int64
    begins: Tensor  # [B, T] bool: the first tokens of examples, and of the padding at a row's end
    in_answer: Tensor  # [B, T] bool

    @property
    def counted(self) -> Tensor:
        """[B, T] bool: the tokens whose next token is part of an answer."""
        return torch.nn.functional.pad(self.in_answer[:, 1:], (0, 1))

    def to(self, device: torch.device) -> "ExampleBatch":
        return ExampleBatch(self.tokens.to(device), self.begins.to(device), self.in_answer.to(device))


def packed_batches(examples: Iterator[Example], num_rows: int, num_tokens: int, seed: int) -> Iterator[ExampleBatch]:
    """Batches of `num_rows` rows of `num_tokens`; longer examples are cut. Ends with the examples. The same seed and
    examples give the same batches."""
    rng = random.Random(seed)
    rows: list[list[Example]] = []
    while True:
        pool = _take(examples, POOL_BATCHES * num_rows * num_tokens)
        if not pool and not rows:
            return
        rows += _fill_rows(pool, num_tokens)
        rng.shuffle(rows)
        while len(rows) >= num_rows or (rows and not pool):
            yield _batch(rows[:num_rows], num_tokens)
            del rows[:num_rows]


def packed_in_order(examples: Sequence[Example], num_rows: int, num_tokens: int) -> Iterator[ExampleBatch]:
    """All examples once, in order. Raises ValueError for an example that does not fit into a row."""
    rows: list[list[Example]] = []
    room = 0
    for example in examples:
        if len(example.ids) > num_tokens:
            raise ValueError(f"an example has {len(example.ids)} tokens, allowed are {num_tokens}")
        if len(example.ids) > room:
            rows.append([])
            room = num_tokens
        rows[-1].append(example)
        room -= len(example.ids)
    for start in range(0, len(rows), num_rows):
        yield _batch(rows[start : start + num_rows], num_tokens)


def _take(examples: Iterator[Example], num_tokens: int) -> list[Example]:
    taken: list[Example] = []
    total = 0
    for example in examples:
        taken.append(example)
        total += len(example.ids)
        if total >= num_tokens:
            break
    return taken


def _fill_rows(examples: Sequence[Example], num_tokens: int) -> list[list[Example]]:
    """Packs the longest examples first, each into the first row with room."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: len(e.ids), reverse=True):
        length = min(len(example.ids), num_tokens)
        index = next((i for i, free in enumerate(room) if free >= length), len(rows))
        if index == len(rows):
            rows.append([])
            room.append(num_tokens)
        rows[index].append(example)
        room[index] -= length
    return rows


def _batch(rows: Sequence[Sequence[Example]], num_tokens: int) -> ExampleBatch:
    tokens = torch.zeros(len(rows), num_tokens, dtype=torch.int64)
    begins = torch.zeros(len(rows), num_tokens, dtype=torch.bool)
    in_answer = torch.zeros(len(rows), num_tokens, dtype=torch.bool)
    for row, examples in enumerate(rows):
        end = 0
        for example in examples:
            start, end = end, min(end + len(example.ids), num_tokens)
            tokens[row, start:end] = torch.tensor(example.ids[: end - start])
            begins[row, start] = True
            in_answer[row, start + example.num_prompt : end] = True
        if end < num_tokens:
            begins[row, end] = True
    return ExampleBatch(tokens, begins, in_answer)
