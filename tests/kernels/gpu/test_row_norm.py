import pytest
import torch

from buddy_kernels.gpu.row_norm import norm_rows, norm_rows_reference
from listed_rows import every_other, listed
from tolerances import assert_close

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (63, 63), (5, 257), (2, 4096)])
def test_listed_rows_are_normed_and_the_others_stay(dtype, num_rows, width, device):
    torch.manual_seed(width)
    x = torch.randn(num_rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    rows = every_other(num_rows, device)
    got, want = (torch.full_like(x, torch.nan) for _ in range(2))
    norm_rows(x, weight, EPS, rows, got)
    norm_rows_reference(x, weight, EPS, rows, want)
    done = rows.listed()
    assert torch.equal(got.isnan(), want.isnan())
    if dtype == torch.float16:  # finer than bf16, whose rounding the table has
        got, want = got.bfloat16(), want.bfloat16()
    assert_close(got[done], want[done], width)


def test_a_row_may_be_normed_in_place_and_its_bits_do_not_depend_on_the_others(device):
    torch.manual_seed(0)
    x, weight = torch.randn(63, 257, device=device), torch.randn(257, device=device)
    together = x.clone()
    norm_rows(together, weight, EPS, listed(range(63), 63, device), together)
    for row in (0, 17, 62):
        alone = x[row : row + 1].clone()
        norm_rows(alone, weight, EPS, listed([0], 1, device), alone)
        assert torch.equal(alone[0], together[row])


def test_no_rows_is_nothing_to_do(device):
    out = torch.full((3, 5), torch.nan, device=device)
    norm_rows(torch.zeros(3, 5, device=device), torch.ones(5, device=device), EPS, listed([], 3, device), out)
    assert out.isnan().all()


def test_bad_shapes_are_named(device):
    x, rows = torch.zeros(3, 5, device=device), listed([0], 3, device)
    with pytest.raises(ValueError, match=r"x has shape \[3, 5\], allowed is \[3, 6\]"):
        norm_rows(x, torch.ones(6, device=device), EPS, rows, x)
    with pytest.raises(ValueError, match=r"out has dtype torch.float16, allowed is torch.float32"):
        norm_rows(x, torch.ones(5, device=device), EPS, rows, x.half())
