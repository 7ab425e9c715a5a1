"""Taking rows out of a batch and putting them back: how a layer runs on some tokens only.

Shapes: N rows of the batch, M rows picked, ... any trailing dims.
"""

import torch
from torch import Tensor

from buddy_kernels.checks import check_dtype, check_range, check_shape


def gather_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    """`gather_rows` in plain torch; the truth."""
    return x.index_select(0, index)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows `x[index]`, as a new tensor.

    Args:
        x: [N, ...].
        index: [M] int64, values in 0 .. N - 1.

    Returns:
        [M, ...] in the dtype of `x`.

    Raises:
        ValueError: `index` has another shape or dtype, or (seen on CPU only) is out of range.
    """
    _check_index(x, index, "x")
    return gather_rows_reference(x, index)


def scatter_rows_reference(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """`scatter_rows` in plain torch; the truth."""
    into.index_copy_(0, index, rows)


def scatter_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """Overwrite `into[index]` with `rows`, in place; the other rows stay as they are.

    Args:
        into: [N, ...], changed in place.
        index: [M] int64, values in 0 .. N - 1, no value twice (unchecked; the result is then undefined).
        rows: [M, ...] in the dtype of `into`.

    Raises:
        ValueError: a shape or dtype does not fit, or (seen on CPU only) `index` is out of range.
    """
    _check_index(into, index, "into")
    _check_rows(into, index, rows)
    scatter_rows_reference(into, index, rows)


def _check_index(x: Tensor, index: Tensor, name: str) -> None:
    if x.dim() == 0:
        raise ValueError(f"{name} has shape [], allowed is [N, ...]")
    check_shape("index", index, (None,))
    check_dtype("index", index, torch.int64)
    check_range("index", index, x.shape[0])


def _check_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    check_shape("rows", rows, (index.shape[0], *into.shape[1:]))
    check_dtype("rows", rows, into.dtype)
