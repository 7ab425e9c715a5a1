"""Attention of a decode step in one layer, one token of each sequence: rotates queries and keys, writes keys and values
into the paged cache, and attends to it.

A long context is split, and its last program to end puts the parts together. How it is split follows from the row's
own position alone, so that its bits do not depend on the batch. How many programs share the splits follows from the
number of rows: alone, a row has one for each; in a large batch, programs without a split would be most of them. The
program that reads the newest token writes it first; for a row that skips the layer, one program writes and does nothing
else.
"""

# N rows, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Dh head dim, P blocks in the pool, K slots per block,
# T block table columns, C columns of a path, S splits of a context

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.attention import paged_attention_reference
from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.blocks import attention_blocks
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.norm import rms_norm_reference
from buddy_kernels.paged_cache import write_kv_reference
from buddy_kernels.rotary import apply_rotary_reference
from buddy_kernels.step import SKIP

_SKIP = tl.constexpr(SKIP)
_FEWEST_QUERIES = 16
"""The fewest rows of a product that tensor cores take."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What `attend` needs of a layer: its `column` of the paths, the factor on scores, usually Dh ** -0.5, the sliding
    window (sees only positions > own - window; None sees all), and Qwen3's norms of heads [Dh], if it has them, with
    their `eps`."""

    column: int
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
    paths: Tensor,
    layer: AttentionLayer,
    written: RowList,
    arrivals: Tensor,  # noqa: ARG001, the kernel's
    out: Tensor,
) -> None:
    """`attend` in plain torch; the truth."""
    rows, block_size = written.listed(), cache_k.shape[1]
    keys = k[rows] if layer.k_norm is None else rms_norm_reference(k[rows], layer.k_norm, layer.eps)
    blocks = block_tables[rows, positions[rows] // block_size].long()
    slots = blocks * block_size + positions[rows] % block_size
    write_kv_reference(cache_k, cache_v, slots, apply_rotary_reference(keys, cos[rows], sin[rows]), v[rows])
    rows = rows[paths[rows, layer.column] != SKIP]
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
    arrivals,
    out,
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
    PROGRAMS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    place, kv_head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if place >= tl.load(count):
        return
    row = tl.load(rows + place).to(tl.int64)
    runs = tl.load(actions + row * NUM_COLUMNS) != _SKIP
    position = tl.load(positions + row).to(tl.int32)
    first, per_split, num_splits = _splits(position, WINDOW, SPLITS, MIN_BLOCKS, BLOCK_CONTEXT)
    dim = tl.arange(0, BLOCK_DIM)
    of_row = row * (HEAD_DIM // 2)
    # The program that reads the newest token writes it.
    writer = tl.where(runs, (num_splits - 1) % PROGRAMS, 0)
    if program == writer:
        block = tl.load(block_tables + row * TABLE_WIDTH + position // BLOCK_SIZE).to(tl.int64)
        slot = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        given = row * KV_HEADS + kv_head + tl.arange(0, 1)
        key = _rotated(k, given, given >= 0, k_norm, cos + of_row, sin + of_row, HEAD_DIM, EPS, BLOCK_DIM)
        value = tl.load(v + given[:, None] * HEAD_DIM + dim[None, :], mask=dim[None, :] < HEAD_DIM)
        tl.store(cache_k + slot + dim[None, :], key, mask=dim[None, :] < HEAD_DIM)
        tl.store(cache_v + slot + dim[None, :], value, mask=dim[None, :] < HEAD_DIM)
    if (runs == 0) | (program >= num_splits):
        return
    tl.debug_barrier()  # All threads see the newest token.
    GROUP: tl.constexpr = HEADS // KV_HEADS
    query = tl.arange(0, BLOCK_QUERIES)
    head = row * HEADS + kv_head * GROUP + query
    is_query = (query < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    queries = _rotated(q, head, query < GROUP, q_norm, cos + of_row, sin + of_row, HEAD_DIM, EPS, BLOCK_DIM)
    for split in range(program, num_splits, PROGRAMS):
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
        part = head * SPLITS + split
        tl.store(parts + part[:, None] * HEAD_DIM + dim[None, :], weighted, mask=is_query)
        tl.store(part_max + part, running_max, mask=query < GROUP)
        tl.store(part_sum + part, running_sum, mask=query < GROUP)
    tl.debug_barrier()  # All of the program's parts are stored before it says so.
    arrival = arrivals + row * KV_HEADS + kv_head
    num_before = tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu")
    if num_before == tl.minimum(num_splits, PROGRAMS) - 1:
        tl.store(arrival, 0)
        joined = _joined(parts, part_max, part_sum, head, is_query, num_splits, SPLITS, HEAD_DIM, BLOCK_DIM)
        tl.store(out + head[:, None] * HEAD_DIM + dim[None, :], joined, mask=is_query)


@triton.jit
def _joined(
    parts,
    part_max,
    part_sum,
    head,
    is_query,
    num_splits,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """[BLOCK_QUERIES, BLOCK_DIM] of heads from their parts, which other processors have written: so not from a
    processor's own cache."""
    split, dim = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DIM)
    is_head = tl.max(is_query.to(tl.int32), 1) > 0
    read = is_head[:, None] & (split < num_splits)[None, :]
    each = tl.load(part_max + head[:, None] * SPLITS + split[None, :], mask=read, other=-1e38, cache_modifier=".cg")
    highest = tl.max(each, 1)
    weighted = tl.zeros(is_query.shape, tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    for index in range(num_splits):
        part = head * SPLITS + index
        of_part = tl.load(part_max + part, mask=is_head, other=-1e38, cache_modifier=".cg")
        share = tl.exp(of_part - highest)
        total += share * tl.load(part_sum + part, mask=is_head, other=1.0, cache_modifier=".cg")
        some = tl.load(parts + part[:, None] * HEAD_DIM + dim[None, :], mask=is_query, other=0.0, cache_modifier=".cg")
        weighted += share[:, None] * some
    return weighted / total[:, None]


@triton.jit
def _rotated(x, head, is_head, norm, cos, sin, HEAD_DIM: tl.constexpr, EPS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[heads, BLOCK_DIM] of x, after their norm if they have one, rotated as apply_rotary_reference does. A number's
    partner is the one of its pair in the other half."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, BLOCK_DIM)
    is_dim = dim < HEAD_DIM
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    read = is_head[:, None] & is_dim[None, :]
    own = tl.load(x + head[:, None] * HEAD_DIM + dim[None, :], mask=read, other=0.0)
    other = tl.load(x + head[:, None] * HEAD_DIM + partner[None, :], mask=read, other=0.0)
    dtype = own.dtype
    own, other = own.to(tl.float32), other.to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(own * own, 1) / HEAD_DIM + EPS)[:, None]
        weights = tl.load(norm + dim, mask=is_dim, other=0.0).to(tl.float32)[None, :]
        of_other = tl.load(norm + partner, mask=is_dim, other=0.0).to(tl.float32)[None, :]
        # Rounded as in rms_norm_reference, before the weights and after.
        own = (weights * (own * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        other = (of_other * (other * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    c = tl.load(cos + dim % HALF, mask=is_dim, other=0.0)[None, :]
    s = tl.load(sin + dim % HALF, mask=is_dim, other=0.0)[None, :]
    return tl.where((dim < HALF)[None, :], own * c - other * s, own * c + other * s).to(dtype)


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
    paths: Tensor,
    layer: AttentionLayer,
    written: RowList,
    arrivals: Tensor,
    out: Tensor,
) -> None:
    """Write the K/V of the `written` rows; those of them that run the layer attend to the positions 0 .. their own of
    their sequences. The other rows of `out` stay.

    Args:
        q: [N, Hq, Dh] contiguous, fp32, bf16 or fp16; it is not changed, nor are `k` and `v`.
        k: [N, Hkv, Dh] contiguous, in the dtype of `q`.
        v: as `k`.
        cos: [N, Dh / 2] fp32 contiguous, each row's own.
        sin: as `cos`.
        positions: [N] int64, under 2**31.
        block_tables: [N, T] int32 contiguous; of a row that skips the layer only its own position's entry is read.
        cache_k: [P, K, Hkv, Dh] contiguous, in the dtype of `q`.
        cache_v: as `cache_k`.
        paths: [N, C] int8 contiguous.
        layer: the layer's constants.
        written: of N; no two of them write the same slot.
        arrivals: [N, Hkv] int32 zeros, by which a context's programs count who is the last; they are zeros again after
            it.
        out: as `q`; scores and softmax are fp32, the weights of values in their dtype.

    Raises:
        ValueError: a tensor does not fit, Dh is odd, Hq is not a multiple of Hkv, or the window is under 1.

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
    dtype, device = q.dtype, q.device
    check_dense("q", q, device, (num_rows, num_heads, head_dim), *FLOATS)
    for name, made, cache in (("k", k, cache_k), ("v", v, cache_v)):
        check_dense(name, made, device, (num_rows, num_kv_heads, head_dim), dtype)
        check_dense(f"cache_{name}", cache, device, (*cache_k.shape[:3], head_dim), dtype)
    for name, angles in (("cos", cos), ("sin", sin)):
        check_dense(name, angles, device, (num_rows, head_dim // 2), torch.float32)
    check_dense("positions", positions, device, (num_rows,), torch.int64)
    check_dense("block_tables", block_tables, device, (num_rows, None), torch.int32)
    check_dense("paths", paths, device, (num_rows, None), torch.int8)
    written.check("written", num_rows, device)
    check_dense("arrivals", arrivals, device, (num_rows, num_kv_heads), torch.int32)
    check_dense("out", out, device, q.shape, dtype)
    for name, norm in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
        if norm is not None:
            check_dense(f"layer.{name}", norm, device, (head_dim,), *FLOATS)
    blocks = attention_blocks(q, num_kv_heads)
    parts = torch.empty(num_rows, num_heads, blocks.splits, head_dim, dtype=torch.float32, device=q.device)
    part_max, part_sum = (torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    actions = paths[:, layer.column]
    launch(
        _attend_kernel,
        (num_rows, num_kv_heads, blocks.programs),
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
        arrivals,
        out,
        SCALE=layer.scale,
        EPS=layer.eps,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        TABLE_WIDTH=block_tables.shape[1],
        PROGRAMS=blocks.programs,
        BLOCK_QUERIES=max(_FEWEST_QUERIES, triton.next_power_of_2(num_heads // num_kv_heads)),
        num_stages=blocks.num_stages,
        NUM_COLUMNS=paths.shape[1],
        WINDOW=layer.window,
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        SPLITS=blocks.splits,
        MIN_BLOCKS=blocks.min_blocks,
        BLOCK_CONTEXT=blocks.context,
        BLOCK_DIM=blocks.dims,
    )
