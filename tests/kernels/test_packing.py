"""Packed weights hold what the weights held."""

import pytest
import torch

from buddy_kernels.packing import PackedMatrix, interleaved, pack, unpack


def unpacked(matrix: PackedMatrix, outputs: int, inputs: int) -> torch.Tensor:
    """[O, I] fp32, and behind them nothing but zeros."""
    weight = unpack(matrix)
    assert not weight[outputs:].any()
    assert not weight[:, inputs:].any()
    return weight[:outputs, :inputs]


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (33, 70), (1, 1), (97, 192)])
def test_panels_hold_the_weights(outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs)
    assert torch.equal(unpacked(pack(weight, None, "float32"), outputs, inputs), weight)
    assert torch.equal(unpacked(pack(weight, None, "bfloat16"), outputs, inputs), weight.bfloat16().float())
    int8 = pack(weight, None, "int8")
    assert int8.scales is not None
    # Half a step of the scale at most, which is a 127th of the largest of the group.
    assert (unpacked(int8, outputs, inputs) - weight).abs().max() <= weight.abs().max() / 127 / 2 + 1e-6


def test_an_empty_group_of_int8_is_zero() -> None:
    assert not unpacked(pack(torch.zeros(16, 64), None, "int8"), 16, 64).any()


def test_bias_is_padded_and_an_unknown_kind_is_named() -> None:
    packed = pack(torch.randn(5, 3), torch.ones(5), "bfloat16")
    assert packed.bias is not None
    assert packed.bias.tolist() == [1.0] * 5 + [0.0] * 27
    with pytest.raises(ValueError, match="int4"):
        pack(torch.randn(5, 3), None, "int4")


def test_interleaved_panels_take_turns() -> None:
    gate, up = torch.zeros(20, 3), torch.ones(20, 3)
    assert interleaved(gate, up)[:, 0].tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 16 + [1.0] * 4 + [0.0] * 12
