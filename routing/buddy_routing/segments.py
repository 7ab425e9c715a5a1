"""A step's work as segments: runs of rows of one sequence that share one path."""

# N rows (tokens) in the step, W of them wanted, S segments, T block table columns, L layers

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentBatch:
    """What one step computes, as data. A segment is a prefill block or one decode token, the unit of routing.

    Sequences are named by a small integer, their *lane*, under which the router keeps their running features.
    Segments of one sequence stand in order of position.
    """

    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    lengths: Tensor  # [S] int64, rows of each segment
    block_tables: Tensor  # [S, T] int64
    lanes: tuple[int, ...]  # [S]
    budgets: tuple[int, ...]  # [S], layers to run, n(b)
    wanted_rows: tuple[int, ...]  # [W], rows whose next token is asked for
    reroutes: tuple[bool, ...]  # [S], False keeps the lane's last path (`reroute_every` > 1)

    @cached_property
    def last_rows(self) -> Tensor:
        """[S] the last row of each segment: the one whose features decide, and which predicts the next token."""
        return self.lengths.cumsum(0) - 1

    @cached_property
    def segment_of_row(self) -> Tensor:
        """[N] int64."""
        return torch.repeat_interleave(torch.arange(len(self.lanes), device=self.lengths.device), self.lengths)

    def slots(self, block_size: int) -> Tensor:
        """[N] int64, where each row's K/V goes in a cache of blocks of that size."""
        blocks = self.block_tables[self.segment_of_row, self.positions // block_size]
        return blocks * block_size + self.positions % block_size


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows that run one layer. `rows` is None when all do, so that nothing needs gathering."""

    num_rows: int
    rows: Tensor | None  # [M] int64
    query_start: Tensor  # [R + 1] int64
    block_tables: Tensor  # [R, T]


def rows_by_layer(batch: SegmentBatch, masks: Tensor) -> list[LayerRows]:
    """Turn masks [S, L] (small integers on the CPU, 0 skips) into each layer's row list.

    Layers that the same segments run share one object: a batch has few distinct columns.
    """
    made: dict[tuple[int, ...], LayerRows] = {}
    columns = [tuple(column) for column in masks.T.tolist()]
    for column in columns:
        if column not in made:
            made[column] = _layer_rows(batch, column)
    return [made[column] for column in columns]


def _layer_rows(batch: SegmentBatch, column: tuple[int, ...]) -> LayerRows:
    running = torch.tensor(column, device=batch.lengths.device) > 0  # [S]
    lengths = batch.lengths[running]
    query_start = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows = None if all(column) else running[batch.segment_of_row].nonzero().squeeze(1)
    return LayerRows(int(query_start[-1]), rows, query_start, batch.block_tables[running])
