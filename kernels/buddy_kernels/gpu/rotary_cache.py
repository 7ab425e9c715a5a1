"""Rotation of a step's queries and keys, and the writing of its keys and values into the paged cache of one layer."""

# N rows, Hq query heads, Hkv key/value heads, Dh head dim, P blocks in the pool, K slots per block,
# T block table columns

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.norm import rms_norm_reference
from buddy_kernels.paged_cache import write_kv_reference
from buddy_kernels.rotary import apply_rotary_reference


def rotate_and_write_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    live: RowList,
    running: RowList,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """`rotate_and_write` in plain torch; the truth."""
    rows, block_size = running.listed(), cache_k.shape[1]
    queries = q[rows] if q_norm is None else rms_norm_reference(q[rows], q_norm, eps)
    q[rows] = apply_rotary_reference(queries, cos[rows], sin[rows])
    rows = live.listed()
    keys = k[rows] if k_norm is None else rms_norm_reference(k[rows], k_norm, eps)
    blocks = block_tables[rows, positions[rows] // block_size].long()
    slots = blocks * block_size + positions[rows] % block_size
    write_kv_reference(cache_k, cache_v, slots, apply_rotary_reference(keys, cos[rows], sin[rows]), v[rows])


@triton.jit(do_not_specialize_on_alignment=["live", "live_count", "running", "running_count"])
def _rotate_and_write_kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    block_tables,
    cache_k,
    cache_v,
    live,
    live_count,
    running,
    running_count,
    q_norm,
    k_norm,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, head = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK)
    if head < HEADS:
        if place < tl.load(running_count):
            row = tl.load(running + place).to(tl.int64)
            address = q + (row * HEADS + head) * HEAD_DIM + pair
            first, second = _rotated(address, q_norm, cos + row * HALF, sin + row * HALF, HEAD_DIM, EPS, BLOCK)
            tl.store(address, first, mask=pair < HALF)
            tl.store(address + HALF, second, mask=pair < HALF)
    else:
        if place < tl.load(live_count):
            row = tl.load(live + place).to(tl.int64)
            position = tl.load(positions + row)
            block = tl.load(block_tables + row * TABLE_WIDTH + position // BLOCK_SIZE).to(tl.int64)
            slot = block * BLOCK_SIZE + position % BLOCK_SIZE
            taken = (row * KV_HEADS + head - HEADS) * HEAD_DIM + pair
            written = (slot * KV_HEADS + head - HEADS) * HEAD_DIM + pair
            first, second = _rotated(k + taken, k_norm, cos + row * HALF, sin + row * HALF, HEAD_DIM, EPS, BLOCK)
            tl.store(cache_k + written, first, mask=pair < HALF)
            tl.store(cache_k + written + HALF, second, mask=pair < HALF)
            tl.store(cache_v + written, tl.load(v + taken, mask=pair < HALF), mask=pair < HALF)
            tl.store(cache_v + written + HALF, tl.load(v + taken + HALF, mask=pair < HALF), mask=pair < HALF)


@triton.jit
def _rotated(address, norm, cos, sin, HEAD_DIM: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """The two halves [BLOCK] of the head at `address`, after its norm if it has one."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK)
    is_pair = pair < HALF
    first = tl.load(address, mask=is_pair, other=0.0)
    second = tl.load(address + HALF, mask=is_pair, other=0.0)
    dtype = first.dtype
    first_fp32, second_fp32 = first.to(tl.float32), second.to(tl.float32)
    if norm is not None:
        mean_square = tl.sum(first_fp32 * first_fp32 + second_fp32 * second_fp32, 0) / HEAD_DIM
        scale = tl.rsqrt(mean_square + EPS)
        first_weights = tl.load(norm + pair, mask=is_pair, other=0.0).to(tl.float32)
        second_weights = tl.load(norm + HALF + pair, mask=is_pair, other=0.0).to(tl.float32)
        # Rounded as in rms_norm_reference, before the weights and after.
        first_fp32 = (first_weights * (first_fp32 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        second_fp32 = (second_weights * (second_fp32 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    c = tl.load(cos + pair, mask=is_pair, other=0.0)
    s = tl.load(sin + pair, mask=is_pair, other=0.0)
    return (first_fp32 * c - second_fp32 * s).to(dtype), (second_fp32 * c + first_fp32 * s).to(dtype)


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    live: RowList,
    running: RowList,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate the queries of the rows that run the layer, in place; write keys, rotated, and values of all live rows.

    Args:
        q: [N, Hq, Dh] contiguous, fp32, bf16 or fp16, as `k`, `v` and the cache.
        k: [N, Hkv, Dh] contiguous; it is not changed.
        v: as `k`.
        cos: [N, Dh / 2] fp32 contiguous, each row's own, from `rotary_cos_sin`.
        sin: as `cos`.
        positions: [N] int64.
        block_tables: [N, T] int32 contiguous; the entry of a live row's position names the block that is written.
        cache_k: [P, K, Hkv, Dh] contiguous.
        cache_v: as `cache_k`.
        live: of N; no two of them write the same slot.
        running: of N, rows of `live`.
        q_norm: [Dh] or None; Qwen3's norm of each head before its rotation.
        k_norm: as `q_norm`.
        eps: of these norms.

    Raises:
        ValueError: a tensor does not fit, or Dh is odd.
    """
    num_rows = live.num_rows
    _, block_size, num_kv_heads, head_dim = cache_k.shape
    num_heads = q.shape[1]
    if head_dim % 2:
        raise ValueError(f"cache_k has head dim {head_dim}, allowed is an even number")
    dtype, device = q.dtype, q.device
    check_dense("q", q, device, (num_rows, num_heads, head_dim), *FLOATS)
    for name, made, cache in (("k", k, cache_k), ("v", v, cache_v)):
        check_dense(name, made, device, (num_rows, num_kv_heads, head_dim), dtype)
        check_dense(f"cache_{name}", cache, device, cache_k.shape, dtype)
    for name, angles in (("cos", cos), ("sin", sin)):
        check_dense(name, angles, device, (num_rows, head_dim // 2), torch.float32)
    check_dense("positions", positions, device, (num_rows,), torch.int64)
    check_dense("block_tables", block_tables, device, (num_rows, None), torch.int32)
    live.check("live", num_rows, device)
    running.check("running", num_rows, device)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_dense(name, norm, device, (head_dim,), *FLOATS)
    launch(
        _rotate_and_write_kernel,
        (num_rows, num_heads + num_kv_heads),
        q,
        k,
        v,
        cos,
        sin,
        positions,
        block_tables,
        cache_k,
        cache_v,
        live.indices,
        live.count,
        running.indices,
        running.count,
        q_norm,
        k_norm,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TABLE_WIDTH=block_tables.shape[1],
        EPS=eps,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
