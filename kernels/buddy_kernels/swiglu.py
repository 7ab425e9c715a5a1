"""The gated activation of the feed-forward part.

Shapes: ... any leading dims, F feed-forward dim.
"""

from torch import Tensor
from torch.nn import functional

from buddy_kernels.checks import check_dtype, check_shape


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch; the truth."""
    # silu computes in fp32 and rounds once, so this gives transformers' bits in every dtype.
    return functional.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise.

    Args:
        gate: [..., F].
        up: [..., F], the shape and dtype of `gate`.

    Returns:
        [..., F] in the dtype of `gate`.

    Raises:
        ValueError: the two differ in shape or dtype.

    Source: Shazeer, GLU Variants Improve Transformer, equation 6.
    """
    check_shape("up", up, gate.shape)
    check_dtype("up", up, gate.dtype)
    return swiglu_reference(gate, up)
