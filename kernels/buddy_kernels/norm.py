"""Root mean square norm.

Shapes: ... any leading dims, D model or head dim.
"""

import torch
from torch import Tensor

from buddy_kernels.checks import check_shape


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch; the truth."""
    x_fp32 = x.float()  # [..., D]
    normed = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)  # [..., D]
    # Rounded before the weight, not after: the order decides the bits, and this is transformers' order.
    return (weight * normed.to(x.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows to root mean square 1, then by `weight`. Numerics of transformers' LlamaRMSNorm.

    Args:
        x: [..., D], any float dtype; the mean is taken in fp32.
        weight: [D].
        eps: added to the mean square, not negative.

    Returns:
        [..., D] in the dtype of `x`.

    Raises:
        ValueError: a shape does not fit, or `eps` is negative.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, section 3.
    """
    if x.dim() == 0:
        raise ValueError("x has shape [], allowed is [..., D]")
    check_shape("weight", weight, (x.shape[-1],))
    if eps < 0:
        raise ValueError(f"eps is {eps}, allowed is 0 or more")
    return rms_norm_reference(x, weight, eps)
