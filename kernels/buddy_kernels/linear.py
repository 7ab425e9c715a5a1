"""Matrix product with weights, whose rows do not depend on how many other rows there are.

Shapes: N rows, I input width, O output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_kernels.checks import check_shape

_TILE_ROWS = 16
"""Rows of one fp32 or fp16 product on the CPU."""


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in plain torch; the truth up to the order of summation."""
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, with a row's bits the same whatever the number of rows, but for bf16 on some CPUs.

    The CPU's fp32 and fp16 libraries pick a kernel by the number of rows and these round differently, which would make
    a seeded request's text depend on its neighbours: such rows go through in tiles of one size, the last one padded.
    Most bf16 kernels keep one order from two rows on. Those for AMX do not, nor do those for AVX-512 without its bf16
    instructions on several threads, and tiles would take three to four times as long. Training needs none of this and
    takes the plain product.

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
    if x.device.type != "cpu" or x.requires_grad or weight.requires_grad:
        return linear_reference(x, weight, bias)
    if x.dtype == torch.bfloat16:
        lone = F.pad(x, (0, 0, 0, 1)) if num_rows == 1 else x
        return linear_reference(lone, weight, bias)[:num_rows]
    padded = F.pad(x, (0, 0, 0, -num_rows % _TILE_ROWS))
    tiles = [linear_reference(tile, weight, bias) for tile in padded.split(_TILE_ROWS)]
    return torch.cat(tiles)[:num_rows]
