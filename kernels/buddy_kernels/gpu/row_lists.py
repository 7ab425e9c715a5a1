"""Which rows run a layer, as lists on the device that kernels follow."""

# N rows, C columns of a path (layers, then exits), M rows listed

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.launch import launch
from buddy_kernels.step import RUN, SKIP, SMALL

_SKIP, _RUN, _SMALL = tl.constexpr(SKIP), tl.constexpr(RUN), tl.constexpr(SMALL)
_WHOLE, _WITH_SMALL = tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class RowList:
    """The rows that a kernel works on: the first `count` [1] int32 of `indices` [N] int32, in rising order. The rest of
    `indices` is never read."""

    indices: Tensor
    count: Tensor

    @property
    def num_rows(self) -> int:
        """The rows of the batch: as many as may be listed."""
        return self.indices.shape[0]

    def listed(self) -> Tensor:
        """[M] int64, for references: reading the count waits for the device."""
        return self.indices[: int(self.count)].long()

    def check(self, name: str, num_rows: int, device: torch.device) -> None:
        """Raise ValueError unless these are a list of `num_rows` rows on `device`."""
        check_dense(f"{name}.indices", self.indices, device, (num_rows,), torch.int32)
        check_dense(f"{name}.count", self.count, device, (1,), torch.int32)


@dataclass(frozen=True, slots=True)
class LayerLists:
    """For each column the rows that run it, those of them that take the whole FFN, and those that take the small one:
    `indices` [3, C, N] int32 and `counts` [3, C] int32."""

    indices: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, device: torch.device) -> Self:
        indices = torch.empty(3, num_columns, num_rows, dtype=torch.int32, device=device)
        return cls(indices, torch.empty(3, num_columns, dtype=torch.int32, device=device))

    def running(self, column: int) -> RowList:
        return self._list(0, column)

    def whole(self, column: int) -> RowList:
        return self._list(1, column)

    def small(self, column: int) -> RowList:
        return self._list(2, column)

    def _list(self, kind: int, column: int) -> RowList:
        return RowList(self.indices[kind, column], self.counts[kind, column : column + 1])


def fill_layer_lists_reference(paths: Tensor, live: RowList, lists: LayerLists) -> None:
    """`fill_layer_lists` in plain torch; the truth."""
    rows = live.listed()
    for column in range(paths.shape[1]):
        actions = paths[rows, column]
        for kind, taken in enumerate((actions != SKIP, actions == RUN, actions == SMALL)):
            listed = rows[taken]
            lists.indices[kind, column, : len(listed)] = listed.int()
            lists.counts[kind, column] = len(listed)


@triton.jit
def _layer_lists_kernel(
    paths,
    live,
    live_count,
    indices,
    counts,
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    column, kind = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, BLOCK_ROWS)
    is_live = place < tl.load(live_count)
    row = tl.load(live + place, mask=is_live, other=0)
    action = tl.load(paths + row.to(tl.int64) * NUM_COLUMNS + column, mask=is_live, other=_SKIP)
    runs_whole, runs_small = (action == _RUN) & (kind != _WITH_SMALL), (action == _SMALL) & (kind != _WHOLE)
    taken = runs_whole | runs_small
    into = tl.cumsum(taken.to(tl.int32), 0) - 1
    listed = kind * NUM_COLUMNS + column
    tl.store(indices + listed.to(tl.int64) * NUM_ROWS + into, row, mask=taken)
    tl.store(counts + listed, tl.sum(taken.to(tl.int32), 0))


def fill_layer_lists(paths: Tensor, live: RowList, lists: LayerLists) -> None:
    """Turn paths into each column's row lists, in one launch.

    Args:
        paths: [N, C] int8 contiguous, of SKIP, RUN and SMALL; only the rows that are live are read.
        live: the rows that take part in the step.
        lists: of N rows and C columns, overwritten.

    Raises:
        ValueError: a tensor does not fit.
    """
    num_rows, num_columns = live.num_rows, lists.counts.shape[1]
    device = paths.device
    check_dense("paths", paths, device, (num_rows, num_columns), torch.int8)
    live.check("live", num_rows, device)
    check_dense("lists.indices", lists.indices, device, (3, num_columns, num_rows), torch.int32)
    check_dense("lists.counts", lists.counts, device, (3, num_columns), torch.int32)
    launch(
        _layer_lists_kernel,
        (num_columns, 3),
        paths,
        live.indices,
        live.count,
        lists.indices,
        lists.counts,
        NUM_ROWS=num_rows,
        NUM_COLUMNS=num_columns,
        BLOCK_ROWS=triton.next_power_of_2(num_rows),
    )
