"""How much can run beside answers without slowing them down too much. Does not import torch."""

import math

from buddy_server.engine.batch import Batch, BatchResult

BURST_S = 0.015
"""Length of a multi-step burst, whose tokens reach the clients together: shorter than a frame on a screen, many times
the time that Python and HTTP need per burst."""
STRETCH = 1.5
"""Limit of a step that contains prefill, as a multiple of the usual gap between arrivals of a stream's text."""
SLOWDOWN = 0.02
"""Limit of the time that rows beyond the tenants' fair shares add to a decode step, as a part of the step."""
FEWEST_ROWS = 8
"""Prefill always gets this many rows, however long they take: as many as the CPU's matrix products handle at once."""
MEMORY = 0.8
"""Weight of the old estimate in each update."""


class Pace:
    """Estimates, from the steps that ran, the time of a decode step and of a prefill row. Both change with load and
    context length."""

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._row_s: float | None = None

    def observe(self, batch: Batch, result: BatchResult) -> None:
        """Record the duration of a call to the model."""
        num_prefill = batch.num_prefill
        if num_prefill == 0:
            self._decode_s = _mixed(self._decode_s, result.seconds / result.num_steps)
            return
        decode_s = self._decode_s or 0.0 if num_prefill < batch.num_tokens else 0.0
        self._row_s = _mixed(self._row_s, max(0.0, result.seconds - decode_s) / num_prefill)

    def burst_steps(self, most: int) -> int:
        """Decode steps that a burst may reach, at most `most`. This is an estimate: the burst ends by the clock."""
        return min(most, math.ceil(2 * BURST_S / self._decode_s)) if self._decode_s else most

    def decode_rows(self, fair: int, wanted: int) -> int:
        """Rows for a decode step, at most `wanted`: `fair` at least, and more as far as they do not slow it down too
        much; `wanted` without measurements. A row of decode takes about as long as one of prefill."""
        if self._decode_s is None or not self._row_s:
            return wanted
        return min(wanted, fair + int(SLOWDOWN * self._decode_s / self._row_s))

    def prefill_rows(self, most: int, in_bursts: bool) -> int:
        """Rows of prefill for a step that also decodes, at most `most`; `most` without measurements. Text arrives
        `in_bursts`, or after every step."""
        if self._decode_s is None or not self._row_s:
            return most
        gap_s = max(BURST_S, self._decode_s) if in_bursts else self._decode_s
        fitting = int((STRETCH * gap_s - self._decode_s) / self._row_s)
        return min(most, max(FEWEST_ROWS, fitting // FEWEST_ROWS * FEWEST_ROWS))


def _mixed(known: float | None, new: float) -> float:
    if known is None:
        return new
    # Limits what one outlier, from a machine busy with other work, can change.
    return MEMORY * known + (1 - MEMORY) * min(max(new, known / 2), known * 2)
