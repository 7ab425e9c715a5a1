"""What the device knows of a call's rows, which decode steps change without the host."""

# N rows, T block table columns, K steps of a call, E end tokens of a row, C columns of a path

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.gpu.token_draw import SamplingRows

MAX_STEPS = 64
"""Steps in a call."""
MAX_END_TOKENS = 8
"""Of a row, that the device looks at."""
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class RowState:
    """`live` are the rows that have not ended. Each step moves them on, counts itself in `step` [1] int64, and writes
    the tokens and the actions of its rows into `made` [K, N] int64 and `ran_paths` [K, N, C] int8.

    Numbers of all rows lie together, so that one copy brings them: `ints` [7, N] int64 and `reals` [3 + K, N] fp64,
    whose parts have names below. `uniform` [N] fp64 is the step's own row of them. `path_actions` [N] uint8 are of
    PathAction, `block_tables` [N, T] int32, `end_tokens` [N, E] int64, NO_TOKEN behind a row's last."""

    ints: Tensor
    reals: Tensor
    uniform: Tensor
    path_actions: Tensor
    block_tables: Tensor
    end_tokens: Tensor
    live: RowList
    step: Tensor
    made: Tensor
    ran_paths: Tensor

    @classmethod
    def empty(cls, num_rows: int, table_width: int, num_columns: int, device: torch.device) -> Self:
        """Of `num_rows` rows, none of them live."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            ints=zeros(7, num_rows),
            reals=zeros(3 + MAX_STEPS, num_rows, dtype=torch.float64),
            uniform=zeros(num_rows, dtype=torch.float64),
            path_actions=zeros(num_rows, dtype=torch.uint8),
            block_tables=zeros(num_rows, table_width, dtype=torch.int32),
            end_tokens=zeros(num_rows, MAX_END_TOKENS),
            live=RowList(zeros(num_rows, dtype=torch.int32), zeros(1, dtype=torch.int32)),
            step=zeros(1),
            made=zeros(MAX_STEPS, num_rows),
            ran_paths=zeros(MAX_STEPS, num_rows, num_columns, dtype=torch.int8),
        )

    def first(self, num_rows: int) -> Self:
        """The first rows, in the same memory."""
        return type(self)(
            ints=self.ints[:, :num_rows],
            reals=self.reals[:, :num_rows],
            uniform=self.uniform[:num_rows],
            path_actions=self.path_actions[:num_rows],
            block_tables=self.block_tables[:num_rows],
            end_tokens=self.end_tokens[:num_rows],
            live=RowList(self.live.indices[:num_rows], self.live.count),
            step=self.step,
            made=self.made[:, :num_rows],
            ran_paths=self.ran_paths[:, :num_rows],
        )

    @property
    def tokens(self) -> Tensor:
        """[N], each row's newest."""
        return self.ints[0]

    @property
    def positions(self) -> Tensor:
        """[N], of these tokens."""
        return self.ints[1]

    @property
    def lanes(self) -> Tensor:
        """[N]"""
        return self.ints[2]

    @property
    def max_costs(self) -> Tensor:
        """[N], milli-layers that a token may cost."""
        return self.ints[3]

    @property
    def aligned(self) -> Tensor:
        """[N], the row whose path each shares; itself: none."""
        return self.ints[4]

    @property
    def tokens_left(self) -> Tensor:
        """[N], that a row may still make."""
        return self.ints[5]

    @property
    def sampling(self) -> SamplingRows:
        """What the step's tokens are drawn by."""
        return SamplingRows(self.reals[0], self.ints[6], self.reals[1], self.reals[2], self.uniform)

    @property
    def uniforms(self) -> Tensor:
        """[K, N], the numbers of each step."""
        return self.reals[3:]
