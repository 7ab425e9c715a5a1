"""Rotary position embedding: frequencies, their angles at positions, and the rotation.

Shapes: N rows, H heads, Dh head dim. A head is split in halves, pair i is (x[i], x[i + Dh / 2]), as in
transformers' Llama and unlike the interleaved pairs of the paper.

Source: Su et al., RoFormer, section 3.4; Peng et al., YaRN, section 3; transformers' modeling_rope_utils.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from buddy_kernels.checks import check_shape

RotaryKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RotaryScaling:
    """How a model stretches its rotary frequencies past the context it was pretrained on.

    The fields are those of a Hugging Face `rope_parameters` (or `rope_scaling`) entry.
    `original_max_position` is in tokens and needed by "llama3" and "yarn"; "linear" reads `factor` alone.

    Raises:
        ValueError: unknown `kind`, `factor` not positive, or what `kind` needs is missing or not usable.
    """

    kind: RotaryKind
    factor: float
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(RotaryKind):
            allowed = ", ".join(get_args(RotaryKind))
            raise ValueError(f"rotary scaling kind is {self.kind!r}, allowed are {allowed}")
        if not self.factor > 0:
            raise ValueError(f"rotary scaling factor is {self.factor}, allowed is more than 0")
        if self.kind != "linear" and (self.original_max_position is None or self.original_max_position < 1):
            raise ValueError(
                f"original_max_position is {self.original_max_position}, allowed for {self.kind!r} is 1 or more"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor, high_freq_factor are {self.low_freq_factor}, {self.high_freq_factor}, "
                "allowed is 0 < low_freq_factor < high_freq_factor"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"beta_slow, beta_fast are {self.beta_slow}, {self.beta_fast}, allowed is 0 < beta_slow <= beta_fast"
            )


def rotary_inv_freq(head_dim: int, theta: float, scaling: RotaryScaling | None = None) -> tuple[Tensor, float]:
    """The angle per position of every pair, and the factor on cos and sin.

    Args:
        head_dim: Dh, even.
        theta: base of the wavelengths, more than 1.
        scaling: None for the plain embedding.

    Returns:
        inv_freq [Dh / 2] fp32 in radians per token, on the CPU, and the attention factor (1 unless "yarn").
        Both equal what transformers computes for the same config.

    Raises:
        ValueError: `head_dim` is odd or not positive, or `theta` is not more than 1.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, allowed is a positive even number")
    if not theta > 1:
        raise ValueError(f"theta is {theta}, allowed is more than 1")
    wavelength = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # [Dh/2], over 2 pi
    inv_freq = 1.0 / wavelength
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3_inv_freq(inv_freq, scaling), 1.0
    # 1 / (factor * wavelength), not inv_freq / factor: transformers' order, which decides the last bit.
    stretched = 1.0 / (scaling.factor * wavelength)  # [Dh/2]
    keep = _yarn_keep(head_dim, theta, scaling)  # [Dh/2]
    return stretched * (1 - keep) + inv_freq * keep, _yarn_attention_factor(scaling)


def rotary_cos_sin(positions: Tensor, inv_freq: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles at `positions`, each times `attention_factor`.

    Args:
        positions: [N] integers.
        inv_freq: [Dh / 2] fp32, on the device of `positions`.
        attention_factor: from `rotary_inv_freq`.

    Returns:
        cos, sin: [N, Dh / 2] fp32.

    Raises:
        ValueError: a shape does not fit.
    """
    check_shape("positions", positions, (None,))
    check_shape("inv_freq", inv_freq, (None,))
    # The angle in fp32 as transformers has it; its cosine in fp64, because torch's CPU loops end with another cosine
    # than they begin with and a row would change its last bit with the number of rows.
    angles = (positions[:, None].float() * inv_freq.float()).double()  # [N, Dh/2]
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def apply_rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary` in plain torch; the truth."""
    first, second = x.float().chunk(2, dim=-1)  # [N, H, Dh/2] each
    cos, sin = cos[:, None].float(), sin[:, None].float()  # [N, 1, Dh/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every pair (x[i], x[i + Dh / 2]) of every head by its row's angle.

    Computed in fp32 and rounded once. transformers rounds cos and sin to the model's dtype first, so below
    fp32 the two differ by that rounding; this one is the nearer to the exact rotation.

    Args:
        x: [N, H, Dh].
        cos: [N, Dh / 2] from `rotary_cos_sin`.
        sin: as `cos`.

    Returns:
        [N, H, Dh] in the dtype of `x`.

    Raises:
        ValueError: a shape does not fit, or Dh is odd.
    """
    check_shape("x", x, (None, None, None))
    num_rows, _, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"x has head dim {head_dim}, allowed is an even number")
    check_shape("cos", cos, (num_rows, head_dim // 2))
    check_shape("sin", sin, (num_rows, head_dim // 2))
    return apply_rotary_reference(x, cos, sin)


def _llama3_inv_freq(inv_freq: Tensor, scaling: RotaryScaling) -> Tensor:
    """Long wavelengths stretched by the factor, short ones kept, a linear blend between: Llama 3.1."""
    assert scaling.original_max_position is not None  # RotaryScaling refused it
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inv_freq  # [Dh/2] in tokens
    turns = scaling.original_max_position / wavelength  # [Dh/2] full turns within the pretrained context
    blend = (turns - low) / (high - low)
    stretched = inv_freq / scaling.factor
    blended = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    is_long = wavelength > scaling.original_max_position / low
    is_short = wavelength < scaling.original_max_position / high
    return torch.where(is_long, stretched, torch.where(is_short, inv_freq, blended))


def _yarn_keep(head_dim: int, theta: float, scaling: RotaryScaling) -> Tensor:
    """How much of each pair's own frequency YaRN keeps: [Dh / 2], 1 fast pairs .. 0 slow pairs."""
    assert scaling.original_max_position is not None  # RotaryScaling refused it
    original = scaling.original_max_position

    def pair_of(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # head_dim - 1 though there are head_dim / 2 pairs: as published, and checkpoints were trained with it.
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # else 0 / 0 at that pair
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    return 1 - ramp.clamp(0, 1)


def _yarn_attention_factor(scaling: RotaryScaling) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
