"""Folds the events of an answer into deltas, which every endpoint renders in its own format."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Literal

from buddy_server.engine.messages import AnswerEvent, FinishEvent, PromptEvent, TokenEvent
from buddy_server.tools.pieces import CallPiece, Piece, TextPiece, ToolParser

AnswerEnd = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class Delta:
    """What events that arrived together add to one answer.

    Neighbouring `pieces` never belong to the same text or the same call. `tokens` are those whose log probabilities
    were requested, `prompt` has those of the prompt. The last delta of an answer has its `finish_reason`.
    """

    pieces: list[Piece] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    prompt: PromptEvent | None = None
    finish_reason: AnswerEnd | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces if isinstance(piece, TextPiece))

    @property
    def calls(self) -> list[CallPiece]:
        return [piece for piece in self.pieces if isinstance(piece, CallPiece)]


class Fold:
    """The fold of one answer: its events become its deltas. With a `parser`, its text may contain tool calls. If only
    the prompt is scored, the answer's own tokens are dropped."""

    def __init__(self, parser: ToolParser | None = None, scores_only: bool = False) -> None:
        self._parser = parser
        self._scores_only = scores_only
        self._has_calls = False

    def add(self, events: list[AnswerEvent]) -> Delta:
        """The delta of `events`, which arrived together. None of them reports a failure."""
        delta, texts = Delta(), []
        for event in events:
            if isinstance(event, PromptEvent):
                delta.prompt = event
            elif not self._scores_only:
                texts.append(event.text)
                if isinstance(event, TokenEvent) and event.logprob is not None:
                    delta.tokens.append(event)
        last = events[-1]
        has_ended = isinstance(last, FinishEvent)
        delta.pieces = self._pieces("".join(texts), has_ended)
        if isinstance(last, FinishEvent):
            delta.finish_reason = self._end(last)
        return delta

    def _pieces(self, text: str, has_ended: bool) -> list[Piece]:
        if self._parser is None:
            return [TextPiece(text)] if text else []
        pieces = self._parser.add(text)
        if has_ended:
            pieces = pieces + self._parser.finish()
        self._has_calls = self._has_calls or any(isinstance(piece, CallPiece) for piece in pieces)
        return _merged(pieces)

    def _end(self, finish: FinishEvent) -> AnswerEnd:
        assert finish.reason in ("stop", "length"), f"a failure, {finish.reason}, is no part of an answer"
        # A call that was cut off is not complete, so "length" stays.
        return "tool_calls" if self._has_calls and finish.reason == "stop" else finish.reason


def total(deltas: Iterable[Delta]) -> Delta:
    """The whole answer, as the one delta that all its `deltas` add up to."""
    deltas = list(deltas)
    return Delta(
        pieces=_merged(chain.from_iterable(delta.pieces for delta in deltas)),
        tokens=[token for delta in deltas for token in delta.tokens],
        prompt=next((delta.prompt for delta in deltas if delta.prompt), None),
        finish_reason=deltas[-1].finish_reason,
    )


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    """`pieces` with neighbours of the same text or call joined, and without empty texts."""
    merged: list[Piece] = []
    some = (piece for piece in pieces if isinstance(piece, CallPiece) or piece.text)
    for _, group in groupby(some, key=lambda piece: piece.index if isinstance(piece, CallPiece) else None):
        together = list(group)
        calls = [piece for piece in together if isinstance(piece, CallPiece)]
        if calls:
            merged.append(CallPiece(calls[0].index, calls[0].name, "".join(call.arguments for call in calls)))
        else:
            merged.append(TextPiece("".join(piece.text for piece in together if isinstance(piece, TextPiece))))
    return merged
