"""The weights of a decoder and of its router, as a step takes them."""

# L layers, A actions, V vocabulary, F width of one token's V, D model dim, Dh head dim

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from buddy_kernels import native_interface as interface


@dataclass(frozen=True, slots=True)
class Projection:
    """weight [outputs, inputs], bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. `q_norm` and `k_norm` [Dh] are Qwen3's; `window` None sees all.

    `small_gate`, `small_up` and `small_down` are the small FFN's, in layers that have one. With `writes_all`, needed in
    the first layer, rows that skip the layer write K/V too. Behind a layer with an `exit_norm` its rows go on to the
    head by this norm; they skip the layers after it."""

    input_norm: Tensor
    post_norm: Tensor
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    gate: Projection
    up: Projection
    down: Projection
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int | None = None
    writes_all: bool = True
    exit_norm: Tensor | None = None
    small_gate: Projection | None = None
    small_up: Projection | None = None
    small_down: Projection | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A decoder as the step takes it. `inv_freq` [Dh / 2] fp32, `embeddings` [V, D]."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    eps: float
    attention_factor: float
    inv_freq: Tensor
    embeddings: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: Projection


@dataclass(frozen=True)
class RouterWeights:
    """Scores of the free layers, those not `forced` [L] bool, are prior + up(silu(down(features))); without `down` the
    prior alone. A free layer has one for running or, where `costs` [L, A] int64, the milli-layers of its actions, are
    three, two: for running with the big FFN and with the small one. `sums` [lanes, F] fp64 and `last_paths` [lanes, L]
    int8 are what routing remembers, changed in place."""

    prior: Tensor
    costs: Tensor
    forced: Tensor
    sums: Tensor
    last_paths: Tensor
    down: Projection | None = None
    up: Projection | None = None

    @cached_property
    def pointers(self) -> interface.Router:
        given = interface.Router(
            prior=self.prior.data_ptr(),
            num_lanes=len(self.sums),
            num_actions=self.costs.shape[1],
            costs=self.costs.data_ptr(),
            forced=self.forced.data_ptr(),
            sums=self.sums.data_ptr(),
            last_paths=self.last_paths.data_ptr(),
        )
        if self.down is not None and self.up is not None:
            assert self.down.bias is not None
            assert self.up.bias is not None
            given.down, given.down_bias = self.down.weight.data_ptr(), self.down.bias.data_ptr()
            given.up, given.up_bias = self.up.weight.data_ptr(), self.up.bias.data_ptr()
            given.rank, given.num_features = self.down.weight.shape
        return given
