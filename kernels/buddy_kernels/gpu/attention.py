"""Attention of a decode step in one layer, one token of each sequence: rotation of queries and keys, the writing of keys
and values into the paged cache, and attention over it.

A long context is read by several programs, whose parts a second kernel puts together. How it is split follows from the
row's own position alone, so that its bits do not depend on the batch. The program that reads the newest token writes it
first; for a row that skips the layer, another does nothing else.
"""

# N rows, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Dh head dim, P blocks in the pool, K slots per block,
# T block table columns, S splits of a context

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.attention import paged_attention_reference
from buddy_kernels.checks import check_dtype, check_shape
from buddy_kernels.gpu.blocks import blocks_for
from buddy_kernels.gpu.launch import launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.norm import rms_norm_reference
from buddy_kernels.paged_cache import write_kv_reference
from buddy_kernels.rotary import apply_rotary_reference
from buddy_kernels.step import SKIP

_SKIP = tl.constexpr(SKIP)
_FEWEST = 16
"""The fewest rows, columns and terms of a product that tensor cores take."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What `attend` needs of a layer: the factor on scores, usually Dh ** -0.5, the sliding window (sees only positions
    > own - window; None sees all), and Qwen3's norms of heads [Dh], if it has them, with their `eps`."""

    scale: float
    window: int | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    actions: Tensor,
    layer: AttentionLayer,
    written: RowList,
    out: Tensor,
) -> None:
    """`attend` in plain torch; the truth."""
    rows, block_size = written.listed(), cache_k.shape[1]
    keys = k[rows] if layer.k_norm is None else rms_norm_reference(k[rows], layer.k_norm, layer.eps)
    blocks = block_tables[rows, positions[rows] // block_size].long()
    slots = blocks * block_size + positions[rows] % block_size
    write_kv_reference(cache_k, cache_v, slots, apply_rotary_reference(keys, cos[rows], sin[rows]), v[rows])
    rows = rows[actions[rows] != SKIP]
    queries = q[rows] if layer.q_norm is None else rms_norm_reference(q[rows], layer.q_norm, layer.eps)
    rotated = apply_rotary_reference(queries, cos[rows], sin[rows])
    starts = torch.arange(len(rows) + 1, device=q.device)
    out[rows] = paged_attention_reference(
        rotated, cache_k, cache_v, block_tables[rows], starts, positions[rows], layer.scale, layer.window
    )


@triton.jit(do_not_specialize_on_alignment=["actions", "rows", "count"])
def _attend_kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    block_tables,
    cache_k,
    cache_v,
    actions,
    rows,
    count,
    q_norm,
    k_norm,
    parts,
    part_max,
    part_sum,
    NUM_COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    place, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if place >= tl.load(count):
        return
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.load(rows + place).to(tl.int64)
    position = tl.load(positions + row).to(tl.int32)
    runs = tl.load(actions + row * NUM_COLUMNS) != _SKIP
    first = _first_block(position, WINDOW, BLOCK_CONTEXT)
    per_split = _blocks_per_split(position, first, SPLITS, MIN_BLOCKS, BLOCK_CONTEXT)
    start = (first + split * per_split) * BLOCK_CONTEXT
    end = start + per_split * BLOCK_CONTEXT
    reads = runs & (start <= position)
    pair, dim = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_DIM)
    is_pair = pair < HALF
    c = tl.load(cos + row * HALF + pair, mask=is_pair, other=0.0)
    s = tl.load(sin + row * HALF + pair, mask=is_pair, other=0.0)
    if (reads & (position < end)) | ((split == 0) & (runs == 0)):
        block = tl.load(block_tables + row * TABLE_WIDTH + position // BLOCK_SIZE).to(tl.int64)
        slot = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        given = (row * KV_HEADS + kv_head) * HEAD_DIM
        low = tl.load(k + given + pair, mask=is_pair, other=0.0)
        high = tl.load(k + given + HALF + pair, mask=is_pair, other=0.0)
        low, high = _rotated(low[None, :], high[None, :], k_norm, c, s, HALF, EPS, BLOCK_HALF)
        tl.store(cache_k + slot + pair[None, :], low, mask=is_pair[None, :])
        tl.store(cache_k + slot + HALF + pair[None, :], high, mask=is_pair[None, :])
        tl.store(cache_v + slot + dim, tl.load(v + given + dim, mask=dim < HEAD_DIM), mask=dim < HEAD_DIM)
    if reads == 0:
        return
    tl.debug_barrier()  # All threads see the newest token.
    GROUP: tl.constexpr = HEADS // KV_HEADS
    query = tl.arange(0, BLOCK_QUERIES)
    head = kv_head * GROUP + query
    is_query = (query < GROUP)[:, None]
    address = q + (row * HEADS + head)[:, None] * HEAD_DIM + pair[None, :]
    low = tl.load(address, mask=is_query & is_pair[None, :], other=0.0)
    high = tl.load(address + HALF, mask=is_query & is_pair[None, :], other=0.0)
    low, high = _rotated(low, high, q_norm, c, s, HALF, EPS, BLOCK_HALF)
    running_max = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
    weighted = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    for block_start in range(start, tl.minimum(end, position + 1), BLOCK_CONTEXT):
        token = block_start + tl.arange(0, BLOCK_CONTEXT)
        visible = token <= position
        if WINDOW is not None:
            visible = visible & (token > position - WINDOW)
        block = tl.load(block_tables + row * TABLE_WIDTH + token // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
        slot = ((block * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        read = visible[:, None] & is_pair[None, :]
        keys_low = tl.load(cache_k + slot[:, None] + pair[None, :], mask=read, other=0.0)
        keys_high = tl.load(cache_k + slot[:, None] + HALF + pair[None, :], mask=read, other=0.0)
        read = visible[:, None] & (dim < HEAD_DIM)[None, :]
        values = tl.load(cache_v + slot[:, None] + dim[None, :], mask=read, other=0.0)
        scores = tl.dot(low, tl.trans(keys_low), input_precision="ieee")
        scores = tl.dot(high, tl.trans(keys_high), scores, input_precision="ieee") * SCALE
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        weights = tl.exp(scores - new_max[:, None])
        kept = tl.exp(running_max - new_max)
        running_sum = running_sum * kept + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(values.dtype), values, weighted * kept[:, None], input_precision="ieee")
        running_max = new_max
    part = (row * HEADS + head) * SPLITS + split
    stored = is_query & (dim < HEAD_DIM)[None, :]
    tl.store(parts + part[:, None] * HEAD_DIM + dim[None, :], weighted, mask=stored)
    tl.store(part_max + part, running_max, mask=query < GROUP)
    tl.store(part_sum + part, running_sum, mask=query < GROUP)


@triton.jit
def _rotated(low, high, norm, cos, sin, HALF: tl.constexpr, EPS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Both halves [H, BLOCK_HALF] of heads, after their norm if they have one."""
    dtype = low.dtype
    low_fp32, high_fp32 = low.to(tl.float32), high.to(tl.float32)
    if norm is not None:
        pair = tl.arange(0, BLOCK_HALF)
        mean_square = tl.sum(low_fp32 * low_fp32 + high_fp32 * high_fp32, 1) / (2 * HALF)
        scale = tl.rsqrt(mean_square + EPS)[:, None]
        low_weights = tl.load(norm + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        high_weights = tl.load(norm + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        # Rounded as in rms_norm_reference, before the weights and after.
        low_fp32 = (low_weights * (low_fp32 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        high_fp32 = (high_weights * (high_fp32 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    c, s = cos[None, :], sin[None, :]
    return (low_fp32 * c - high_fp32 * s).to(dtype), (high_fp32 * c + low_fp32 * s).to(dtype)


@triton.jit(do_not_specialize_on_alignment=["actions", "rows", "count"])
def _join_parts_kernel(
    parts,
    part_max,
    part_sum,
    positions,
    actions,
    rows,
    count,
    out,
    NUM_COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    place, head = tl.program_id(0), tl.program_id(1)
    if place >= tl.load(count):
        return
    row = tl.load(rows + place).to(tl.int64)
    if tl.load(actions + row * NUM_COLUMNS) == _SKIP:
        return
    position = tl.load(positions + row).to(tl.int32)
    first = _first_block(position, WINDOW, BLOCK_CONTEXT)
    per_split = _blocks_per_split(position, first, SPLITS, MIN_BLOCKS, BLOCK_CONTEXT)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DIM)
    is_used = (first + split * per_split) * BLOCK_CONTEXT <= position
    part = (row * HEADS + head) * SPLITS + split
    max_of_part = tl.load(part_max + part, mask=is_used, other=float("-inf"))
    share = tl.exp(max_of_part - tl.max(max_of_part, 0))
    total = tl.sum(share * tl.load(part_sum + part, mask=is_used, other=0.0), 0)
    read = is_used[:, None] & (dim < HEAD_DIM)[None, :]
    weighted = tl.load(parts + part[:, None] * HEAD_DIM + dim[None, :], mask=read, other=0.0)
    joined = tl.sum(share[:, None] * weighted, 0) / total
    tl.store(out + (row * HEADS + head) * HEAD_DIM + dim, joined, mask=dim < HEAD_DIM)


@triton.jit
def _first_block(position, WINDOW: tl.constexpr, BLOCK_CONTEXT: tl.constexpr):
    """The block of the oldest token that a row sees."""
    if WINDOW is None:
        return position * 0
    else:
        return tl.maximum(position - WINDOW + 1, 0) // BLOCK_CONTEXT


@triton.jit
def _blocks_per_split(position, first, SPLITS: tl.constexpr, MIN_BLOCKS: tl.constexpr, BLOCK_CONTEXT: tl.constexpr):
    return tl.maximum(tl.cdiv(position // BLOCK_CONTEXT + 1 - first, SPLITS), MIN_BLOCKS)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    actions: Tensor,
    layer: AttentionLayer,
    written: RowList,
    out: Tensor,
) -> None:
    """Write the K/V of the `written` rows; those of them that run the layer attend to the positions 0 .. their own of
    their sequences. The other rows of `out` stay.

    Args:
        q: [N, Hq, Dh] contiguous; it is not changed, nor are `k` and `v`.
        k: [N, Hkv, Dh] contiguous, in the dtype of `q`.
        v: as `k`.
        cos: [N, Dh / 2] fp32, each row's own.
        sin: as `cos`.
        positions: [N] int64, under 2**31.
        block_tables: [N, T] int32; entries of positions that the row does not see are not read, but for its own.
        cache_k: [P, K, Hkv, Dh] contiguous, in the dtype of `q`.
        cache_v: as `cache_k`.
        actions: [N] int8, what each row does about the layer; a column of paths.
        layer: the layer's constants.
        written: of N; no two of them write the same slot.
        out: as `q`; scores and softmax are fp32, the weights of values in their dtype.

    Raises:
        ValueError: a shape or dtype does not fit, Dh is odd, Hq is not a multiple of Hkv, or the window is under 1.

    Source: Dao et al., Flash-Decoding for long-context inference.
    """
    num_rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = cache_k.shape
    if head_dim % 2:
        raise ValueError(f"q has head dim {head_dim}, allowed is an even number")
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, allowed is a multiple of the cache's {num_kv_heads}")
    if layer.window is not None and layer.window < 1:
        raise ValueError(f"window is {layer.window}, allowed is None or 1 or more")
    check_shape("written.indices", written.indices, (num_rows,))
    check_shape("k", k, (num_rows, num_kv_heads, head_dim))
    check_shape("v", v, k.shape)
    check_shape("cos", cos, (num_rows, head_dim // 2))
    check_shape("sin", sin, cos.shape)
    check_shape("positions", positions, (num_rows,))
    check_dtype("positions", positions, torch.int64)
    check_shape("block_tables", block_tables, (num_rows, None))
    check_dtype("block_tables", block_tables, torch.int32)
    check_shape("cache_k", cache_k, (None, None, None, head_dim))
    check_dtype("cache_k", cache_k, q.dtype)
    check_shape("cache_v", cache_v, cache_k.shape)
    check_shape("actions", actions, (num_rows,))
    check_dtype("actions", actions, torch.int8)
    check_shape("out", out, q.shape)
    blocks = blocks_for(q.device).attention
    parts = torch.empty(num_rows, num_heads, blocks.splits, head_dim, dtype=torch.float32, device=q.device)
    part_max, part_sum = (torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    sizes = {
        "NUM_COLUMNS": actions.stride(0),
        "WINDOW": layer.window,
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "SPLITS": blocks.splits,
        "MIN_BLOCKS": blocks.min_blocks,
        "BLOCK_CONTEXT": blocks.context,
        "BLOCK_DIM": max(_FEWEST, triton.next_power_of_2(head_dim)),
    }
    launch(
        _attend_kernel,
        (num_rows, num_kv_heads, blocks.splits),
        q,
        k,
        v,
        cos,
        sin,
        positions,
        block_tables,
        cache_k,
        cache_v,
        actions,
        written.indices,
        written.count,
        layer.q_norm,
        layer.k_norm,
        parts,
        part_max,
        part_sum,
        SCALE=layer.scale,
        EPS=layer.eps,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        TABLE_WIDTH=block_tables.shape[1],
        BLOCK_QUERIES=max(_FEWEST, triton.next_power_of_2(num_heads // num_kv_heads)),
        BLOCK_HALF=max(_FEWEST, triton.next_power_of_2(head_dim // 2)),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **sizes,
    )
    launch(
        _join_parts_kernel,
        (num_rows, num_heads),
        parts,
        part_max,
        part_sum,
        positions,
        actions,
        written.indices,
        written.count,
        out,
        **sizes,
    )
