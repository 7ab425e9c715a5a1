"""Products of the rows on a list with weights that are read once, and not at all when the list is empty.

A row's bits depend neither on the other rows nor on how many there may be. One program sums an output in fp32: each of
its four warps the inputs of every fourth part, from first to last, and then the four sums are added, always in the same
way. Every batch size is computed by the same instruction, mma.sync.m16n8k16, with outputs for m and rows for n; fp32
by m16n8k8, three products of tf32 halves for each, which keep fp32's precision but for its last bits. What that costs:
a sum over inputs is never split among programs, so that a matrix of few outputs (K/V projections) keeps few of the
card's processors busy; and a batch of one multiplies by 7 columns of zeros, for which tensor cores have the time.

To Triton the four sums are a batch of products, of which it gives each to a warp. For batches it takes neither wgmma
nor tcgen05, whose shapes would follow the number of rows.

A single row may come before its norm: then every program computes that from the row, which it reads anyway, and a
launch is saved. Of more rows that would take longer than the launch.

Without rows the loop over inputs ends before it begins. Its length hangs on the list so that the compiler does not know
it, which would unroll the loop and run out of registers.
"""

# N rows, I input width, O output width, F feed-forward dim; PARTS of the inputs of a block, one for each warp

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense, check_shape
from buddy_kernels.gpu.blocks import PRODUCT_PARTS, product_blocks
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.gpu.row_norm import rms_scale
from buddy_kernels.linear import linear_reference
from buddy_kernels.norm import rms_norm_reference
from buddy_kernels.step_weights import Projection
from buddy_kernels.swiglu import swiglu_reference

MAX_ROWS = 64


@dataclass(frozen=True, slots=True)
class RowNorm:
    """`rms_norm` with weights [I] and `eps`, of a single row before a product."""

    weight: Tensor
    eps: float


def row_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, rows: RowList, out: Tensor) -> None:
    """`row_linear` in plain torch; the truth up to the order of summation."""
    listed = rows.listed()
    out[listed] = linear_reference(x[listed], weight, bias)


def add_row_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, rows: RowList, into: Tensor) -> None:
    """`add_row_linear` in plain torch; the truth up to the order of summation."""
    listed = rows.listed()
    into[listed] += linear_reference(x[listed], weight, bias)


def row_qkv_reference(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    running: RowList,
    written: RowList,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    norm: RowNorm | None = None,
) -> None:
    """`row_qkv` in plain torch; the truth up to the order of summation."""
    for by, rows, out in ((q, running, q_out), (k, written, k_out), (v, written, v_out)):
        listed = rows.listed()
        out[listed] = linear_reference(_normed_reference(x[listed], norm), by.weight, by.bias)


def row_swiglu_reference(
    x: Tensor, gate: Projection, up: Projection, rows: RowList, out: Tensor, norm: RowNorm | None = None
) -> None:
    """`row_swiglu` in plain torch; the truth up to the order of summation."""
    listed = rows.listed()
    given = _normed_reference(x[listed], norm)
    gates, ups = (linear_reference(given, by.weight, by.bias) for by in (gate, up))
    out[listed] = swiglu_reference(gates, ups)


def _normed_reference(x: Tensor, norm: RowNorm | None) -> Tensor:
    return x if norm is None else rms_norm_reference(x, norm.weight, norm.eps)


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
    _project(
        x,
        weight,
        bias,
        rows,
        count,
        None,
        out,
        tl.program_id(0),
        OUTPUTS,
        0.0,
        INPUTS,
        OUTPUTS % BLOCK_OUTPUTS == 0,
        ADDS,
        PARTS,
        INPUTS,
        BLOCK_ROWS,
        BLOCK_INPUTS,
        BLOCK_OUTPUTS,
    )


