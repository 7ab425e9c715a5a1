"""Root mean square norm of the rows on a list."""

# N rows, D model dim

import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.norm import rms_norm_reference

_NUM_WARPS = 4
"""As in products, which compute a single row's norm themselves: sums have one order."""


def norm_rows_reference(x: Tensor, weight: Tensor, eps: float, rows: RowList, out: Tensor) -> None:
    """`norm_rows` in plain torch; the truth."""
    listed = rows.listed()
    out[listed] = rms_norm_reference(x[listed], weight, eps)


@triton.jit(do_not_specialize_on_alignment=["rows", "count"])
def _norm_rows_kernel(x, weight, rows, count, out, WIDTH: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    if place >= tl.load(count):
        return
    row = tl.load(rows + place).to(tl.int64)
    column = tl.arange(0, BLOCK)
    given = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0)
    # Rounded before the weights, as in rms_norm_reference.
    normed = (given.to(tl.float32) * rms_scale(given, WIDTH, EPS)).to(given.dtype)
    weights = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    tl.store(out + row * WIDTH + column, weights.to(tl.float32) * normed.to(tl.float32), mask=column < WIDTH)


@triton.jit
def rms_scale(x, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """What the row [BLOCK] is multiplied by."""
    x_fp32 = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x_fp32 * x_fp32, 0) / WIDTH + EPS)


def norm_rows(x: Tensor, weight: Tensor, eps: float, rows: RowList, out: Tensor) -> None:
    """`rms_norm` of the listed rows of `x`, into the same rows of `out`; the others stay as they are.

    There is nothing to add here: `add_row_linear` has added to the residual already.

    Args:
        x: [N, D] contiguous, fp32, bf16 or fp16.
        weight: [D], of these dtypes.
        eps: added to the mean square.
        rows: of N.
        out: as `x`.

    Raises:
        ValueError: a tensor does not fit.
    """
    num_rows, width = rows.num_rows, weight.shape[0]
    check_dense("x", x, x.device, (num_rows, width), *FLOATS)
    check_dense("weight", weight, x.device, (width,), *FLOATS)
    rows.check("rows", num_rows, x.device)
    check_dense("out", out, x.device, (num_rows, width), x.dtype)
    launch(
        _norm_rows_kernel,
        (num_rows,),
        x,
        weight,
        rows.indices,
        rows.count,
        out,
        WIDTH=width,
        EPS=eps,
        BLOCK=triton.next_power_of_2(width),
        num_warps=_NUM_WARPS,
    )
