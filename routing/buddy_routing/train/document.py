"""What a model is trained on, one piece of text or one answer in a conversation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """Text to model, or the answer to `prompt` when one is given, after the messages (role, content) of `history`."""

    text: str
    prompt: str | None = None
    history: tuple[tuple[str, str], ...] = ()
