import pytest
import torch

from buddy_kernels import Projection
from buddy_kernels.gpu.row_linear import (
    RowNorm,
    add_row_linear,
    add_row_linear_reference,
    row_linear,
    row_linear_reference,
    row_qkv,
    row_qkv_reference,
    row_swiglu,
    row_swiglu_reference,
)
from buddy_kernels.gpu.row_norm import norm_rows
from listed_rows import every_other, listed
from tolerances import assert_close

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
each_size = pytest.mark.parametrize(
    ("num_rows", "inputs", "outputs"), [(1, 1, 1), (63, 63, 33), (5, 257, 257), (17, 128, 64)]
)
each_bias = pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])


def made(dtype, num_rows, inputs, outputs, has_bias, device):
    """Inputs, weights for two products and their biases."""
    torch.manual_seed(inputs)
    x = torch.randn(num_rows, inputs, device=device).to(dtype)
    weights = [(torch.randn(outputs, inputs, device=device) / inputs**0.5).to(dtype) for _ in range(2)]
    biases = [torch.randn(outputs, device=device).to(dtype) if has_bias else None for _ in range(2)]
    return x, weights, biases


def assert_same(got, want, rows, width):
    """The listed rows up to rounding, the other rows to the bit."""
    others = torch.ones(len(want), dtype=torch.bool, device=want.device)
    others[rows.listed()] = False
    assert torch.equal(got[others].nan_to_num(7), want[others].nan_to_num(7))
    if want.dtype == torch.float16:  # finer than bf16, whose rounding the table has
        got, want = got.bfloat16(), want.bfloat16()
    assert_close(got[~others], want[~others], width)


@each_dtype
@each_size
@each_bias
def test_listed_rows_are_multiplied_and_the_others_stay(dtype, num_rows, inputs, outputs, has_bias, device):
    x, (weight, _), (bias, _) = made(dtype, num_rows, inputs, outputs, has_bias, device)
    rows = every_other(num_rows, device)
    got, want = (torch.full((num_rows, outputs), torch.nan, dtype=dtype, device=device) for _ in range(2))
    row_linear(x, weight, bias, rows, got)
    row_linear_reference(x, weight, bias, rows, want)
    assert_same(got, want, rows, inputs)


@each_dtype
@each_size
def test_products_are_added_to_the_listed_rows_of_the_residual(dtype, num_rows, inputs, outputs, device):
    x, (weight, _), (bias, _) = made(dtype, num_rows, inputs, outputs, True, device)
    rows = every_other(num_rows, device)
    got = torch.randn(num_rows, outputs, device=device).to(dtype)
    want = got.clone()
    add_row_linear(x, weight, bias, rows, got)
    add_row_linear_reference(x, weight, bias, rows, want)
    assert_same(got, want, rows, inputs)


@each_dtype
@each_size
@each_bias
def test_swiglu_of_listed_rows(dtype, num_rows, inputs, outputs, has_bias, device):
    x, (gate, up), (gate_bias, up_bias) = made(dtype, num_rows, inputs, outputs, has_bias, device)
    rows = every_other(num_rows, device)
    got, want = (torch.full((num_rows, outputs), torch.nan, dtype=dtype, device=device) for _ in range(2))
    row_swiglu(x, Projection(gate, gate_bias), Projection(up, up_bias), rows, got)
    row_swiglu_reference(x, Projection(gate, gate_bias), Projection(up, up_bias), rows, want)
    assert_same(got, want, rows, inputs)


@each_dtype
@each_size
@each_bias
def test_queries_of_rows_that_run_and_keys_and_values_of_those_written(
    dtype, num_rows, inputs, outputs, has_bias, device
):
    x, (q, k), (q_bias, k_bias) = made(dtype, num_rows, inputs, outputs, has_bias, device)
    num_kv = (outputs + 1) // 2
    k, v = (
        Projection(k[some].contiguous(), None if k_bias is None else k_bias[some].contiguous())
        for some in (slice(num_kv), slice(-num_kv, None))
    )
    running, written = every_other(num_rows, device), listed(range(max(1, num_rows - 1)), num_rows, device)
    for norm in [None, RowNorm(torch.randn(inputs, device=device).to(dtype), 1e-5)][: 2 if num_rows == 1 else 1]:
        got, want = (
            [
                torch.full((num_rows, width), torch.nan, dtype=dtype, device=device)
                for width in (outputs, num_kv, num_kv)
            ]
            for _ in range(2)
        )
        row_qkv(x, Projection(q, q_bias), k, v, running, written, *got, norm)
        row_qkv_reference(x, Projection(q, q_bias), k, v, running, written, *want, norm)
        for one, other, rows in zip(got, want, (running, written, written), strict=True):
            assert_same(one, other, rows, inputs)


