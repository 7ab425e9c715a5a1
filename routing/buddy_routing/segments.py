"""A step's work as segments: runs of rows of one sequence that share one path."""

# N rows (tokens) in the step, W of them wanted, A rows ahead, S segments, T block table columns, L layers

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from buddy_kernels import SKIP, StepRows


@dataclass(frozen=True)
class SegmentBatch:
    """StepRows as tensors. A segment is a route block, a part of one, or one decode token.

    A sequence is identified by a small integer, its *lane*, under which the router keeps its running features. Segments
    of one sequence are in order of position. The first segment of a partly run route block looks ahead to the rest of
    it: only features are computed for the rows `ahead_tokens`.
    """

    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    lengths: Tensor  # [S] int64, rows of each segment
    host_lengths: Sequence[int]  # [S], the same
    block_tables: Tensor  # [S, T] int64
    lanes: Sequence[int]  # [S]
    max_costs: Sequence[int]  # [S], milli-layers that a token may cost
    path_actions: Sequence[int]  # [S]
    wanted: Tensor  # [W] int64, rows whose next token is needed
    ahead_tokens: Tensor  # [A] int64
    aheads: Tensor  # [S] int64, rows ahead of each segment
    aligned: Sequence[int]  # [S], the segment whose path each shares; its own index: none

    @classmethod
    def from_rows(cls, rows: StepRows, device: torch.device) -> "SegmentBatch":
        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        num_rows, widest = len(rows.positions), max(map(len, rows.tables))
        return cls(
            tokens=tensor(rows.tokens[:num_rows]),
            positions=tensor(rows.positions),
            lengths=tensor(rows.lengths),
            host_lengths=rows.lengths,
            block_tables=torch.tensor([[*t, *[0] * (widest - len(t))] for t in rows.tables], device=device),
            lanes=rows.lanes,
            max_costs=rows.max_costs,
            path_actions=rows.path_actions,
            wanted=tensor([wanted.row for wanted in rows.wanted]),
            ahead_tokens=tensor(rows.tokens[num_rows:]),
            aheads=tensor(rows.aheads),
            aligned=rows.aligned,
        )

    @cached_property
    def segment_of_row(self) -> Tensor:
        """[N] int64."""
        return torch.repeat_interleave(torch.arange(len(self.lanes), device=self.lengths.device), self.lengths)

    @cached_property
    def segment_of_ahead(self) -> Tensor:
        """[A] int64."""
        return torch.repeat_interleave(torch.arange(len(self.lanes), device=self.aheads.device), self.aheads)

    @cached_property
    def deciding_rows(self) -> Tensor:
        """[S]: which of the N + A rows' features decide: a segment's last row, or the last row it looks ahead to."""
        ahead = len(self.tokens) + self.aheads.cumsum(0) - 1
        return torch.where(self.aheads > 0, ahead, self.lengths.cumsum(0) - 1)

    @cached_property
    def num_counted(self) -> Tensor:
        """[S] int64: number of tokens in the sequence up to a segment's deciding row."""
        return self.positions[self.lengths.cumsum(0) - 1] + 1 + self.aheads

    def slots(self, block_size: int) -> Tensor:
        """[N] int64: where each row's K/V is written, in a cache with blocks of `block_size` slots."""
        blocks = self.block_tables[self.segment_of_row, self.positions // block_size]
        return blocks * block_size + self.positions % block_size


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows that run one layer. `rows` is None if all rows do, so that nothing needs gathering. `taking` has, for
    each action that some of the M rows take, their places among them, or None if all take it. `query_start` is on the
    CPU."""

    num_rows: int
    rows: Tensor | None  # [M] int64
    taking: Mapping[int, Tensor | None]
    query_start: Tensor  # [R + 1] int64
    block_tables: Tensor  # [R, T]


def rows_by_layer(batch: SegmentBatch, paths: Tensor) -> list[LayerRows]:
    """Turn paths [S, L] int8 on the CPU into each layer's row list.

    Layers run by the same segments share one object: a batch has few distinct columns.
    """
    made: dict[tuple[int, ...], LayerRows] = {}
    columns = [tuple(column) for column in paths.T.tolist()]
    for column in columns:
        if column not in made:
            made[column] = _layer_rows(batch, column)
    return [made[column] for column in columns]


def _layer_rows(batch: SegmentBatch, column: tuple[int, ...]) -> LayerRows:
    """Made on the host, which would otherwise wait for a device to count."""
    device, lengths, actions = batch.lengths.device, torch.tensor(batch.host_lengths), torch.tensor(column)
    running = actions != SKIP  # [S]
    query_start = torch.nn.functional.pad(lengths[running].cumsum(0), (1, 0))
    rows = None if SKIP not in column else running.repeat_interleave(lengths).nonzero().squeeze(1).to(device)
    of_rows = actions[running].repeat_interleave(lengths[running])  # [M]
    taken = sorted(set(column) - {SKIP})
    taking = {
        action: (of_rows == action).nonzero().squeeze(1).to(device) if len(taken) > 1 else None for action in taken
    }
    return LayerRows(
        int(query_start[-1]), rows, taking, query_start, batch.block_tables[running.nonzero().squeeze(1).to(device)]
    )
