import pytest
import torch

from buddy_kernels.gpu.rotary_cache import rotate_and_write, rotate_and_write_reference
from listed_rows import every_other, listed
from tolerances import assert_close

BLOCK_SIZE, TABLE_WIDTH = 16, 3


def step(num_rows, num_heads, num_kv_heads, head_dim, dtype, device):
    """q, k, v, cos, sin, positions, block tables and a poisoned cache; no block is in two tables."""
    torch.manual_seed(num_rows)
    q = torch.randn(num_rows, num_heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, num_rows, num_kv_heads, head_dim, device=device).to(dtype)
    angles = torch.randn(num_rows, head_dim // 2, device=device)
    positions = torch.randint(0, BLOCK_SIZE * TABLE_WIDTH, (num_rows,), device=device)
    num_blocks = num_rows * TABLE_WIDTH
    tables = torch.randperm(num_blocks, device=device).int().view(num_rows, TABLE_WIDTH)
    caches = torch.full((2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim), torch.nan, device=device).to(dtype)
    return q, k, v, angles.cos(), angles.sin(), positions, tables, caches[0], caches[1]


def both(step, live, running, norms):
    """What the kernel and the reference make of a step: q and the caches."""
    results = []
    for run in (rotate_and_write, rotate_and_write_reference):
        q, *given, cache_k, cache_v = (x.clone() for x in step)
        run(q, *given, cache_k, cache_v, live, running, *norms)
        results.append((q, cache_k, cache_v))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "num_kv_heads", "head_dim"), [(1, 1, 1, 2), (17, 7, 1, 80), (9, 6, 3, 64)]
)
@pytest.mark.parametrize("has_norms", [False, True], ids=["no_norm", "norm"])
def test_queries_that_run_are_rotated_and_all_live_keys_written(
    dtype, num_rows, num_heads, num_kv_heads, head_dim, has_norms, device
):
    given = step(num_rows, num_heads, num_kv_heads, head_dim, dtype, device)
    norms = (*torch.randn(2, head_dim, device=device).to(dtype), 1e-6) if has_norms else ()
    live = listed(range(max(1, num_rows - 2)), num_rows, device)
    running = listed(range(0, max(1, num_rows - 2), 3), num_rows, device)
    (q, cache_k, cache_v), (want_q, want_k, want_v) = both(given, live, running, norms)
    assert torch.equal(cache_v.nan_to_num(7), want_v.nan_to_num(7))
    assert torch.equal(cache_k.isnan(), want_k.isnan())
    assert_close(cache_k.nan_to_num(0), want_k.nan_to_num(0), head_dim)
    assert_close(q, want_q, head_dim)
    still = torch.ones(num_rows, dtype=torch.bool, device=device)
    still[running.listed()] = False
    assert torch.equal(q[still], given[0][still])


def test_without_rows_nothing_is_written(device):
    given = step(5, 2, 1, 8, torch.float32, device)
    nobody = listed([], 5, device)
    (q, cache_k, cache_v), _ = both(given, nobody, nobody, ())
    assert torch.equal(q, given[0])
    assert cache_k.isnan().all()
    assert cache_v.isnan().all()


def test_bad_arguments_are_named(device):
    rows = every_other(5, device)
    with pytest.raises(ValueError, match="cache_k has head dim 7, allowed is an even number"):
        rotate_and_write(*step(5, 2, 1, 7, torch.float32, device), rows, rows)
    q, k, v, cos, sin, positions, tables, cache_k, cache_v = step(5, 2, 1, 8, torch.float32, device)
    with pytest.raises(ValueError, match=r"block_tables has dtype torch.int64, allowed is torch.int32"):
        rotate_and_write(q, k, v, cos, sin, positions, tables.long(), cache_k, cache_v, rows, rows)
