"""Argument checks that several ops share. Every message names the bad value and what is allowed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, allowed: Sequence[int | None]) -> None:
    """Raise ValueError unless `tensor` has the shape `allowed`; None stands for any size."""
    shape = tensor.shape
    if len(shape) != len(allowed) or any(w is not None and s != w for s, w in zip(shape, allowed, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in allowed)
        raise ValueError(f"{name} has shape {list(shape)}, allowed is [{wanted}]")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has one of the dtypes `allowed`."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{name} has dtype {tensor.dtype}, allowed is {wanted}")


def check_dense(
    name: str, tensor: Tensor, device: torch.device, shape: Sequence[int | None], *dtypes: torch.dtype
) -> None:
    """Raise ValueError unless `tensor` is on `device`, contiguous, and has the shape (None: any size) and one of the
    dtypes: what a kernel that goes by addresses takes for granted."""
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, *dtypes)
    if tensor.device != device:
        raise ValueError(f"{name} is on device {tensor.device}, allowed is {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, allowed is a contiguous tensor")


def check_range(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless every value of `index` is in 0 .. size - 1. Looks at CPU tensors only."""
    # On an accelerator reading the values would stop the stream; its own bounds assertion has to do.
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(f"{name} has values from {low} to {high}, allowed is 0 to {size - 1}")
