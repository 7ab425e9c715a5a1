"""Attention of the rows on a list, one token of each sequence, over the paged cache of one layer.

A long context is split; a second kernel puts the parts together. How it is split follows from the row's own position
alone, so that its bits do not depend on the batch. How many programs share the splits follows from the number of rows:
alone, a row has one for each; in a large batch, programs without a split would be most of them.
"""

# N rows, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Dh head dim, P blocks in the pool, K slots per block,
# T block table columns, S splits of a context

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.attention import paged_attention_reference
from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.blocks import attention_blocks
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList

_MIN_QUERIES = 16
"""The fewest rows of a product that tensor cores take."""


def decode_attention_reference(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    rows: RowList,
    out: Tensor,
) -> None:
    """`decode_attention` in plain torch; the truth."""
    listed = rows.listed()
    starts = torch.arange(len(listed) + 1, device=q.device)
    tables, at = block_tables[listed], positions[listed]
    out[listed] = paged_attention_reference(q[listed], cache_k, cache_v, tables, starts, at, scale, window)


@triton.jit(do_not_specialize_on_alignment=["rows", "count"])
def _attention_parts_kernel(
    q,
    cache_k,
    cache_v,
    block_tables,
    positions,
    rows,
    count,
    parts,
    part_max,
    part_sum,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    place, kv_head = tl.program_id(0), tl.program_id(1)
    if place >= tl.load(count):
        return
    row = tl.load(rows + place).to(tl.int64)
    position = tl.load(positions + row).to(tl.int32)
    first, per_split, num_splits = _splits(position, WINDOW, SPLITS, MIN_BLOCKS, BLOCK_CONTEXT)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    query, dim = tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + query
    is_query = (query < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(q + (row * HEADS + head)[:, None] * HEAD_DIM + dim[None, :], mask=is_query, other=0.0)
    for split in range(tl.program_id(2), num_splits, PROGRAMS):
        running_max = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
        running_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
        weighted = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
        start = (first + split * per_split) * BLOCK_CONTEXT
        end = tl.minimum(start + per_split * BLOCK_CONTEXT, position + 1)
        for block_start in range(start, end, BLOCK_CONTEXT):
            token = block_start + tl.arange(0, BLOCK_CONTEXT)
            visible = token <= position
            if WINDOW is not None:
                visible = visible & (token > position - WINDOW)
            block = tl.load(block_tables + row * TABLE_WIDTH + token // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
            slot = ((block * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
            read = visible[:, None] & (dim < HEAD_DIM)[None, :]
            keys = tl.load(cache_k + slot[:, None] + dim[None, :], mask=read, other=0.0)
            values = tl.load(cache_v + slot[:, None] + dim[None, :], mask=read, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
            scores = tl.where(visible[None, :], scores, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(scores, 1))
            weights = tl.exp(scores - new_max[:, None])
            kept = tl.exp(running_max - new_max)
            running_sum = running_sum * kept + tl.sum(weights, 1)
            weighted = tl.dot(weights.to(values.dtype), values, weighted * kept[:, None], input_precision="ieee")
            running_max = new_max
        part = (row * HEADS + head) * SPLITS + split
        tl.store(parts + part[:, None] * HEAD_DIM + dim[None, :], weighted, mask=is_query)
        tl.store(part_max + part, running_max, mask=query < GROUP)
        tl.store(part_sum + part, running_sum, mask=query < GROUP)


@triton.jit(do_not_specialize_on_alignment=["rows", "count"])
def _attention_whole_kernel(
    parts,
    part_max,
    part_sum,
    positions,
    rows,
    count,
    out,
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
    position = tl.load(positions + row).to(tl.int32)
    _, _, num_splits = _splits(position, WINDOW, SPLITS, MIN_BLOCKS, BLOCK_CONTEXT)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DIM)
    is_used = split < num_splits
    part = (row * HEADS + head) * SPLITS + split
    max_of_part = tl.load(part_max + part, mask=is_used, other=float("-inf"))
    share = tl.exp(max_of_part - tl.max(max_of_part, 0))
    total = tl.sum(share * tl.load(part_sum + part, mask=is_used, other=0.0), 0)
    read = is_used[:, None] & (dim < HEAD_DIM)[None, :]
    weighted = tl.load(parts + part[:, None] * HEAD_DIM + dim[None, :], mask=read, other=0.0)
    tl.store(
        out + (row * HEADS + head) * HEAD_DIM + dim, tl.sum(share[:, None] * weighted, 0) / total, mask=dim < HEAD_DIM
    )


@triton.jit
def _splits(
    position, WINDOW: tl.constexpr, SPLITS: tl.constexpr, MIN_BLOCKS: tl.constexpr, BLOCK_CONTEXT: tl.constexpr
):
    """The block of the oldest token that a row sees, the blocks of a split, and how many splits there are."""
    first = position * 0
    if WINDOW is not None:
        first = tl.maximum(position - WINDOW + 1, 0) // BLOCK_CONTEXT
    num_blocks = position // BLOCK_CONTEXT + 1 - first
    per_split = tl.maximum(tl.cdiv(num_blocks, SPLITS), MIN_BLOCKS)
    return first, per_split, tl.cdiv(num_blocks, per_split)


def decode_attention(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    rows: RowList,
    out: Tensor,
) -> None:
    """Each listed row attends to the cached positions 0 .. its own of its sequence; the other rows of `out` stay.

    Args:
        q: [N, Hq, Dh] contiguous, fp32, bf16 or fp16, rotated.
        cache_k: [P, K, Hkv, Dh] contiguous, in the dtype of `q`; the row's own key is in it.
        cache_v: as `cache_k`.
        block_tables: [N, T] int32 contiguous; entries of positions that the row does not see are not read.
        positions: [N] int64, under 2**31.
        scale: factor on the scores, usually Dh ** -0.5.
        window: sees only positions > own - window; None sees all.
        rows: of N.
        out: as `q`; scores and softmax are fp32, the weights of values in their dtype.

    Raises:
        ValueError: a tensor does not fit, Hq is not a multiple of Hkv, or `window` is under 1.

    Source: Dao et al., Flash-Decoding for long-context inference.
    """
    num_rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = cache_k.shape
    device = q.device
    check_dense("q", q, device, (num_rows, num_heads, head_dim), *FLOATS)
    check_dense("cache_k", cache_k, device, (None, None, None, head_dim), q.dtype)
    check_dense("cache_v", cache_v, device, cache_k.shape, q.dtype)
    check_dense("block_tables", block_tables, device, (num_rows, None), torch.int32)
    check_dense("positions", positions, device, (num_rows,), torch.int64)
    rows.check("rows", num_rows, device)
    check_dense("out", out, device, q.shape, q.dtype)
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, allowed is a multiple of the cache's {num_kv_heads}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, allowed is None or 1 or more")
    blocks = attention_blocks(q, num_kv_heads)
    parts = torch.empty(num_rows, num_heads, blocks.splits, head_dim, dtype=torch.float32, device=q.device)
    part_max, part_sum = (torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    sizes: dict[str, Any] = {
        "WINDOW": window,
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "SPLITS": blocks.splits,
        "MIN_BLOCKS": blocks.min_blocks,
        "BLOCK_CONTEXT": blocks.context,
        "BLOCK_DIM": blocks.dims,
    }
    launch(
        _attention_parts_kernel,
        (num_rows, num_kv_heads, blocks.programs),
        q,
        cache_k,
        cache_v,
        block_tables,
        positions,
        rows.indices,
        rows.count,
        parts,
        part_max,
        part_sum,
        SCALE=scale,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        TABLE_WIDTH=block_tables.shape[1],
        PROGRAMS=blocks.programs,
        BLOCK_QUERIES=max(_MIN_QUERIES, triton.next_power_of_2(num_heads // num_kv_heads)),
        num_stages=blocks.num_stages,
        **sizes,
    )
    launch(
        _attention_whole_kernel,
        (num_rows, num_heads),
        parts,
        part_max,
        part_sum,
        positions,
        rows.indices,
        rows.count,
        out,
        **sizes,
    )
