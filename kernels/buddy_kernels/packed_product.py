"""One product with packed weights, by any of the native step's arithmetics: what the step's own products are made of.

Shapes: N rows, I inputs, O outputs.
"""

import ctypes
from collections.abc import Iterable
from ctypes import c_int64, c_void_p
from itertools import count, repeat, takewhile

import torch
from torch import Tensor

from buddy_kernels import native_interface as interface
from buddy_kernels.checks import check_dtype, check_shape
from buddy_kernels.linear import linear_reference
from buddy_kernels.native_library import load_native_library
from buddy_kernels.packing import PackedMatrix, pad_to, unpack


class UnknownArithmeticError(ValueError):
    """An arithmetic that this processor has not; the message names those it has."""

    def __init__(self, arithmetic: str, kind: str, allowed: Iterable[str]) -> None:
        super().__init__(f"arithmetic is {arithmetic!r}, allowed for {kind} on this processor: {', '.join(allowed)}")


def known_arithmetics(kind: str) -> tuple[str, ...]:
    """Names of those the library has here for a kind of weights. Raises NativeBuildError."""
    named = map(load_native_library().buddy_arithmetic, repeat(interface.KINDS[kind]), count())
    return tuple(name.decode() for name in takewhile(bool, named))


def matrix_pointers(matrix: PackedMatrix) -> interface.Matrix:
    """For as long as the matrix lives."""
    return interface.Matrix(
        matrix.panels.data_ptr(),
        None if matrix.bias is None else matrix.bias.data_ptr(),
        None if matrix.scales is None else matrix.scales.data_ptr(),
        matrix.outputs,
        matrix.inputs,
        interface.KINDS[matrix.kind],
    )


def packed_product_reference(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """`packed_product` in plain torch, inputs not rounded."""
    return linear_reference(pad_to(x, matrix.inputs, 1), unpack(matrix), matrix.bias)


def packed_product(x: Tensor, matrix: PackedMatrix, arithmetic: str) -> Tensor:
    """x @ weight.T + bias, with a row's bits the same whatever the number of rows.

    Args:
        x: [N, I] fp32, I as in the packed matrix or less by its padding.
        matrix: [O, I].
        arithmetic: one of known_arithmetics.

    Returns:
        [N, O] fp32, padded outputs included.

    Raises:
        NativeBuildError: there is no native library here.
        UnknownArithmeticError: the arithmetic is none of this processor's.
        ValueError: x has too many inputs, or is not fp32.
    """
    check_dtype("x", x, torch.float32)
    x = pad_to(x, matrix.inputs, 1).contiguous()
    check_shape("x", x, (None, matrix.inputs))
    out = torch.empty(len(x), matrix.outputs)
    pointers = matrix_pointers(matrix)
    made = load_native_library().buddy_product(
        ctypes.byref(pointers), arithmetic.encode(), c_void_p(x.data_ptr()), c_int64(len(x)), c_void_p(out.data_ptr())
    )
    if not made:
        raise UnknownArithmeticError(arithmetic, matrix.kind, known_arithmetics(matrix.kind))
    return out
