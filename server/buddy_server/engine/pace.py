"""How much prefill fits beside answers without anyone who reads them noticing. Knows no torch."""

import math

from buddy_server.engine.batch import Batch, BatchResult

BURST_S = 0.015
"""How long answers may go on by themselves, their tokens reaching the clients together: shorter than a frame on a
screen, many times what Python and HTTP take for each burst."""
STRETCH = 1.5
"""How many times the usual gap between arrivals of a stream's text a step with prefill in it may take."""
FEWEST_ROWS = 8
"""Prefill goes on at this many rows, whatever they take: as many as the CPU's products take at once."""
MEMORY = 0.8
"""Weight of what was known at each new measurement."""


class Pace:
    """Learns from the steps that were run what a step of answers and a row of prefill take; both change with load and
    contexts."""

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._row_s: float | None = None

    def observe(self, batch: Batch, result: BatchResult) -> None:
        """What a call to the model took."""
        num_prefill = sum(work.length for work in batch.works if not work.is_decode)
        if num_prefill == 0:
            self._decode_s = _mixed(self._decode_s, result.seconds / result.num_steps)
            return
        decode_s = self._decode_s or 0.0 if num_prefill < batch.num_tokens else 0.0
        self._row_s = _mixed(self._row_s, max(0.0, result.seconds - decode_s) / num_prefill)

    def burst_steps(self, most: int) -> int:
        """Steps of answers that a burst may come to, at most `most`: it ends by the clock, and this is a guess."""
        return min(most, math.ceil(2 * BURST_S / self._decode_s)) if self._decode_s else most

    def prefill_rows(self, most: int, in_bursts: bool) -> int:
        """Rows of prefill for a step that has answers in it, at most `most`; all of them while nothing is known. Text
        arrives `in_bursts`, or after every step."""
        if self._decode_s is None or not self._row_s:
            return most
        gap_s = max(BURST_S, self._decode_s) if in_bursts else self._decode_s
        fitting = int((STRETCH * gap_s - self._decode_s) / self._row_s)
        return min(most, max(FEWEST_ROWS, fitting // FEWEST_ROWS * FEWEST_ROWS))


def _mixed(known: float | None, new: float) -> float:
    if known is None:
        return new
    # One outlier, of a machine that was busy otherwise, is not to change everything.
    return MEMORY * known + (1 - MEMORY) * min(max(new, known / 2), known * 2)
