"""The text of one request as its tokens arrive, with stop strings cut out."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Releases text only when it can no longer be half a character or the start of a stop string. Of special tokens,
    only those in `shown` have text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], shown: tuple[int, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []
        self._stop = stop
        self._shown = frozenset(shown)
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that this token releases, possibly empty. Sets `stopped` when a stop string is complete."""
        self._held += self._decode(token_id)
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)], ""
            return released
        keep = self._num_held()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def name(self, token_id: int) -> str:
        """The text of a single token, special tokens included."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def flush(self) -> str:
        """The text held back, for a request that ends without a stop string."""
        released, self._held = self._held, ""
        return released

    def _decode(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._shown:
            return self.name(token_id)
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # Byte tokens that do not form a character change how the tokens before them decode, which the stream
            # refuses with a bare Exception. Decode the pending tokens alone and restart the stream at this token.
            text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
            self._stream = DecodeStream(ids=[token_id], skip_special_tokens=True)
        if text is None:
            return ""
        self._pending.clear()
        return text

    def _num_held(self) -> int:
        """Length of the longest suffix of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
