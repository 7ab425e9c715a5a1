"""Products of the rows on a list with weights that are read once, and not at all when the list is empty.

A row's bits depend neither on the other rows nor on how many there may be. One program sums an output in fp32: each of
its four warps the inputs of every fourth part, from first to last, and then the four sums are added, always in the same
way. Every batch size is computed by the same instruction, mma.sync.m16n8k16, with outputs for m and rows for n; fp32
by m16n8k8, three products of tf32 halves for each, which keep fp32's precision but for its last bits. What that costs:
a sum over inputs is never split among programs, so that a matrix of few outputs (K/V projections) keeps few of the
card's processors busy; and a batch of one multiplies by 7 columns of zeros, for which tensor cores have the time.

To Triton the four sums are a batch of products, of which it gives each to a warp. For batches it takes neither wgmma
nor tcgen05, whose shapes would follow the number of rows.

Without rows the loop over inputs ends before it begins. Its length hangs on the list so that the compiler does not know
it, which would unroll the loop and run out of registers.
"""

# N rows, I input width, O output width, F feed-forward dim; PARTS of the inputs of a block, one for each warp

import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense, check_shape
from buddy_kernels.gpu.blocks import PRODUCT_PARTS, product_blocks
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.linear import linear_reference
from buddy_kernels.swiglu import swiglu_reference

MAX_ROWS = 64


def row_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, rows: RowList, out: Tensor) -> None:
    """`row_linear` in plain torch; the truth up to the order of summation."""
    listed = rows.listed()
    out[listed] = linear_reference(x[listed], weight, bias)


def add_row_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, rows: RowList, into: Tensor) -> None:
    """`add_row_linear` in plain torch; the truth up to the order of summation."""
    listed = rows.listed()
    into[listed] += linear_reference(x[listed], weight, bias)


def row_swiglu_reference(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, rows: RowList, out: Tensor
) -> None:
    """`row_swiglu` in plain torch; the truth up to the order of summation."""
    listed = rows.listed()
    given = x[listed]
    out[listed] = swiglu_reference(linear_reference(given, gate, gate_bias), linear_reference(given, up, up_bias))


