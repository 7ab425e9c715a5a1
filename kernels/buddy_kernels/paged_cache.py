"""Writing keys and values into the paged cache of one layer.

Shapes: N new rows, P blocks in the pool, K slots per block, Hkv key/value heads, Dh head dim.
A slot is block * K + offset.
"""

import torch
from torch import Tensor

from buddy_kernels.checks import check_dtype, check_range, check_shape


def write_kv_reference(cache_k: Tensor, cache_v: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """`write_kv` in plain torch; the truth."""
    # view, never flatten or reshape: those may copy, and the write would be lost.
    cache_k.view(-1, *cache_k.shape[2:]).index_copy_(0, slots, k)
    cache_v.view(-1, *cache_v.shape[2:]).index_copy_(0, slots, v)


def write_kv(cache_k: Tensor, cache_v: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store the keys and values of N tokens in their slots, in place.

    Args:
        cache_k: [P, K, Hkv, Dh] contiguous, one layer, changed in place.
        cache_v: as `cache_k`.
        slots: [N] int64, values in 0 .. P * K - 1, no value twice (unchecked; the result is then undefined).
        k: [N, Hkv, Dh] in the dtype of the cache.
        v: as `k`.

    Raises:
        ValueError: a shape, dtype or layout does not fit, or (seen on CPU only) a slot is out of range.

    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, section 4.
    """
    check_shape("cache_k", cache_k, (None, None, None, None))
    check_shape("cache_v", cache_v, cache_k.shape)
    check_shape("slots", slots, (None,))
    check_dtype("slots", slots, torch.int64)
    num_blocks, block_size, num_kv_heads, head_dim = cache_k.shape
    for name, cache, new in (("k", cache_k, k), ("v", cache_v, v)):
        if not cache.is_contiguous():
            raise ValueError(f"cache_{name} has strides {cache.stride()}, allowed is a contiguous tensor")
        check_shape(name, new, (slots.shape[0], num_kv_heads, head_dim))
        check_dtype(name, new, cache.dtype)
    check_range("slots", slots, num_blocks * block_size)
    write_kv_reference(cache_k, cache_v, slots, k, v)
