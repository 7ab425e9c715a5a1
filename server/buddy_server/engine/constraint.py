"""Keeps answers within their grammars, by llguidance. Does not import torch."""

import ctypes
from collections.abc import Collection
from functools import cached_property, lru_cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

MOST_COMPILED = 32
"""Grammars kept, since clients use the same few again and again."""
MOST_MESSAGE_CHARS = 300
_IN_GRAMMAR = "failed to compile JSON schema: "


class GrammarError(Exception):
    """A grammar that cannot be used, and why: it has a mistake, allows no text, or takes too much time."""


class Constraint:
    """What one answer may go on with: a buddy_kernels.Constraint.

    `num_accepted` counts the tokens that the grammar took. It takes no more where the next mask would need too much
    work, or tokens that only the tokenizer has, and not the model: `error` says so. `vocab_size` is the model's.
    """

    def __init__(self, matcher: LLMatcher, num_bytes: int, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = bytearray(num_bytes)
        self._address = ctypes.addressof(ctypes.c_uint8.from_buffer(self._mask))
        self._vocab_size = vocab_size
        self._is_current = False
        self.num_accepted = 0
        self._is_complete = False
        self._error: str | None = None

    def allowed(self) -> bytearray:
        if not self._is_current:
            self._is_current = True
            if self._is_complete:
                self._mask[:] = bytes(len(self._mask))
            else:
                self._matcher.unsafe_compute_mask_ptr(self._address, len(self._mask))
                if not self._allows_any():
                    # A row may not begin without a token. The grammar will not take this one.
                    self._mask[0] = 1
                    self._error = "it allows only tokens that the model does not have"
        return self._mask

    def accept(self, token: int) -> None:
        if self._matcher.consume_token(token):
            self.num_accepted += 1
            self._is_complete = self._matcher.is_stopped() and not self._matcher.is_error()
        self._is_current = False

    def ends(self, num_tokens: int) -> bool:
        """Whether an answer of so many tokens is complete and cannot go on."""
        return self._is_complete and num_tokens == self.num_accepted

    @property
    def error(self) -> str:
        return self._error or shortened(self._matcher.get_error())

    def _allows_any(self) -> bool:
        """Whether the mask has a bit for a token of the model."""
        whole, rest = divmod(self._vocab_size, 8)
        return not self._mask.startswith(bytes(whole)) or any(self._mask[whole] >> bit & 1 for bit in range(rest))


class Grammars:
    """Compiles grammars, in llguidance's own format, for one model. Safe to use from several threads.

    The tokens in `end_token_ids` are allowed where an answer may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._num_tokens = max(vocab_size, tokenizer.get_vocab_size())
        self._end_token_ids = sorted(end_token_ids)
        self._limits = limits(self._num_tokens)
        self.compiled = lru_cache(MOST_COMPILED)(self._compiled)
        """A matcher at the beginning of an answer, to be copied. Raises GrammarError. May take a second."""

    def constraint(self, grammar: str) -> Constraint:
        """At the beginning of an answer. Raises GrammarError. Takes microseconds if `grammar` is compiled."""
        return self._constraint(self.compiled(grammar).deep_copy())

    def _constraint(self, matcher: LLMatcher) -> Constraint:
        # A mask is whole words of 32 tokens.
        return Constraint(matcher, -(-self._num_tokens // 32) * 4, self._vocab_size)

    def _compiled(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._ll_tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            # The first mask takes longest. It finds grammars that allow no text, too.
            self._constraint(matcher).allowed()
        if matcher.is_error():
            raise GrammarError(shortened(matcher.get_error()))
        return matcher

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        """Raises GrammarError. Takes a second for a large vocabulary."""
        try:
            return LLTokenizer(
                self._tokenizer.to_str(), self._num_tokens, self._end_token_ids or None, LLTokenizer.json_slices()
            )
        except ValueError as error:
            raise GrammarError(f"this model's tokenizer is not supported: {shortened(str(error))}") from None


def limits(vocab_size: int) -> LLParserLimits:
    """What a stranger's grammar may take: about a millisecond a token with a small vocabulary, where a step takes half
    of one, and some ten megabytes. A larger vocabulary needs more, and belongs to a slower model."""
    return LLParserLimits(
        max_items_in_row=500,
        step_max_items=min(50_000, 2_000 + vocab_size // 3),
        step_lexer_fuel=min(200_000, 20_000 + vocab_size),
        initial_lexer_fuel=min(1_000_000, 100_000 + 2 * vocab_size),
        max_lexer_states=20_000,
        verbose_errors=False,
    )


def shortened(message: str) -> str:
    """llguidance's messages show the place of a mistake in several lines, and after a panic where it happened. What is
    wrong with a schema inside a grammar is on one line; its options are not our clients'."""
    message = message.partition("<backtrace>")[0].partition(". Enable '")[0]
    if _IN_GRAMMAR in message:
        message = message.partition(_IN_GRAMMAR)[2].partition("\n")[0]
    return " ".join(message.replace("<non-verbose/>", "").split())[:MOST_MESSAGE_CHARS]
