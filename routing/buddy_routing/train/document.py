"""A unit of training data: a piece of text, or an answer in a conversation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A text to model or, with `prompt`, the answer to it, after the messages (role, content) of `history`."""

    text: str
    prompt: str | None = None
    history: tuple[tuple[str, str], ...] = ()
