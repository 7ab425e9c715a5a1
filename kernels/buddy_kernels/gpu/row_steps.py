"""How rows enter a decode step and leave it: from a token to its state, and from the state to the next token."""

# N rows, D model dim, Dh head dim, V vocabulary, M positions, K steps of a call, C columns of a
# path, E end tokens of a row

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_state import RowState


def begin_step_reference(
    state: RowState, embeddings: Tensor, cos_table: Tensor, sin_table: Tensor, h: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """`begin_step` in plain torch; the truth."""
    rows = state.live.listed()
    h[rows] = embeddings[state.tokens[rows]]
    cos[rows], sin[rows] = cos_table[state.positions[rows]], sin_table[state.positions[rows]]
    state.uniform[rows] = state.uniforms[int(state.step), rows]


def end_step_reference(state: RowState, drawn: Tensor, paths: Tensor) -> None:
    """`end_step` in plain torch; the truth."""
    rows, step = state.live.listed(), int(state.step)
    tokens = drawn[rows]
    state.made[step, rows] = state.tokens[rows] = tokens
    state.ran_paths[step, rows] = paths[rows]
    state.positions[rows] += 1
    state.tokens_left[rows] -= 1
    goes_on = (state.tokens_left[rows] > 0) & (state.end_tokens[rows] != tokens[:, None]).all(1)
    left = rows[goes_on]
    state.live.indices[: len(left)] = left.int()
    state.live.count.fill_(len(left))
    state.step.add_(1)


@triton.jit(do_not_specialize_on_alignment=["live", "live_count"])
def _begin_step_kernel(
    tokens,
    positions,
    uniforms,
    step,
    embeddings,
    cos_table,
    sin_table,
    live,
    live_count,
    h,
    cos,
    sin,
    uniform,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    place = tl.program_id(0)
    if place >= tl.load(live_count):
        return
    row = tl.load(live + place).to(tl.int64)
    token, position = tl.load(tokens + row), tl.load(positions + row)
    column = tl.arange(0, BLOCK)
    embedded = tl.load(embeddings + token * WIDTH + column, mask=column < WIDTH)
    tl.store(h + row * WIDTH + column, embedded, mask=column < WIDTH)
    pair = tl.arange(0, BLOCK_HALF)
    angle = position * HALF + pair
    tl.store(cos + row * HALF + pair, tl.load(cos_table + angle, mask=pair < HALF), mask=pair < HALF)
    tl.store(sin + row * HALF + pair, tl.load(sin_table + angle, mask=pair < HALF), mask=pair < HALF)
    tl.store(uniform + row, tl.load(uniforms + tl.load(step) * STATE_ROWS + row))


@triton.jit(do_not_specialize_on_alignment=["live", "live_count"])
def _end_step_kernel(
    drawn,
    paths,
    tokens,
    positions,
    tokens_left,
    end_tokens,
    live,
    live_count,
    step,
    made,
    ran_paths,
    NUM_COLUMNS: tl.constexpr,
    NUM_END_TOKENS: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    place, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    is_live = place < tl.load(live_count)
    row = tl.load(live + place, mask=is_live, other=0).to(tl.int64)
    index = tl.load(step)
    token = tl.load(drawn + row, mask=is_live, other=0)
    position = tl.load(positions + row, mask=is_live, other=0)
    left = tl.load(tokens_left + row, mask=is_live, other=0) - 1
    goes_on = is_live & (left > 0)
    for end in range(NUM_END_TOKENS):
        goes_on = goes_on & (tl.load(end_tokens + row * NUM_END_TOKENS + end, mask=is_live, other=-1) != token)
    is_action = is_live[:, None] & (column < NUM_COLUMNS)[None, :]
    path = tl.load(paths + row[:, None] * NUM_COLUMNS + column[None, :], mask=is_action, other=0)
    tl.debug_barrier()  # All have read what is written now.
    tl.store(made + index * STATE_ROWS + row, token, mask=is_live)
    tl.store(tokens + row, token, mask=is_live)
    tl.store(positions + row, position + 1, mask=is_live)
    tl.store(tokens_left + row, left, mask=is_live)
    into = ran_paths + (index * STATE_ROWS + row)[:, None] * NUM_COLUMNS + column[None, :]
    tl.store(into, path, mask=is_action)
    tl.store(live + tl.cumsum(goes_on.to(tl.int32), 0) - 1, row.to(tl.int32), mask=goes_on)
    tl.store(live_count, tl.sum(goes_on.to(tl.int32), 0))
    tl.store(step, index + 1)


def begin_step(
    state: RowState, embeddings: Tensor, cos_table: Tensor, sin_table: Tensor, h: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """Look up what a step begins with: for each live row the embedding of its token, the rotation of its position, and
    the number that its next token is drawn by.

    Args:
        state: of N rows.
        embeddings: [V, D] contiguous.
        cos_table: [M, Dh / 2] fp32 contiguous, of all positions.
        sin_table: as `cos_table`.
        h: [N, D] contiguous, in the dtype of `embeddings`.
        cos: [N, Dh / 2] fp32 contiguous.
        sin: as `cos`.

    Raises:
        ValueError: a tensor does not fit.
    """
    num_rows, width, half = state.live.num_rows, embeddings.shape[1], cos_table.shape[1]
    device = h.device
    check_dense("embeddings", embeddings, device, (None, width), *FLOATS)
    check_dense("h", h, device, (num_rows, width), embeddings.dtype)
    for name, table, of_rows in (("cos", cos_table, cos), ("sin", sin_table, sin)):
        check_dense(f"{name}_table", table, device, cos_table.shape, torch.float32)
        check_dense(name, of_rows, device, (num_rows, half), torch.float32)
    launch(
        _begin_step_kernel,
        (num_rows,),
        state.tokens,
        state.positions,
        state.uniforms,
        state.step,
        embeddings,
        cos_table,
        sin_table,
        state.live.indices,
        state.live.count,
        h,
        cos,
        sin,
        state.uniform,
        WIDTH=width,
        HALF=half,
        STATE_ROWS=state.uniforms.stride(0),
        BLOCK=triton.next_power_of_2(width),
        BLOCK_HALF=triton.next_power_of_2(half),
        num_warps=8,
    )


def end_step(state: RowState, drawn: Tensor, paths: Tensor) -> None:
    """Write down what each live row made and ran, move it on to its next token, and leave out those that have ended.

    Args:
        state: of N rows.
        drawn: [N] int64, the tokens made.
        paths: [N, C] int8, the actions run.

    Raises:
        ValueError: a tensor does not fit.
    """
    num_rows, num_columns = state.live.num_rows, state.ran_paths.shape[2]
    check_dense("drawn", drawn, state.step.device, (num_rows,), torch.int64)
    check_dense("paths", paths, state.step.device, (num_rows, num_columns), torch.int8)
    launch(
        _end_step_kernel,
        (1,),
        drawn,
        paths,
        state.tokens,
        state.positions,
        state.tokens_left,
        state.end_tokens,
        state.live.indices,
        state.live.count,
        state.step,
        state.made,
        state.ran_paths,
        NUM_COLUMNS=num_columns,
        NUM_END_TOKENS=state.end_tokens.shape[1],
        STATE_ROWS=state.made.stride(0),
        BLOCK_ROWS=triton.next_power_of_2(num_rows),
        BLOCK_COLUMNS=triton.next_power_of_2(num_columns),
    )
