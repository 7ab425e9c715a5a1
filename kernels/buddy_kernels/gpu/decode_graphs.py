"""Decode steps captured into CUDA graphs, one for each batch size. On a CPU, for tests, they run launch by launch."""

from collections.abc import Callable
from functools import partial

import torch

from buddy_kernels.gpu.decode_step import DecodeModel, DecodeStep
from buddy_kernels.gpu.logit_adjustment import LogitAdjustments
from buddy_kernels.gpu.row_linear import MAX_ROWS
from buddy_kernels.gpu.row_state import RowState

BATCH_SIZES = (1, 2, 4, 8, 16, 32, MAX_ROWS)


class DecodeGraphs:
    """Steps of up to as many rows as `state` has. `sizes` are the batch sizes there are, in rising order.

    All use the memory of the first rows of `state`. `adjustments` are of its rows.
    """

    def __init__(self, model: DecodeModel, state: RowState, adjustments: LogitAdjustments) -> None:
        most = state.live.num_rows
        self.sizes = (*(size for size in BATCH_SIZES if size < most), most)
        self._steps = {size: DecodeStep(model, state.first(size), _first(adjustments, size)) for size in self.sizes}
        self._runs: dict[tuple[int, bool], Callable[[], None]] = {}
        # Compiling and warming up runs steps, which change nothing as long as no row is live.
        state.live.count.zero_()
        pool = None
        for size in reversed(self.sizes):
            for adjusts in (False, True):
                run: Callable[[], None] = partial(self._steps[size].run, adjusts)
                if state.step.is_cuda:
                    run()
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        run()
                    pool = pool or graph.pool()
                    run = graph.replay
                self._runs[size, adjusts] = run

    def run(self, num_rows: int, adjusts: bool) -> None:
        """Launch a step of the smallest batch size that has `num_rows`."""
        self._runs[self._size(num_rows), adjusts]()

    def logits(self, num_rows: int) -> torch.Tensor:
        """[num_rows, V] of the last step with so many rows, in the model's dtype."""
        return self._steps[self._size(num_rows)].logits[:num_rows]

    def _size(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)


def _first(adjustments: LogitAdjustments, num_rows: int) -> LogitAdjustments:
    allowed = adjustments.allowed
    return LogitAdjustments(
        adjustments.presence[:num_rows],
        adjustments.frequency[:num_rows],
        adjustments.counts[:num_rows],
        adjustments.bias[:num_rows],
        None if allowed is None else allowed[:num_rows],
    )
