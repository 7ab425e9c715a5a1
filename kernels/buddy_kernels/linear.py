"""Matrix product with weights, whose rows do not depend on how many other rows there are.

Shapes: N rows, I input width, O output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_kernels.checks import check_shape

_STABLE_ROWS = 16
"""From this many rows on, fp32 products on the CPU sum in one order; below, several kernels compete."""


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in plain torch; the truth up to the order of summation."""
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, with a row's bits the same whatever the number of rows.

    The CPU's fp32 library picks a kernel by the number of rows and they round differently, which would make a seeded
    request's text depend on its neighbours: small fp32 batches are padded to `_STABLE_ROWS`. The bf16 and fp16
    kernels keep one order as they are.

    Args:
        x: [N, I].
        weight: [O, I].
        bias: [O].

    Returns:
        [N, O] in the dtype of `x`.

    Raises:
        ValueError: a shape does not fit.
    """
    check_shape("x", x, (None, None))
    check_shape("weight", weight, (None, x.shape[1]))
    num_rows = x.shape[0]
    if num_rows >= _STABLE_ROWS or x.dtype != torch.float32 or x.device.type != "cpu":
        return linear_reference(x, weight, bias)
    padded = x.new_zeros(_STABLE_ROWS, x.shape[1])  # [16, I]
    padded[:num_rows] = x
    return linear_reference(padded, weight, bias)[:num_rows]
