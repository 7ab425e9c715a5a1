import pytest
import torch

from buddy_kernels import write_kv, write_kv_reference

BLOCK_SIZE, HKV, DH = 16, 3, 8


@pytest.mark.parametrize("write", [write_kv, write_kv_reference], ids=["dispatched", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [0, 1, 63, 257])
def test_rows_land_in_their_slots_and_nowhere_else(write, dtype, num_rows):
    torch.manual_seed(num_rows)
    cache_k = torch.empty(20, BLOCK_SIZE, HKV, DH, dtype=dtype).fill_(float("nan"))
    cache_v = cache_k.clone()
    slots = torch.randperm(20 * BLOCK_SIZE)[:num_rows]
    k, v = torch.randn(2, num_rows, HKV, DH).to(dtype)
    write(cache_k, cache_v, slots, k, v)
    assert torch.equal(cache_k[slots // BLOCK_SIZE, slots % BLOCK_SIZE], k)
    assert torch.equal(cache_v[slots // BLOCK_SIZE, slots % BLOCK_SIZE], v)
    assert int(cache_k.isnan().sum()) == int(cache_v.isnan().sum()) == (20 * BLOCK_SIZE - num_rows) * HKV * DH


def test_one_layer_of_a_larger_cache_is_written_in_place():
    cache = torch.zeros(2, 4, 2, BLOCK_SIZE, HKV, DH)  # k and v, layers, then one layer's layout
    write_kv(cache[0, 1], cache[1, 1], torch.tensor([17]), torch.ones(1, HKV, DH), torch.ones(1, HKV, DH))
    assert cache.sum() == 2 * HKV * DH
    assert cache[:, 1, 1, 1].min() == 1


def test_bad_arguments_are_named():
    cache = torch.zeros(2, BLOCK_SIZE, HKV, DH)
    k = torch.zeros(1, HKV, DH)
    with pytest.raises(ValueError, match="slots has values from 32 to 32, allowed is 0 to 31"):
        write_kv(cache, cache.clone(), torch.tensor([32]), k, k)
    with pytest.raises(ValueError, match=r"v has shape \[2, 3, 8\], allowed is \[1, 3, 8\]"):
        write_kv(cache, cache.clone(), torch.tensor([0]), k, torch.zeros(2, HKV, DH))
    with pytest.raises(ValueError, match=r"k has dtype torch.bfloat16, allowed is torch.float32"):
        write_kv(cache, cache.clone(), torch.tensor([0]), k.bfloat16(), k)
    strided = torch.zeros(BLOCK_SIZE, 2, HKV, DH).transpose(0, 1)
    with pytest.raises(ValueError, match=r"cache_v has strides .*, allowed is a contiguous tensor"):
        write_kv(cache, strided, torch.tensor([0]), k, k)
