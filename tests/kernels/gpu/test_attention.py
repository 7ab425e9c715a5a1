from dataclasses import replace

import pytest
import torch

from buddy_kernels import RUN, SKIP, SMALL
from buddy_kernels.gpu.attention import AttentionLayer, attend, attend_reference
from listed_rows import listed
from tolerances import assert_close, assert_far

BLOCK_SIZE, NO_BLOCK = 16, 10**6
POSITIONS = [0, 62, 63, 256, 700, 1100, 5, 1000]
"""Those past 256 are read by several programs."""
WRITTEN = [0, 2, 3, 4, 5, 6, 7]
ACTIONS = [RUN, RUN, SMALL, SKIP, RUN, RUN, SKIP, SKIP]
RUNNING = [0, 2, 4, 5]


def a_step(num_heads, num_kv_heads, head_dim, dtype, device, window=None, all_positions=POSITIONS):
    """q, k, v, rotation, positions, block tables and caches: poisoned where no row looks, also at the newest token, and
    tables name no block there."""
    torch.manual_seed(num_heads)
    num_rows, table_width = len(all_positions), max(all_positions) // BLOCK_SIZE + 2
    tables = torch.full((num_rows, table_width), NO_BLOCK, dtype=torch.int32)
    num_blocks = num_rows * table_width
    shuffled = torch.randperm(num_blocks).int().view(num_rows, table_width)
    cache = torch.full((2, num_blocks * BLOCK_SIZE, num_kv_heads, head_dim), torch.nan)
    for row, position in enumerate(all_positions):
        seen = torch.arange(0 if window is None else max(0, position - window + 1), position + 1)
        columns = (seen // BLOCK_SIZE).unique()
        tables[row, columns] = shuffled[row, columns]
        before = seen[:-1]
        slots = tables[row, before // BLOCK_SIZE].long() * BLOCK_SIZE + before % BLOCK_SIZE
        cache[:, slots] = torch.randn(2, len(before), num_kv_heads, head_dim)
    q = torch.randn(num_rows, num_heads, head_dim).to(device, dtype)
    k, v = torch.randn(2, num_rows, num_kv_heads, head_dim).to(device, dtype)
    angles = torch.randn(num_rows, head_dim // 2, device=device)
    cache_k, cache_v = cache.to(device, dtype).unflatten(1, (num_blocks, BLOCK_SIZE))
    positions = torch.tensor(all_positions, device=device)
    return q, k, v, angles.cos(), angles.sin(), positions, tables.to(device), cache_k, cache_v


def run(op, step, layer, written, actions=ACTIONS):
    """What an op makes of a step: its output, where it wrote any, and the caches."""
    *given, cache_k, cache_v = step
    cache_k, cache_v, out = cache_k.clone(), cache_v.clone(), torch.full_like(given[0], torch.nan)
    paths = torch.full((len(actions), 3), 99, dtype=torch.int8, device=out.device)
    paths[:, 1] = torch.tensor(actions)
    arrivals = torch.zeros(len(actions), cache_k.shape[2], dtype=torch.int32, device=out.device)
    op(*given, cache_k, cache_v, paths, layer, written, arrivals, out)
    assert not arrivals.any()
    return out, cache_k, cache_v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window", "has_norms"),
    [(7, 1, 80, None, False), (4, 2, 64, 300, True), (3, 3, 2, 1, True)],
)
def test_written_rows_are_written_and_those_that_run_attend_to_what_they_see(
    dtype, num_heads, num_kv_heads, head_dim, window, has_norms, device
):
    step = a_step(num_heads, num_kv_heads, head_dim, dtype, device, window)
    norms = torch.randn(2, head_dim, device=device).to(dtype).unbind(0) if has_norms else (None, None)
    layer = AttentionLayer(1, head_dim**-0.5, window, *norms, eps=1e-6)
    written = listed(WRITTEN, len(POSITIONS), device)
    out, cache_k, cache_v = run(attend, step, layer, written)
    want, want_k, want_v = run(attend_reference, step, layer, written)
    assert torch.equal(cache_v.nan_to_num(7), want_v.nan_to_num(7))
    assert torch.equal(cache_k.isnan(), want_k.isnan())
    assert_close(cache_k.nan_to_num(0), want_k.nan_to_num(0), head_dim)
    assert torch.equal(out.isnan(), want.isnan())
    assert (~out.isnan()).all((1, 2)).nonzero().flatten().tolist() == RUNNING
    assert_close(out[RUNNING], want[RUNNING], max(POSITIONS))


def test_the_comparison_would_notice_a_lost_token(device):
    step = a_step(7, 1, 80, torch.float32, device)
    layer, written = AttentionLayer(1, 0.1), listed([2, 4], len(POSITIONS), device)
    want, _, _ = run(attend_reference, step, layer, written)
    wrong, _, _ = run(attend, step, replace(layer, window=256), written)
    assert_far(wrong[4], want[4], max(POSITIONS))
    assert_close(wrong[2], want[2], max(POSITIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype, device):
    step, layer = a_step(7, 1, 80, dtype, device), AttentionLayer(1, 0.1)
    together, _, _ = run(attend, step, layer, listed(WRITTEN, len(POSITIONS), device))
    for row in RUNNING:
        one = (*(x[row : row + 1] for x in step[:-2]), *step[-2:])
        alone, _, _ = run(attend, one, layer, listed([0], 1, device), actions=[RUN])
        assert torch.equal(alone[0], together[row])


def test_in_a_large_batch_a_program_reads_several_splits_of_a_row(device):
    positions = [5000, 4095, *[0] * 62]
    step, layer = a_step(8, 8, 2, torch.float32, device, all_positions=positions), AttentionLayer(1, 0.7)
    rows, actions = listed([0, 1, 63], len(positions), device), [RUN] * len(positions)
    together, *caches = run(attend, step, layer, rows, actions)
    want, *want_caches = run(attend_reference, step, layer, rows, actions)
    assert_close(together[[0, 1, 63]], want[[0, 1, 63]], max(positions))
    for cache, want_cache in zip(caches, want_caches, strict=True):
        assert torch.equal(cache.isnan(), want_cache.isnan())
    one = (*(x[:1] for x in step[:-2]), *step[-2:])
    alone, _, _ = run(attend, one, layer, listed([0], 1, device), actions=[RUN])
    assert torch.equal(alone[0], together[0])


def test_without_rows_nothing_is_written(device):
    step = a_step(2, 1, 16, torch.float32, device)
    out, cache_k, cache_v = run(attend, step, AttentionLayer(1, 0.25), listed([], len(POSITIONS), device))
    assert out.isnan().all()
    for cache, before in ((cache_k, step[-2]), (cache_v, step[-1])):
        assert torch.equal(cache.isnan(), before.isnan())


def test_bad_arguments_are_named(device):
    step, rows = a_step(2, 1, 16, torch.float32, device), listed([0], len(POSITIONS), device)
    with pytest.raises(ValueError, match="window is 0, allowed is None or 1 or more"):
        run(attend, step, AttentionLayer(1, 0.25, window=0), rows)
    q, k, v, cos, sin, positions, tables, *caches = step
    with pytest.raises(ValueError, match=r"block_tables has dtype torch.int64, allowed is torch.int32"):
        run(attend, (q, k, v, cos, sin, positions, tables.long(), *caches), AttentionLayer(1, 0.25), rows)
    with pytest.raises(ValueError, match="q has head dim 7, allowed is an even number"):
        run(attend, a_step(2, 1, 7, torch.float32, device), AttentionLayer(1, 0.25), rows)