@each_dtype
def test_a_single_row_s_own_norm_has_the_bits_of_one_that_is_launched(dtype, device):
    x, (weight, up), _ = made(dtype, 3, 257, 65, False, device)
    norm = RowNorm(torch.randn(257, device=device).to(dtype), 1e-5)
    normed, outs = torch.empty_like(x), [torch.empty(3, 65, dtype=dtype, device=device) for _ in range(4)]
    everyone, one, by = listed(range(3), 3, device), listed([0], 1, device), (Projection(weight), Projection(up))
    norm_rows(x, norm.weight, norm.eps, everyone, normed)
    row_qkv(normed, *by, by[0], everyone, everyone, *outs[:3])
    row_swiglu(normed, *by, everyone, outs[3])
    for row in range(3):
        alone = [torch.empty(1, 65, dtype=dtype, device=device) for _ in range(4)]
        row_qkv(x[row : row + 1], *by, by[0], one, one, *alone[:3], norm)
        row_swiglu(x[row : row + 1], *by, one, alone[3], norm)
        for out, of_batch in zip(alone, outs, strict=True):
            assert torch.equal(out[0], of_batch[row])


@each_dtype
def test_a_row_has_the_same_bits_alone_in_a_list_and_in_any_batch(dtype, device):
    x, (weight, up), (bias, _) = made(dtype, 63, 257, 65, True, device)
    multiplied, activated = (torch.empty(63, 65, dtype=dtype, device=device) for _ in range(2))
    everyone = listed(range(63), 63, device)
    row_linear(x, weight, bias, everyone, multiplied)
    gated = Projection(weight, bias), Projection(up)
    row_swiglu(x, *gated, everyone, activated)
    for first, num_rows, rows in [(20, 1, [0]), (0, 63, [20]), (10, 17, [0, 1, 16])]:
        some = slice(first, first + num_rows)
        alone, alone_activated = (torch.full((num_rows, 65), torch.nan, dtype=dtype, device=device) for _ in range(2))
        row_linear(x[some], weight, bias, listed(rows, num_rows, device), alone)
        row_swiglu(x[some], *gated, listed(rows, num_rows, device), alone_activated)
        assert torch.equal(alone[rows], multiplied[some][rows])
        assert torch.equal(alone_activated[rows], activated[some][rows])


def test_without_rows_nothing_is_written(device):
    x, (weight, up), _ = made(torch.float32, 3, 5, 7, False, device)
    nobody, out = listed([], 3, device), torch.full((3, 7), torch.nan, device=device)
    row_linear(x, weight, None, nobody, out)
    row_swiglu(x, Projection(weight), Projection(up), nobody, out)
    assert out.isnan().all()
    into = torch.zeros(3, 7, device=device)
    add_row_linear(x, weight * torch.nan, None, nobody, into)
    assert not into.any()


def test_rows_that_are_not_listed_may_hold_anything(device):
    x, (weight, _), _ = made(torch.float32, 3, 5, 7, False, device)
    x[[0, 2]] = torch.nan
    out = torch.zeros(3, 7, device=device)
    row_linear(x, weight, None, listed([1], 3, device), out)
    torch.testing.assert_close(out[1], weight @ x[1])
    assert not out[[0, 2]].any()


def test_bad_arguments_are_named(device):
    x, (weight, _), _ = made(torch.float32, 65, 5, 7, False, device)
    out = torch.empty(65, 7, device=device)
    with pytest.raises(ValueError, match="rows are 65, allowed is 1 to 64"):
        row_linear(x, weight, None, listed([0], 65, device), out)
    with pytest.raises(ValueError, match=r"bias has shape \[6\], allowed is \[7\]"):
        row_linear(x[:3], weight, torch.zeros(6, device=device), listed([0], 3, device), out[:3])
    with pytest.raises(ValueError, match=r"weight has strides \(1, 7\), allowed is a contiguous tensor"):
        row_linear(x[:3], weight.T.contiguous().T, None, listed([0], 3, device), out[:3])
    one, norm = listed([0], 3, device), RowNorm(torch.ones(5, device=device), 1e-5)
    with pytest.raises(ValueError, match=r"up.weight has dtype torch.float16, allowed is torch.float32"):
        row_swiglu(x[:3], Projection(weight), Projection(weight.half()), one, out[:3])
    by, biased = Projection(weight), Projection(weight, out[0].clone())
    with pytest.raises(ValueError, match="of q, k and v some have a bias, allowed is all or none"):
        row_qkv(x[:3], by, biased, biased, one, one, *(out[:3].clone() for _ in range(3)))
    with pytest.raises(ValueError, match="x has 3 rows, allowed with a norm is 1"):
        row_swiglu(x[:3], Projection(weight), Projection(weight), one, out[:3], norm)
    with pytest.raises(ValueError, match=r"norm.weight has shape \[4\], allowed is \[5\]"):
        row_swiglu(x[:1], *[Projection(weight)] * 2, listed([0], 1, device), out[:1], RowNorm(norm.weight[:4], 1e-5))
