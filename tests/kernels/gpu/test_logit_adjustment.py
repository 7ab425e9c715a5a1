from dataclasses import replace

import pytest
import torch

from buddy_kernels.gpu.logit_adjustment import LogitAdjustments, adjust_logits, adjust_logits_reference
from listed_rows import every_other, listed


def adjustments(num_rows, num_lanes, vocab, device):
    torch.manual_seed(vocab)
    presence, frequency = torch.rand(2, num_lanes, dtype=torch.float64, device=device)
    counts = torch.randint(0, 3, (num_lanes, vocab), dtype=torch.int32, device=device)
    bias = torch.randn(num_lanes, vocab, device=device).relu()
    allowed = torch.randint(0, 256, (num_rows, (vocab + 7) // 8), dtype=torch.uint8, device=device)
    return LogitAdjustments(presence, frequency, counts, bias, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_allowed", [False, True], ids=["all_allowed", "some_allowed"])
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 1), (5, 63), (3, 2057)])
def test_logits_are_those_of_the_reference(dtype, has_allowed, num_rows, vocab, device):
    given = adjustments(num_rows, num_rows + 2, vocab, device)
    if not has_allowed:
        given = replace(given, allowed=None)
    logits = torch.randn(num_rows, vocab, device=device).to(dtype)
    lanes = torch.randperm(num_rows + 2, device=device)[:num_rows]
    got, want = (torch.full((num_rows, vocab), torch.nan, device=device) for _ in range(2))
    adjust_logits(logits, lanes, given, every_other(num_rows, device), got)
    adjust_logits_reference(logits, lanes, given, every_other(num_rows, device), want)
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def test_without_rows_nothing_is_written(device):
    out = torch.full((3, 9), torch.nan, device=device)
    given = adjustments(3, 3, 9, device)
    adjust_logits(torch.zeros(3, 9, device=device), torch.arange(3, device=device), given, listed([], 3, device), out)
    assert out.isnan().all()


def test_a_mask_of_another_vocabulary_is_named(device):
    given = replace(adjustments(1, 1, 9, device), allowed=torch.zeros(1, 1, dtype=torch.uint8, device=device))
    logits, lanes = torch.zeros(1, 9, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"adjustments.allowed has shape \[1, 1\], allowed is \[1, 2\]"):
        adjust_logits(logits, lanes, given, listed([0], 1, device), torch.empty(1, 9, device=device))
