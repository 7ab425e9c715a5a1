import pytest
import torch

from buddy_kernels import (
    gather_rows,
    gather_rows_reference,
    scatter_rows,
    scatter_rows_reference,
)

each_shape = pytest.mark.parametrize("shape", [(1,), (63, 5), (257, 3, 4)])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def some_rows(num_rows: int) -> list[int]:
    torch.manual_seed(num_rows)
    return torch.randperm(num_rows)[: (num_rows + 1) // 2].tolist()


@pytest.mark.parametrize("gather", [gather_rows, gather_rows_reference], ids=["dispatched", "reference"])
@each_shape
@each_dtype
def test_gather_takes_the_rows_in_order(gather, shape, dtype):
    x, index = torch.randn(shape).to(dtype), some_rows(shape[0])
    got = gather(x, torch.tensor(index))
    assert torch.equal(got, torch.stack([x[i] for i in index]))


@pytest.mark.parametrize("scatter", [scatter_rows, scatter_rows_reference], ids=["dispatched", "reference"])
@each_shape
@each_dtype
def test_scatter_overwrites_poison_and_leaves_the_other_rows(scatter, shape, dtype):
    want, index = torch.randn(shape).to(dtype), some_rows(shape[0])
    into = want.clone()
    into[index] = float("nan")
    scatter(into, torch.tensor(index), want[index])
    assert torch.equal(into, want)


def test_no_rows_is_nothing_to_do():
    x, none = torch.randn(3, 2), torch.empty(0, dtype=torch.int64)
    kept = x.clone()
    assert gather_rows(x, none).shape == (0, 2)
    scatter_rows(x, none, torch.empty(0, 2))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_index_out_of_range_is_named(bad):
    index, x = torch.tensor([0, bad]), torch.zeros(3, 2)
    message = "index has values from .*, allowed is 0 to 2"
    with pytest.raises(ValueError, match=message):
        gather_rows(x, index)
    with pytest.raises(ValueError, match=message):
        scatter_rows(x, index, torch.zeros(2, 2))


def test_bad_arguments_are_named():
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"index has dtype torch.int32, allowed is torch.int64"):
        gather_rows(torch.zeros(3, 2), index.int())
    with pytest.raises(ValueError, match=r"rows has shape \[2, 3\], allowed is \[2, 2\]"):
        scatter_rows(torch.zeros(3, 2), index, torch.zeros(2, 3))
