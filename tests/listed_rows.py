"""Row lists as kernels get them: behind the rows that are listed stand numbers of no row."""

from collections.abc import Sequence

import torch

from buddy_kernels.gpu.row_lists import RowList

NO_ROW = 10**6


def listed(rows: Sequence[int], num_rows: int, device: torch.device) -> RowList:
    indices = torch.tensor([*rows, *[NO_ROW] * (num_rows - len(rows))], dtype=torch.int32, device=device)
    return RowList(indices, torch.tensor([len(rows)], dtype=torch.int32, device=device))


def every_other(num_rows: int, device: torch.device) -> RowList:
    return listed(range(0, num_rows, 2), num_rows, device)