@triton.jit(do_not_specialize_on_alignment=["rows", "count"])
def _row_linear_kernel(
    x,
    weight,
    bias,
    rows,
    count,
    out,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ADDS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    num_listed = tl.load(count)
    inputs = tl.minimum(num_listed * INPUTS, INPUTS)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    place = tl.arange(0, BLOCK_ROWS)
    is_listed = place < num_listed
    row = tl.load(rows + place, mask=is_listed, other=0).to(tl.int64)
    parts = tl.zeros((PARTS, BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    for start in range(0, inputs, PARTS * BLOCK_INPUTS):
        some = _row_inputs(x, row, is_listed, start, INPUTS, PARTS, BLOCK_INPUTS)
        weights = _weights(weight, output, start, INPUTS, OUTPUTS, PARTS, BLOCK_INPUTS, BLOCK_OUTPUTS)
        parts = tl.dot(weights, some, parts, input_precision="tf32x3")
    product = _with_bias(_summed(parts, BLOCK_OUTPUTS, BLOCK_ROWS), bias, output, OUTPUTS).to(x.dtype.element_ty)
    into = out + row[None, :] * OUTPUTS + output[:, None]
    stored = is_listed[None, :] & (output < OUTPUTS)[:, None]
    if ADDS:
        product = product.to(tl.float32) + tl.load(into, mask=stored, other=0.0).to(tl.float32)
    tl.store(into, product, mask=stored)


@triton.jit(do_not_specialize_on_alignment=["rows", "count"])
def _row_swiglu_kernel(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    rows,
    count,
    out,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    num_listed = tl.load(count)
    inputs = tl.minimum(num_listed * INPUTS, INPUTS)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    place = tl.arange(0, BLOCK_ROWS)
    is_listed = place < num_listed
    row = tl.load(rows + place, mask=is_listed, other=0).to(tl.int64)
    gate_parts = tl.zeros((PARTS, BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    up_parts = tl.zeros((PARTS, BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    for start in range(0, inputs, PARTS * BLOCK_INPUTS):
        some = _row_inputs(x, row, is_listed, start, INPUTS, PARTS, BLOCK_INPUTS)
        gate_weights = _weights(gate, output, start, INPUTS, OUTPUTS, PARTS, BLOCK_INPUTS, BLOCK_OUTPUTS)
        up_weights = _weights(up, output, start, INPUTS, OUTPUTS, PARTS, BLOCK_INPUTS, BLOCK_OUTPUTS)
        gate_parts = tl.dot(gate_weights, some, gate_parts, input_precision="tf32x3")
        up_parts = tl.dot(up_weights, some, up_parts, input_precision="tf32x3")
    # Rounded after each of the reference's ops.
    dtype = x.dtype.element_ty
    gates, ups = _summed(gate_parts, BLOCK_OUTPUTS, BLOCK_ROWS), _summed(up_parts, BLOCK_OUTPUTS, BLOCK_ROWS)
    gates = _with_bias(gates, gate_bias, output, OUTPUTS).to(dtype).to(tl.float32)
    ups = _with_bias(ups, up_bias, output, OUTPUTS).to(dtype).to(tl.float32)
    activated = (gates * tl.sigmoid(gates)).to(dtype).to(tl.float32)
    into = out + row[None, :] * OUTPUTS + output[:, None]
    tl.store(into, activated * ups, mask=is_listed[None, :] & (output < OUTPUTS)[:, None])


@triton.jit
def _row_inputs(x, row, is_listed, start, INPUTS: tl.constexpr, PARTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr):
    """[PARTS, BLOCK_INPUTS, BLOCK_ROWS] of the listed rows, zeros for the others and past the last input."""
    index = _indices(start, PARTS, BLOCK_INPUTS)
    read = is_listed[None, :, None]
    if INPUTS % (PARTS * BLOCK_INPUTS) != 0:
        read = read & (index < INPUTS)
    return tl.permute(tl.load(x + row[None, :, None] * INPUTS + index, mask=read, other=0.0), (0, 2, 1))


@triton.jit
def _weights(
    weight,
    output,
    start,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """[PARTS, BLOCK_OUTPUTS, BLOCK_INPUTS], zeros past the last output or input."""
    index = _indices(start, PARTS, BLOCK_INPUTS)
    address = weight + output.to(tl.int64)[None, :, None] * INPUTS + index
    if INPUTS % (PARTS * BLOCK_INPUTS) != 0 or OUTPUTS % BLOCK_OUTPUTS != 0:
        return tl.load(address, mask=(output < OUTPUTS)[None, :, None] & (index < INPUTS), other=0.0)
    else:
        return tl.load(address)


@triton.jit
def _indices(start, PARTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr):
    """[PARTS, 1, BLOCK_INPUTS] of inputs, from `start` on."""
    return start + tl.arange(0, PARTS)[:, None, None] * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)[None, None, :]


@triton.jit
def _summed(parts, BLOCK_OUTPUTS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """[BLOCK_OUTPUTS, BLOCK_ROWS] of the four parts. tl.sum would add them in an order that the compiler chooses."""
    last = tl.reshape(tl.permute(parts, (1, 2, 0)), (BLOCK_OUTPUTS, BLOCK_ROWS, 2, 2))
    even, odd = tl.split(last)
    first, second = tl.split(even + odd)
    return first + second


@triton.jit
def _with_bias(product, bias, output, OUTPUTS: tl.constexpr):
    if bias is None:
        return product
    else:
        return product + tl.load(bias + output, mask=output < OUTPUTS, other=0.0).to(tl.float32)[:, None]


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: RowList, out: Tensor) -> None:
    """x @ weight.T + bias of the listed rows, into the same rows of `out`; the others stay as they are.

    Args:
        x: [N, I] contiguous, fp32, bf16 or fp16.
        weight: [O, I] contiguous, in the dtype of `x`.
        bias: [O] or None, of these dtypes.
        rows: of N, 1 to 64.
        out: [N, O] contiguous, in the dtype of `x`.

    Raises:
        ValueError: a tensor does not fit.
    """
    _launch_linear(x, weight, bias, rows, out, adds=False)


def add_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: RowList, into: Tensor) -> None:
    """As `row_linear`, but added to the rows of `into` [N, O], the residual, after rounding to its dtype."""
    _launch_linear(x, weight, bias, rows, into, adds=True)


def _launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: RowList, out: Tensor, adds: bool) -> None:
    outputs, inputs = weight.shape
    _check_product(x, weight, rows, "into" if adds else "out", out)
    _check_weights("weight", weight, "bias", bias, x)
    blocks = product_blocks(x, outputs, num_matrices=1)
    launch(
        _row_linear_kernel,
        (triton.cdiv(outputs, blocks.outputs),),
        x,
        weight,
        bias,
        rows.indices,
        rows.count,
        out,
        INPUTS=inputs,
        OUTPUTS=outputs,
        ADDS=adds,
        PARTS=PRODUCT_PARTS,
        BLOCK_ROWS=blocks.rows,
        BLOCK_INPUTS=blocks.inputs,
        BLOCK_OUTPUTS=blocks.outputs,
        num_warps=PRODUCT_PARTS,
        num_stages=blocks.num_stages,
    )


def row_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, rows: RowList, out: Tensor
) -> None:
    """silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias) of the listed rows, into the same rows of `out`.

    Args:
        x: [N, I] contiguous, fp32, bf16 or fp16.
        gate: [F, I] contiguous, in the dtype of `x`.
        up: as `gate`.
        gate_bias: [F] or None, of these dtypes.
        up_bias: as `gate_bias`.
        rows: of N, 1 to 64.
        out: [N, F] contiguous, in the dtype of `x`.

    Raises:
        ValueError: a tensor does not fit.
    """
    outputs, inputs = gate.shape
    _check_product(x, gate, rows, "out", out)
    check_shape("up", up, gate.shape)
    _check_weights("gate", gate, "gate_bias", gate_bias, x)
    _check_weights("up", up, "up_bias", up_bias, x)
    blocks = product_blocks(x, outputs, num_matrices=2)
    launch(
        _row_swiglu_kernel,
        (triton.cdiv(outputs, blocks.outputs),),
        x,
        gate,
        up,
        gate_bias,
        up_bias,
        rows.indices,
        rows.count,
        out,
        INPUTS=inputs,
        OUTPUTS=outputs,
        PARTS=PRODUCT_PARTS,
        BLOCK_ROWS=blocks.rows,
        BLOCK_INPUTS=blocks.inputs,
        BLOCK_OUTPUTS=blocks.outputs,
        num_warps=PRODUCT_PARTS,
        num_stages=blocks.num_stages,
    )


def _check_product(x: Tensor, weight: Tensor, rows: RowList, out_name: str, out: Tensor) -> None:
    if not 1 <= rows.num_rows <= MAX_ROWS:
        raise ValueError(f"rows are {rows.num_rows}, allowed is 1 to {MAX_ROWS}")
    outputs, inputs = weight.shape
    check_dense("x", x, x.device, (rows.num_rows, inputs), *FLOATS)
    rows.check("rows", rows.num_rows, x.device)
    check_dense(out_name, out, x.device, (rows.num_rows, outputs), x.dtype)


def _check_weights(weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None, x: Tensor) -> None:
    check_dense(weight_name, weight, x.device, (None, x.shape[1]), x.dtype)
    if bias is not None:
        check_dense(bias_name, bias, x.device, (weight.shape[0],), *FLOATS)
