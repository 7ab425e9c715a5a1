"""The ops of Buddy Serve. `x` checks its arguments and picks a path by device; `x_reference` is the truth."""

from buddy_kernels.attention import paged_attention, paged_attention_reference
from buddy_kernels.linear import linear, linear_reference
from buddy_kernels.native_library import NativeBuildError
from buddy_kernels.norm import rms_norm, rms_norm_reference
from buddy_kernels.packed_product import UnknownArithmeticError
from buddy_kernels.paged_cache import write_kv, write_kv_reference
from buddy_kernels.rotary import (
    RotaryScaling,
    apply_rotary,
    apply_rotary_reference,
    rotary_cos_sin,
    rotary_inv_freq,
)
from buddy_kernels.routed_step import RoutedStep, WeightKind
from buddy_kernels.rows import (
    gather_rows,
    gather_rows_reference,
    scatter_rows,
    scatter_rows_reference,
)
from buddy_kernels.sampling import GREEDY, SampledToken, Sampling, draw
from buddy_kernels.step import RUN, SKIP, SMALL, Constraint, PathAction, RoutedOutput, StepRows, Wanted
from buddy_kernels.step_weights import DecoderWeights, LayerWeights, Projection, RouterWeights
from buddy_kernels.swiglu import silu, swiglu, swiglu_reference

__all__ = [
    "GREEDY",
    "RUN",
    "SKIP",
    "SMALL",
    "Constraint",
    "DecoderWeights",
    "LayerWeights",
    "NativeBuildError",
    "PathAction",
    "Projection",
    "RotaryScaling",
    "RoutedOutput",
    "RoutedStep",
    "RouterWeights",
    "SampledToken",
    "Sampling",
    "StepRows",
    "UnknownArithmeticError",
    "Wanted",
    "WeightKind",
    "apply_rotary",
    "apply_rotary_reference",
    "draw",
    "gather_rows",
    "gather_rows_reference",
    "linear",
    "linear_reference",
    "paged_attention",
    "paged_attention_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary_cos_sin",
    "rotary_inv_freq",
    "scatter_rows",
    "scatter_rows_reference",
    "silu",
    "swiglu",
    "swiglu_reference",
    "write_kv",
    "write_kv_reference",
]
