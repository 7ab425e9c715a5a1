import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from buddy_kernels import rms_norm, rms_norm_reference


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference], ids=["dispatched", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (63, 257), (3, 5, 64), (0, 8)])
def test_rms_norm_has_the_bits_of_llama(norm, dtype, shape):
    torch.manual_seed(0)
    llama = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    with torch.no_grad():
        llama.weight.copy_(torch.randn(shape[-1]))
    x = (torch.randn(shape) * 7).to(dtype)
    got = norm(x, llama.weight, 1e-5)
    assert got.dtype == dtype
    assert torch.equal(got, llama(x))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"weight has shape \[3\], allowed is \[4\]"):
        rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-5)
    with pytest.raises(ValueError, match="eps is -1, allowed is 0 or more"):
        rms_norm(torch.zeros(2, 4), torch.zeros(4), -1)
