"""Causal attention over the paged cache of one layer, for a ragged batch of prefill and decode rows.

Shapes: N query rows of the batch, S sequences, R rows of one sequence, C cached positions of one sequence,
Hq query heads, Hkv key/value heads, G = Hq / Hkv, Dh head dim, P blocks in the pool, K slots per block,
T block table columns. In einsum strings: r = R, c = C, h = Hkv, g = G, d = Dh.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from buddy_kernels.checks import check_dtype, check_range, check_shape

GetContext = Callable[[Tensor, Tensor, Tensor, Tensor, int | None], tuple[Tensor, Tensor, Tensor]]
"""`_context` or `_whole_context`."""


def paged_attention_reference(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`paged_attention` in plain torch; the truth."""
    out = torch.empty_like(q)  # [N, Hq, Dh]
    num_kv_heads = cache_k.shape[2]
    bounds = query_start.tolist()
    # One sequence at a time, never padded together: a row's bits then do not depend on the other sequences.
    for block_table, start, end in zip(block_tables, bounds[:-1], bounds[1:], strict=True):
        if start == end:
            continue
        k, v, visible = _context(cache_k, cache_v, block_table, positions[start:end], window)
        grouped = q[start:end].float().reshape(end - start, num_kv_heads, -1, q.shape[2])  # [R, Hkv, G, Dh]
        scores = torch.einsum("rhgd,chd->hgrc", grouped, k.float()) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)  # [Hkv, G, R, C]
        out[start:end] = torch.einsum("hgrc,chd->rhgd", weights, v.float()).flatten(1, 2).to(q.dtype)
    return out


def _paged_attention_sdpa(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    context: GetContext,
) -> Tensor:
    """`paged_attention` by torch's fused attention, still one sequence at a time."""
    out = torch.empty_like(q)  # [N, Hq, Dh]
    bounds = query_start.tolist()
    for block_table, start, end in zip(block_tables, bounds[:-1], bounds[1:], strict=True):
        if start == end:
            continue
        k, v, visible = context(cache_k, cache_v, block_table, positions[start:end], window)
        is_gqa = context is _context
        if not is_gqa:
            # A GPU's kernel that takes a mask, and no memory for all scores, wants a K/V head for each query head.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        # Batch dim first: given [H, R, Dh] alone, torch takes a slower path.
        attended = functional.scaled_dot_product_attention(
            q[start:end].transpose(0, 1)[None],  # [1, Hq, R, Dh]
            k.transpose(0, 1)[None],  # [1, Hkv, C, Dh]
            v.transpose(0, 1)[None],
            # A lone row sees all of its context, where that ends with it.
            attn_mask=None if end - start == 1 and context is _context else visible,
            scale=scale,
            enable_gqa=is_gqa,
        )
        out[start:end] = attended[0].transpose(0, 1)
    return out


def paged_attention(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Each query row attends to the cached positions 0 .. its own of its sequence, its own included.

    The row's own key and value must be in the cache already. Query head h reads key/value head h // G. A
    row's result does not depend on the other sequences, nor, beyond float error, on how its own was cut into
    chunks.

    Args:
        q: [N, Hq, Dh], rotated.
        cache_k: [P, K, Hkv, Dh], rotated.
        cache_v: as `cache_k`.
        block_tables: [S, T] int32 or int64; entry t holds positions t * K .. t * K + K - 1. Entries past the
            newest row's position, or behind the oldest row's window, are not read; nor are cache slots there.
        query_start: [S + 1] int32 or int64; sequence s has the rows query_start[s] .. query_start[s + 1] - 1. Read by
            the host, so best on the CPU.
        positions: [N] int64, the position of every row in its sequence; gaps are allowed.
        scale: factor on the scores, usually Dh ** -0.5.
        window: sees only positions > own - window; None sees all.

    Returns:
        [N, Hq, Dh] in the dtype of `q`; scores and softmax are fp32.

    Raises:
        ValueError: a shape or dtype does not fit, Hq is not a multiple of Hkv, `window` is under 1, `query_start` does
            not rise from 0 to N, or (seen on CPU only) a position is past the block table.
        IndexError: (seen on CPU only) a block table entry that is read names no block.

    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, section 4.1.
    """
    check_shape("q", q, (None, None, None))
    num_rows, num_heads, head_dim = q.shape
    check_shape("cache_k", cache_k, (None, None, None, head_dim))
    check_shape("cache_v", cache_v, cache_k.shape)
    if cache_k.shape[2] == 0 or num_heads % cache_k.shape[2]:
        raise ValueError(f"q has {num_heads} heads, allowed is a multiple of the cache's {cache_k.shape[2]}")
    check_shape("block_tables", block_tables, (None, None))
    check_dtype("block_tables", block_tables, torch.int32, torch.int64)
    check_shape("query_start", query_start, (block_tables.shape[0] + 1,))
    check_dtype("query_start", query_start, torch.int32, torch.int64)
    check_shape("positions", positions, (num_rows,))
    check_dtype("positions", positions, torch.int64)
    check_range("positions", positions, block_tables.shape[1] * cache_k.shape[1])
    bounds = query_start.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows or bounds != sorted(bounds):
        raise ValueError(f"query_start is {bounds}, allowed is a rise from 0 to {num_rows}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, allowed is None or 1 or more")
    context = _context if q.device.type == "cpu" else _whole_context
    return _paged_attention_sdpa(q, cache_k, cache_v, block_tables, query_start, positions, scale, window, context)


def _context(
    cache_k: Tensor, cache_v: Tensor, block_table: Tensor, positions: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [C, Hkv, Dh] that one sequence's rows look at, and which row sees which [R, C]."""
    block_size = cache_k.shape[1]
    oldest = 0 if window is None else max(0, int(positions.min()) - window + 1)
    newest = int(positions.max())
    first_block = oldest // block_size
    blocks = block_table[first_block : newest // block_size + 1]
    wanted = slice(oldest - first_block * block_size, newest + 1 - first_block * block_size)
    k = cache_k.index_select(0, blocks).flatten(0, 1)[wanted]
    v = cache_v.index_select(0, blocks).flatten(0, 1)[wanted]
    seen_at = torch.arange(oldest, newest + 1, device=positions.device)  # [C]
    visible = seen_at <= positions[:, None]
    if window is not None:
        visible &= seen_at > positions[:, None] - window
        # Rows far apart leave positions between them that none sees, and NaN there would get past any mask.
        unseen = ~visible.any(0)[:, None, None]  # [C, 1, 1]
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    return k, v, visible


def _whole_context(
    cache_k: Tensor, cache_v: Tensor, block_table: Tensor, positions: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_context`, without a look at `positions` from the host, which an accelerator would have to wait for: of all
    that the block table names. C is its length in tokens."""
    blocks = block_table.clamp(min=0)
    k, v = (cache.index_select(0, blocks).flatten(0, 1) for cache in (cache_k, cache_v))
    seen_at = torch.arange(len(k), device=positions.device)  # [C]
    visible = seen_at <= positions[:, None]
    if window is not None:
        visible &= seen_at > positions[:, None] - window
    # What was not written may be NaN, and would get past any mask.
    unseen = ~visible.any(0)[:, None, None]  # [C, 1, 1]
    return k.masked_fill(unseen, 0), v.masked_fill(unseen, 0), visible
