"""The gated activation of the feed-forward part.

Shapes: ... any leading dims, F feed-forward dim.
"""

import torch.nn.functional as F
from torch import Tensor

from buddy_kernels.checks import check_dtype, check_shape


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) for inference, whose bits do not depend on where a value lies in memory.

    torch's CPU loops compute the last few values of a chunk with another exp than the rest, so a row would change
    with the number of rows. In fp64 the two differ far below what rounding to the result's dtype keeps.

    Args:
        x: any shape, any float dtype.

    Returns:
        The shape and dtype of `x`.
    """
    if x.device.type != "cpu" or x.requires_grad:
        return F.silu(x)
    return F.silu(x.double()).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch; the truth."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, a row's bits the same whatever the number of rows.

    Args:
        gate: [..., F].
        up: as `gate`.

    Returns:
        [..., F] in the dtype of `gate`.

    Raises:
        ValueError: the two differ in shape or dtype.

    Source: Shazeer, GLU Variants Improve Transformer, equation 6.
    """
    check_shape("up", up, gate.shape)
    check_dtype("up", up, gate.dtype)
    return silu(gate) * up