@triton.jit(do_not_specialize_on_alignment=["running", "running_count", "written", "written_count"])
def _row_qkv_kernel(
    x,
    q,
    k,
    v,
    q_bias,
    k_bias,
    v_bias,
    running,
    running_count,
    written,
    written_count,
    norm,
    q_out,
    k_out,
    v_out,
    EPS: tl.constexpr,
    INPUTS: tl.constexpr,
    Q_OUTPUTS: tl.constexpr,
    KV_OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    program = tl.program_id(0)
    NUM_Q: tl.constexpr = (Q_OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    NUM_KV: tl.constexpr = (KV_OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    FILLS_BLOCKS: tl.constexpr = Q_OUTPUTS % BLOCK_OUTPUTS == 0 and KV_OUTPUTS % BLOCK_OUTPUTS == 0
    # One product of what is chosen here: three of them would each have shared memory of its own.
    weight, bias, rows, count, out = q, q_bias, running, running_count, q_out
    if program >= NUM_Q:
        weight, bias, rows, count, out = k, k_bias, written, written_count, k_out
    if program >= NUM_Q + NUM_KV:
        weight, bias, out = v, v_bias, v_out
    outputs = tl.where(program < NUM_Q, Q_OUTPUTS, KV_OUTPUTS)
    block = tl.where(program < NUM_Q, program, (program - NUM_Q) % NUM_KV)
    _project(
        x,
        weight,
        bias,
        rows,
        count,
        norm,
        out,
        block,
        outputs,
        EPS,
        INPUTS,
        FILLS_BLOCKS,
        False,
        PARTS,
        BLOCK_WIDTH,
        BLOCK_ROWS,
        BLOCK_INPUTS,
        BLOCK_OUTPUTS,
    )


@triton.jit
def _project(
    x,
    weight,
    bias,
    rows,
    count,
    norm,
    out,
    block,
    outputs,
    EPS: tl.constexpr,
    INPUTS: tl.constexpr,
    FILLS_BLOCKS: tl.constexpr,
    ADDS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """The listed rows' products with a block of the outputs, which are as many as `outputs`."""
    num_listed = tl.load(count)
    inputs = tl.minimum(num_listed * INPUTS, INPUTS)
    output = block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    place = tl.arange(0, BLOCK_ROWS)
    is_listed = place < num_listed
    row = tl.load(rows + place, mask=is_listed, other=0).to(tl.int64)
    scale = _scale(x, rows, num_listed, norm, EPS, INPUTS, BLOCK_WIDTH)
    parts = tl.zeros((PARTS, BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    for start in range(0, inputs, PARTS * BLOCK_INPUTS):
        some = _row_inputs(x, row, is_listed, norm, scale, start, INPUTS, PARTS, BLOCK_INPUTS)
        weights = _weights(weight, output, start, outputs, INPUTS, FILLS_BLOCKS, PARTS, BLOCK_INPUTS)
        parts = tl.dot(weights, some, parts, input_precision="tf32x3")
    product = _with_bias(_summed(parts, BLOCK_OUTPUTS, BLOCK_ROWS), bias, output, outputs).to(x.dtype.element_ty)
    into = out + row[None, :] * outputs + output[:, None]
    stored = is_listed[None, :] & (output < outputs)[:, None]
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
    norm,
    out,
    EPS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    FILLS_BLOCKS: tl.constexpr = OUTPUTS % BLOCK_OUTPUTS == 0
    num_listed = tl.load(count)
    inputs = tl.minimum(num_listed * INPUTS, INPUTS)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    place = tl.arange(0, BLOCK_ROWS)
    is_listed = place < num_listed
    row = tl.load(rows + place, mask=is_listed, other=0).to(tl.int64)
    scale = _scale(x, rows, num_listed, norm, EPS, INPUTS, BLOCK_WIDTH)
    gate_parts = tl.zeros((PARTS, BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    up_parts = tl.zeros((PARTS, BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    for start in range(0, inputs, PARTS * BLOCK_INPUTS):
        some = _row_inputs(x, row, is_listed, norm, scale, start, INPUTS, PARTS, BLOCK_INPUTS)
        gate_weights = _weights(gate, output, start, OUTPUTS, INPUTS, FILLS_BLOCKS, PARTS, BLOCK_INPUTS)
        up_weights = _weights(up, output, start, OUTPUTS, INPUTS, FILLS_BLOCKS, PARTS, BLOCK_INPUTS)
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
def _scale(x, rows, num_listed, norm, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """What the norm multiplies the single row by."""
    if norm is None:
        return 1.0
    else:
        row = tl.load(rows, mask=num_listed > 0, other=0).to(tl.int64)
        column = tl.arange(0, BLOCK_WIDTH)
        given = tl.load(x + row * WIDTH + column, mask=(column < WIDTH) & (num_listed > 0), other=0.0)
        return rms_scale(given, WIDTH, EPS)


@triton.jit
def _row_inputs(
    x, row, is_listed, norm, scale, start, INPUTS: tl.constexpr, PARTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr
):
    """[PARTS, BLOCK_INPUTS, BLOCK_ROWS] of the listed rows, after their norm if they have one; zeros for the others and
    past the last input."""
    index = _indices(start, PARTS, BLOCK_INPUTS)
    read = is_listed[None, :, None]
    if INPUTS % (PARTS * BLOCK_INPUTS) != 0:
        read = read & (index < INPUTS)
    given = tl.load(x + row[None, :, None] * INPUTS + index, mask=read, other=0.0)
    if norm is not None:
        weights = tl.load(norm + index, mask=index < INPUTS, other=0.0).to(tl.float32)
        # Rounded as in rms_norm_reference, before the weights and after.
        given = (weights * (given.to(tl.float32) * scale).to(given.dtype).to(tl.float32)).to(given.dtype)
    return tl.permute(given, (0, 2, 1))


@triton.jit
def _weights(
    weight,
    output,
    start,
    outputs,
    INPUTS: tl.constexpr,
    FILLS_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """[PARTS, BLOCK_OUTPUTS, BLOCK_INPUTS] of the block `output`, zeros past the last output or input."""
    index = _indices(start, PARTS, BLOCK_INPUTS)
    address = weight + output.to(tl.int64)[None, :, None] * INPUTS + index
    if INPUTS % (PARTS * BLOCK_INPUTS) != 0 or not FILLS_BLOCKS:
        return tl.load(address, mask=(output < outputs)[None, :, None] & (index < INPUTS), other=0.0)
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
def _with_bias(product, bias, output, outputs):
    if bias is None:
        return product
    else:
        return product + tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]


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
    _check_product(x, weight, "rows", rows, "into" if adds else "out", out)
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


def row_qkv(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    running: RowList,
    written: RowList,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    norm: RowNorm | None = None,
) -> None:
    """`row_linear` three times, in one launch: queries of the rows that run a layer, keys and values of those whose K/V
    are written.

    Args:
        x: [N, I] contiguous, fp32, bf16 or fp16.
        q: weight [Oq, I] contiguous, in the dtype of `x`, and bias [Oq] or, with all three, None.
        k: as `q`, with [Okv, I].
        v: as `k`.
        running: of N, 1 to 64.
        written: of N.
        q_out: [N, Oq] contiguous, in the dtype of `x`.
        k_out: [N, Okv], as `q_out`.
        v_out: as `k_out`.
        norm: of `x`, which is one row then, before the products.

    Raises:
        ValueError: a tensor does not fit, or some have a bias and others none.
    """
    for name, by, rows_name, rows, out in (
        ("q", q, "running", running, q_out),
        ("k", k, "written", written, k_out),
        ("v", v, "written", written, v_out),
    ):
        _check_product(x, by.weight, rows_name, rows, f"{name}_out", out)
        _check_weights(f"{name}.weight", by.weight, f"{name}.bias", by.bias, x)
    check_shape("v.weight", v.weight, k.weight.shape)
    if len({by.bias is None for by in (q, k, v)}) > 1:
        raise ValueError("of q, k and v some have a bias, allowed is all or none")
    _check_norm(norm, x)
    q_outputs, kv_outputs = len(q.weight), len(k.weight)
    blocks = product_blocks(x, q_outputs + 2 * kv_outputs, num_matrices=1)
    launch(
        _row_qkv_kernel,
        (triton.cdiv(q_outputs, blocks.outputs) + 2 * triton.cdiv(kv_outputs, blocks.outputs),),
        x,
        q.weight,
        k.weight,
        v.weight,
        q.bias,
        k.bias,
        v.bias,
        running.indices,
        running.count,
        written.indices,
        written.count,
        None if norm is None else norm.weight,
        q_out,
        k_out,
        v_out,
        EPS=0.0 if norm is None else norm.eps,
        INPUTS=x.shape[1],
        Q_OUTPUTS=q_outputs,
        KV_OUTPUTS=kv_outputs,
        PARTS=PRODUCT_PARTS,
        BLOCK_WIDTH=triton.next_power_of_2(x.shape[1]),
        BLOCK_ROWS=blocks.rows,
        BLOCK_INPUTS=blocks.inputs,
        BLOCK_OUTPUTS=blocks.outputs,
        num_warps=PRODUCT_PARTS,
        num_stages=blocks.num_stages,
    )


def row_swiglu(
    x: Tensor, gate: Projection, up: Projection, rows: RowList, out: Tensor, norm: RowNorm | None = None
) -> None:
    """silu(x @ gate.T + gate bias) * (x @ up.T + up bias) of the listed rows, into the same rows of `out`.

    Args:
        x: [N, I] contiguous, fp32, bf16 or fp16.
        gate: weight [F, I] contiguous, in the dtype of `x`, and bias [F] or None.
        up: as `gate`.
        rows: of N, 1 to 64.
        out: [N, F] contiguous, in the dtype of `x`.
        norm: of `x`, which is one row then, before the products.

    Raises:
        ValueError: a tensor does not fit.
    """
    outputs, inputs = gate.weight.shape
    _check_product(x, gate.weight, "rows", rows, "out", out)
    check_shape("up.weight", up.weight, gate.weight.shape)
    for name, by in (("gate", gate), ("up", up)):
        _check_weights(f"{name}.weight", by.weight, f"{name}.bias", by.bias, x)
    _check_norm(norm, x)
    blocks = product_blocks(x, outputs, num_matrices=2)
    launch(
        _row_swiglu_kernel,
        (triton.cdiv(outputs, blocks.outputs),),
        x,
        gate.weight,
        up.weight,
        gate.bias,
        up.bias,
        rows.indices,
        rows.count,
        None if norm is None else norm.weight,
        out,
        EPS=0.0 if norm is None else norm.eps,
        INPUTS=inputs,
        OUTPUTS=outputs,
        PARTS=PRODUCT_PARTS,
        BLOCK_WIDTH=triton.next_power_of_2(inputs),
        BLOCK_ROWS=blocks.rows,
        BLOCK_INPUTS=blocks.inputs,
        BLOCK_OUTPUTS=blocks.outputs,
        num_warps=PRODUCT_PARTS,
        num_stages=blocks.num_stages,
    )


def _check_product(x: Tensor, weight: Tensor, rows_name: str, rows: RowList, out_name: str, out: Tensor) -> None:
    if not 1 <= rows.num_rows <= MAX_ROWS:
        raise ValueError(f"{rows_name} are {rows.num_rows}, allowed is 1 to {MAX_ROWS}")
    outputs, inputs = weight.shape
    check_dense("x", x, x.device, (rows.num_rows, inputs), *FLOATS)
    rows.check(rows_name, rows.num_rows, x.device)
    check_dense(out_name, out, x.device, (rows.num_rows, outputs), x.dtype)


def _check_weights(weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None, x: Tensor) -> None:
    check_dense(weight_name, weight, x.device, (None, x.shape[1]), x.dtype)
    if bias is not None:
        check_dense(bias_name, bias, x.device, (weight.shape[0],), *FLOATS)


def _check_norm(norm: RowNorm | None, x: Tensor) -> None:
    if norm is not None:
        check_dense("norm.weight", norm.weight, x.device, (x.shape[1],), *FLOATS)
        if len(x) != 1:
            raise ValueError(f"x has {len(x)} rows, allowed with a norm is 1")
