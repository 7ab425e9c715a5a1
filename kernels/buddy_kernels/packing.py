"""Weights as native/ reads them: panels of 16 outputs, whose values for one input lie side by side, and two panels
side by side.

Shapes: O outputs, I inputs (padded with zeros to multiples of 32 and 64).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 16
OUTPUTS_SIDE_BY_SIDE = 2 * LANES
"""Outputs whose weights for one input are adjacent."""
GROUP = 64
"""Inputs that share a scale in int8; every row of inputs is padded to a multiple of it."""

TOGETHER = {"float32": 1, "bfloat16": 2, "int8": 4}
"""Inputs of an output that lie side by side."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """`outputs` and `inputs` are the padded sizes. `scales` belong to int8."""

    kind: str
    panels: Tensor
    bias: Tensor | None
    scales: Tensor | None
    outputs: int
    inputs: int


def pad_to(x: Tensor, multiple: int, dim: int) -> Tensor:
    """Zeros behind the values of one dim, up to a multiple."""
    missing = -x.shape[dim] % multiple
    widths = [0, 0] * (x.dim() - dim % x.dim() - 1) + [0, missing]
    return pad(x, widths) if missing else x


def pack(weight: Tensor, bias: Tensor | None, kind: str) -> PackedMatrix:
    """weight [O, I] and bias [O] of any float dtype -> panels of "float32", "bfloat16" or "int8".

    int8 has one scale for every 64 inputs of an output, the largest of them at 127, and is stored with 128 added.
    """
    w = pad_to(pad_to(weight.detach(), OUTPUTS_SIDE_BY_SIDE, 0), GROUP, 1)
    outputs, inputs = w.shape
    packed_bias = None if bias is None else pad_to(bias.detach().float(), OUTPUTS_SIDE_BY_SIDE, 0).contiguous()
    if kind == "float32":
        panels = w.float().view(-1, OUTPUTS_SIDE_BY_SIDE, inputs).transpose(1, 2).contiguous()
        return PackedMatrix(kind, panels, packed_bias, None, outputs, inputs)
    if kind == "bfloat16":
        panels = w.bfloat16().view(-1, OUTPUTS_SIDE_BY_SIDE, inputs // 2, 2).transpose(1, 2).contiguous()
        return PackedMatrix(kind, panels, packed_bias, None, outputs, inputs)
    if kind != "int8":
        raise ValueError(f"kind is {kind!r}, allowed is float32, bfloat16 or int8")
    grouped = w.float().view(outputs, -1, GROUP)
    scales = grouped.abs().amax(-1) / 127  # [O, I / 64]
    whole = (grouped / scales[..., None].clamp_min(1e-30)).round() + 128
    panels = whole.to(torch.uint8).view(-1, OUTPUTS_SIDE_BY_SIDE, inputs // 4, 4).transpose(1, 2).contiguous()
    by_panel = scales.view(-1, OUTPUTS_SIDE_BY_SIDE, inputs // GROUP).transpose(1, 2).contiguous()
    return PackedMatrix(kind, panels, packed_bias, by_panel, outputs, inputs)


def unpack(matrix: PackedMatrix) -> Tensor:
    """Weights [O, I] fp32 of panels, the padding included."""
    together = TOGETHER[matrix.kind]
    panels = matrix.panels.float().view(-1, matrix.inputs // together, OUTPUTS_SIDE_BY_SIDE, together)
    weight = panels.transpose(1, 2).reshape(matrix.outputs, matrix.inputs)
    if matrix.scales is None:
        return weight
    scales = matrix.scales.transpose(1, 2).reshape(matrix.outputs, -1)
    return (weight - 128) * scales.repeat_interleave(GROUP, 1)


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Panels of 16 rows of two tensors [O, ...] in turn, as gate and up are read."""
    panels = [pad_to(x, LANES, 0).unflatten(0, (-1, LANES)) for x in (first, second)]
    return torch.stack(panels, 1).flatten(0, 2)
