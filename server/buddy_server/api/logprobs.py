"""Log probabilities as JSON has them."""

from collections.abc import Iterable
from typing import Any

from buddy_server.engine.messages import TokenEvent, TokenLogprob
from buddy_server.tokenizer import ChatTokenizer

LOWEST_LOGPROB = -9999.0
"""OpenAI's value for "never"; JSON has no infinity."""


def logprob_entries(tokens: Iterable[TokenEvent], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """One entry per token, as in chat completions."""
    return [
        _entry(event.logprob, tokenizer) | {"top_logprobs": [_entry(other, tokenizer) for other in event.top_logprobs]}
        for event in tokens
        if event.logprob is not None
    ]


def json_logprob(token: TokenLogprob) -> float:
    """The log probability of `token` as a number that JSON has; LOWEST_LOGPROB for what is not a number as well."""
    # In this order: the first stays unless the second is greater, which NaN never is.
    return max(LOWEST_LOGPROB, token.logprob)


def _entry(token: TokenLogprob, tokenizer: ChatTokenizer) -> dict[str, Any]:
    known: bytes | None = token.token.encode()
    if "\ufffd" in token.token:
        # Stands for part of a character, whose bytes cannot be recovered from the text.
        known = tokenizer.token_bytes(token.token_id)
    return {
        "token": token.token,
        "logprob": json_logprob(token),
        "bytes": None if known is None else list(known),
    }
