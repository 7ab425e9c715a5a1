"""Shapes: C positions of one sequence, Hq query heads, Hkv key/value heads, Dh head dim."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from buddy_kernels import attention, paged_attention, paged_attention_reference, write_kv
from tolerances import assert_close, assert_far

HQ, HKV, DH, BLOCK_SIZE = 6, 2, 16, 16
SCALE = DH**-0.5


def paged_attention_of_an_accelerator(q, cache_k, cache_v, tables, query_start, positions, scale, window=None):
    """As paged_attention runs where the host does not look at positions."""
    given = (q, cache_k, cache_v, tables, query_start, positions, scale, window)
    return attention._paged_attention_sdpa(*given, attention._whole_context)


ATTENTIONS = [paged_attention, paged_attention_reference, paged_attention_of_an_accelerator]
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = (1, 63, 257)
each_attention = pytest.mark.parametrize("attention", ATTENTIONS, ids=["dispatched", "reference", "accelerator"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
each_window = pytest.mark.parametrize("window", [None, 1, 40], ids=["full", "window1", "window40"])


@dataclass(frozen=True, slots=True)
class Sequences:
    """Whole sequences in a cache whose every unused slot is NaN, and their plain keys and values."""

    q: list[Tensor]  # [C, Hq, Dh] each
    k: list[Tensor]  # [C, Hkv, Dh] each
    v: list[Tensor]
    cache_k: Tensor
    cache_v: Tensor
    block_tables: Tensor


def make_sequences(lengths: Sequence[int], dtype: torch.dtype = torch.float32, num_kv_heads: int = HKV) -> Sequences:
    torch.manual_seed(sum(lengths))
    max_blocks = -(-max(lengths) // BLOCK_SIZE) + 1
    num_blocks = max_blocks * len(lengths) + 1
    q = [torch.randn(n, HQ, DH).to(dtype) for n in lengths]
    k = [torch.randn(n, num_kv_heads, DH).to(dtype) for n in lengths]
    v = [torch.randn(n, num_kv_heads, DH).to(dtype) for n in lengths]
    cache_k = torch.empty(num_blocks, BLOCK_SIZE, num_kv_heads, DH, dtype=dtype).fill_(float("nan"))
    cache_v = cache_k.clone()
    block_tables = torch.randperm(num_blocks - 1)[: max_blocks * len(lengths)].view(len(lengths), max_blocks)
    for i, n in enumerate(lengths):
        used = -(-n // BLOCK_SIZE)
        block_tables[i, used:] = -1  # names no block: reading it is an error
        at = torch.arange(n)
        slots = block_tables[i, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        write_kv(cache_k, cache_v, slots, k[i], v[i])
    return Sequences(q, k, v, cache_k, cache_v, block_tables)


def dense(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, lost: int = -1) -> Tensor:
    """Plain causal attention over one whole sequence, in fp32: [C, Hq, Dh]. Rows behind `lost` do not see it."""
    at = torch.arange(q.shape[0])
    visible = at <= at[:, None]
    if window is not None:
        visible &= at > at[:, None] - window
    visible &= (at != lost) | (at[:, None] <= lost)
    heads = (x.float().transpose(0, 1) for x in (q, k, v))
    attended = functional.scaled_dot_product_attention(*heads, attn_mask=visible, scale=SCALE, enable_gqa=True)
    return attended.transpose(0, 1).to(q.dtype)


def attend(op, made: Sequences, rows: Sequence[Sequence[int]], window: int | None = None) -> list[Tensor]:
    """Run the rows (positions) of every sequence as one batch; the results split by sequence again."""
    counts = [len(positions) for positions in rows]
    q = torch.cat([q[list(positions)] for q, positions in zip(made.q, rows, strict=True)])
    query_start = torch.tensor([0, *counts]).cumsum(0)
    positions = torch.tensor([p for positions in rows for p in positions], dtype=torch.int64)
    out = op(q, made.cache_k, made.cache_v, made.block_tables, query_start, positions, scale=SCALE, window=window)
    return list(out.split(counts))


@each_attention
@each_dtype
@each_window
def test_whole_prompts_match_dense_attention(attention, dtype, window):
    made = make_sequences(LENGTHS, dtype)
    got = attend(attention, made, [range(n) for n in LENGTHS], window)
    for i in range(len(LENGTHS)):
        assert_close(got[i], dense(made.q[i], made.k[i], made.v[i], window), max(LENGTHS))
    want = dense(made.q[1], made.k[1], made.v[1], window)
    assert_far(dense(made.q[1], made.k[1], made.v[1], 41 if window is None else window + 1), want, max(LENGTHS))
    if window != 1:
        assert_far(dense(made.q[1], made.k[1], made.v[1], window, lost=7), want, max(LENGTHS))


@each_attention
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
def test_query_heads_share_key_value_heads(attention, num_kv_heads):
    made = make_sequences((63,), num_kv_heads=num_kv_heads)
    (got,) = attend(attention, made, [range(63)])
    want = dense(made.q[0], made.k[0], made.v[0])
    assert_close(got, want, 63)
    if num_kv_heads > 1:
        assert_far(dense(made.q[0], made.k[0].roll(1, 1), made.v[0].roll(1, 1)), want, 63)


@each_attention
@each_dtype
@each_window
def test_ragged_rows_with_gaps_match_dense_attention(attention, dtype, window):
    lengths = (257, 63, 5, 257, 1)
    made = make_sequences(lengths, dtype)
    rows = [[256], [0, 1, 17, 40, 62], [], [3, 15, 16, 130, 250], [0]]
    got = attend(attention, made, rows, window)
    for i, positions in enumerate(rows):
        want = dense(made.q[i], made.k[i], made.v[i], window)[positions]
        assert_close(got[i], want, max(lengths))


@each_attention
@each_window
def test_chunks_give_what_the_whole_gives(attention, window):
    made = make_sequences((257, 63))
    whole = attend(attention, made, [range(257), range(63)], window)
    chunks = [
        attend(attention, made, rows, window)
        for rows in ([range(100), []], [range(100, 228), range(62)], [range(228, 257), range(62, 63)])
    ]
    for i in range(2):
        got = torch.cat([chunk[i] for chunk in chunks])
        assert_close(got, whole[i], 257)


@each_attention
@each_dtype
def test_a_row_has_the_same_bits_in_any_batch(attention, dtype):
    lengths = (257, 63, 40)
    made = make_sequences(lengths, dtype)
    alone = attend(attention, made, [[], [62], []])[1]
    decode = attend(attention, made, [[256], [62], [39]])[1]
    mixed = attend(attention, made, [range(257), [62], range(7)])[1]
    assert torch.equal(alone, decode)
    assert torch.equal(alone, mixed)


@each_attention
def test_blocks_behind_the_window_are_not_read(attention):
    made = make_sequences((257,))
    want = dense(made.q[0], made.k[0], made.v[0], window=40)[[250, 256]]
    made.block_tables[0, : (250 - 39) // BLOCK_SIZE] = -1
    (got,) = attend(attention, made, [[250, 256]], window=40)
    assert_close(got, want, 40)
    assert_far(dense(made.q[0], made.k[0], made.v[0], window=39)[[250, 256]], want, 40)


@each_attention
def test_garbage_between_two_windows_does_not_leak(attention):
    made = make_sequences((257,))
    want = dense(made.q[0], made.k[0], made.v[0], window=16)[[20, 256]]
    made.cache_k[made.block_tables[0, 5]] = float("nan")
    made.cache_v[made.block_tables[0, 5]] = float("nan")
    (got,) = attend(attention, made, [[20, 256]], window=16)
    assert_close(got, want, 16)
    assert_far(dense(made.q[0], made.k[0], made.v[0], window=15)[[20, 256]], want, 16)


@each_attention
def test_int32_block_tables_and_query_start_work(attention):
    made = make_sequences((63,))
    positions = torch.arange(63)
    query_start = torch.tensor([0, 63])
    caches = (made.cache_k, made.cache_v)
    want = attention(made.q[0], *caches, made.block_tables, query_start, positions, SCALE)
    got = attention(made.q[0], *caches, made.block_tables.int(), query_start.int(), positions, SCALE)
    assert torch.equal(got, want)


@each_attention
def test_a_batch_without_rows_is_empty(attention):
    made = make_sequences((5,))
    (got,) = attend(attention, made, [[]])
    assert got.shape == (0, HQ, DH)


def test_a_block_table_entry_that_names_no_block_is_an_error():
    made = make_sequences((63,))
    with pytest.raises(IndexError):
        attend(paged_attention, made, [[64]])  # its block's entry is -1


def call_with(**changed):
    made = make_sequences((5,))
    arguments = {
        "q": made.q[0],
        "cache_k": made.cache_k,
        "cache_v": made.cache_v,
        "block_tables": made.block_tables,
        "query_start": torch.tensor([0, 5]),
        "positions": torch.arange(5),
        "scale": SCALE,
    }
    return paged_attention(**(arguments | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(5, 5, DH)}, "q has 5 heads, allowed is a multiple of the cache's 2"),
        ({"q": torch.zeros(5, HQ, 8)}, r"cache_k has shape .*, allowed is \[any, any, any, 8\]"),
        ({"positions": torch.arange(28, 33)}, "positions has values from 28 to 32, allowed is 0 to 31"),
        ({"positions": torch.arange(5).int()}, "positions has dtype torch.int32, allowed is torch.int64"),
        ({"query_start": torch.tensor([0, 4])}, r"query_start is \[0, 4\], allowed is a rise from 0 to 5"),
        ({"query_start": torch.tensor([0, 2, 5])}, r"query_start has shape \[3\], allowed is \[2\]"),
        ({"window": 0}, "window is 0, allowed is None or 1 or more"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call_with(**changed)
