import pytest
import torch

from buddy_kernels import swiglu, swiglu_reference
from tolerances import assert_close, assert_far


@pytest.mark.parametrize("op", [swiglu, swiglu_reference], ids=["dispatched", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (63, 257), (0, 8)])
def test_swiglu_is_gate_times_its_sigmoid_times_up(op, dtype, shape):
    torch.manual_seed(0)
    gate, up = torch.randn(2, *shape).to(dtype)
    want = (gate.double() * torch.sigmoid(gate.double()) * up.double()).to(dtype)
    assert_close(op(gate, up), want, width=1)
    if want.numel() > 1:
        assert_far(op(up, gate), want, width=1)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"up has shape \[4\], allowed is \[3\]"):
        swiglu(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"up has dtype torch.bfloat16, allowed is torch.float32"):
        swiglu(torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16))
