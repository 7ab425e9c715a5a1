import pytest
import torch

from buddy_kernels.gpu.decode_attention import decode_attention, decode_attention_reference
from listed_rows import listed
from tolerances import assert_close, assert_far

BLOCK_SIZE, NO_BLOCK = 16, 10**6
POSITIONS = [0, 62, 63, 256, 700, 1100]
"""The last three are read by several programs."""


def contexts(num_heads, num_kv_heads, head_dim, window, dtype, device, given_positions=POSITIONS):
    """q, a cache that is poisoned where no row looks, block tables that name no block there, and positions."""
    torch.manual_seed(num_heads)
    num_rows, table_width = len(given_positions), max(given_positions) // BLOCK_SIZE + 2
    tables = torch.full((num_rows, table_width), NO_BLOCK, dtype=torch.int32)
    num_blocks = num_rows * table_width
    shuffled = torch.randperm(num_blocks).int().view(num_rows, table_width)
    cache = torch.full((2, num_blocks * BLOCK_SIZE, num_kv_heads, head_dim), torch.nan)
    for row, position in enumerate(given_positions):
        seen = torch.arange(0 if window is None else max(0, position - window + 1), position + 1)
        columns = (seen // BLOCK_SIZE).unique()
        tables[row, columns] = shuffled[row, columns]
        slots = tables[row, seen // BLOCK_SIZE].long() * BLOCK_SIZE + seen % BLOCK_SIZE
        cache[:, slots] = torch.randn(2, len(seen), num_kv_heads, head_dim)
    q = torch.randn(num_rows, num_heads, head_dim).to(device, dtype)
    cache_k, cache_v = cache.to(device, dtype).unflatten(1, (num_blocks, BLOCK_SIZE))
    return q, cache_k, cache_v, tables.to(device), torch.tensor(given_positions, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window"), [(7, 1, 80, None), (4, 2, 64, 300), (3, 3, 2, 1)]
)
def test_listed_rows_attend_to_what_they_see(dtype, num_heads, num_kv_heads, head_dim, window, device):
    q, *given = contexts(num_heads, num_kv_heads, head_dim, window, dtype, device)
    rows = listed([0, 2, 3, 5], len(POSITIONS), device)
    got, want = (torch.full_like(q, torch.nan) for _ in range(2))
    decode_attention(q, *given, head_dim**-0.5, window, rows, got)
    decode_attention_reference(q, *given, head_dim**-0.5, window, rows, want)
    done = rows.listed()
    assert torch.equal(got.isnan(), want.isnan())
    assert_close(got[done], want[done], max(POSITIONS))


def test_the_comparison_would_notice_a_lost_token(device):
    q, cache_k, cache_v, tables, positions = contexts(7, 1, 80, None, torch.float32, device)
    rows = listed([2, 4], len(POSITIONS), device)
    want, wrong = torch.zeros_like(q), torch.zeros_like(q)
    decode_attention_reference(q, cache_k, cache_v, tables, positions, 0.1, None, rows, want)
    decode_attention(q, cache_k, cache_v, tables, positions - 1, 0.1, None, rows, wrong)
    assert_far(wrong, want, max(POSITIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype, device):
    q, cache_k, cache_v, tables, positions = contexts(7, 1, 80, None, dtype, device)
    together = torch.empty_like(q)
    everyone = listed(range(len(POSITIONS)), len(POSITIONS), device)
    decode_attention(q, cache_k, cache_v, tables, positions, 0.1, None, everyone, together)
    for row in range(len(POSITIONS)):
        one, alone = slice(row, row + 1), torch.empty_like(q[:1])
        decode_attention(
            q[one], cache_k, cache_v, tables[one], positions[one], 0.1, None, listed([0], 1, device), alone
        )
        assert torch.equal(alone[0], together[row])


def test_in_a_large_batch_a_program_reads_several_splits_of_a_row(device):
    positions = [5000, 4095, *[0] * 62]
    q, cache_k, cache_v, tables, at = contexts(8, 8, 2, None, torch.float32, device, positions)
    together, want = torch.zeros_like(q), torch.zeros_like(q)
    rows = listed([0, 1, 63], len(positions), device)
    decode_attention(q, cache_k, cache_v, tables, at, 0.7, None, rows, together)
    decode_attention_reference(q, cache_k, cache_v, tables, at, 0.7, None, rows, want)
    assert_close(together, want, max(positions))
    alone = torch.empty_like(q[:1])
    decode_attention(q[:1], cache_k, cache_v, tables[:1], at[:1], 0.7, None, listed([0], 1, device), alone)
    assert torch.equal(alone[0], together[0])


def test_without_rows_nothing_is_written(device):
    q, *given = contexts(2, 1, 16, None, torch.float32, device)
    out = torch.full_like(q, torch.nan)
    decode_attention(q, *given, 0.25, None, listed([], len(POSITIONS), device), out)
    assert out.isnan().all()


def test_bad_arguments_are_named(device):
    q, *given = contexts(2, 1, 16, None, torch.float32, device)
    rows = listed([0], len(POSITIONS), device)
    with pytest.raises(ValueError, match="window is 0, allowed is None or 1 or more"):
        decode_attention(q, *given, 0.25, 0, rows, q)
    with pytest.raises(ValueError, match=r"out has shape \[6, 3, 16\], allowed is \[6, 2, 16\]"):
        decode_attention(q, *given, 0.25, None, rows, torch.empty(6, 3, 16, device=device))
