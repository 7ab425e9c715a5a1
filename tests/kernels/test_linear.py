from collections.abc import Iterator

import pytest
import torch

from buddy_kernels import linear, linear_reference
from tolerances import assert_close, assert_far


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of torch, which cuts a product into parts for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("dtype", "threads"),
    # bfloat16 is not promised: see `linear`.
    [(torch.float32, 1), (torch.float16, 1), (torch.float32, 2), (torch.float16, 2)],
    indirect=["threads"],
)
@pytest.mark.parametrize(("width_in", "width_out"), [(32, 48), (192, 512), (512, 192), (63, 257), (1536, 2048)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(
    dtype: torch.dtype, width_in: int, width_out: int, with_bias: bool
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(130, width_in).to(dtype), torch.randn(width_out, width_in).to(dtype)
    bias = torch.randn(width_out).to(dtype) if with_bias else None
    whole = linear(x, weight, bias)
    for num_rows in (1, 2, 3, 5, 8, 15, 16, 17, 63, 64, 129):
        assert torch.equal(linear(x[:num_rows], weight, bias), whole[:num_rows])
    shuffled = torch.randperm(130)[:7]
    assert torch.equal(linear(x[shuffled], weight, bias), whole[shuffled])


def test_tiles_equal_the_reference() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(63, 40), torch.randn(24, 40), torch.randn(24)
    want = linear_reference(x, weight, bias)
    assert_close(linear(x, weight, bias), want, 40)
    assert_far(linear(x[:, 1:], weight[:, 1:], bias), want, 40)


def test_widths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[24, 41\], allowed is \[any, 40\]"):
        linear(torch.zeros(2, 40), torch.zeros(24, 41))
