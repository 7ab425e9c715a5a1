"""A whole decode step on the device: one token of every live row, by kernels whose launches follow nobody's path.

The reference is `buddy_routing.decoder.RoutedDecoder.forward` with the draw of sampling.py. Which layers a row runs is
known on the device only: every launch is made for every layer, and its programs leave at once where no row is listed.
So a step is the same launches each time, with no look at a value from the host, and can be captured into a CUDA graph.
"""

# N rows, C columns of a path (layers, then exits), D model dim, Hq query heads, Hkv key/value heads, Dh head dim,
# F feed-forward dim, V vocabulary, M positions

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from buddy_kernels.gpu.attention import AttentionLayer, attend
from buddy_kernels.gpu.logit_adjustment import LogitAdjustments, adjust_logits
from buddy_kernels.gpu.path_choice import choose_paths
from buddy_kernels.gpu.path_router import score_layers
from buddy_kernels.gpu.row_linear import RowNorm, add_row_linear, row_linear, row_qkv, row_swiglu
from buddy_kernels.gpu.row_lists import LayerLists, RowList, fill_layer_lists
from buddy_kernels.gpu.row_norm import norm_rows
from buddy_kernels.gpu.row_state import RowState
from buddy_kernels.gpu.row_steps import begin_step, end_step
from buddy_kernels.gpu.token_draw import draw_tokens
from buddy_kernels.rotary import rotary_cos_sin
from buddy_kernels.step_weights import DecoderWeights, LayerWeights, Projection, RouterWeights


@dataclass(frozen=True, slots=True)
class DecodeModel:
    """All that steps of any number of rows share: weights, router, the paged cache of every column `cache_k` and
    `cache_v` [C, P, K, Hkv, Dh], and cos and sin [M, Dh / 2] fp32 of all positions."""

    weights: DecoderWeights
    router: RouterWeights
    cache_k: Tensor
    cache_v: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(
        cls, weights: DecoderWeights, router: RouterWeights, cache_k: Tensor, cache_v: Tensor, num_positions: int
    ) -> Self:
        positions = torch.arange(num_positions, device=cache_k.device)
        cos, sin = rotary_cos_sin(positions, weights.inv_freq, weights.attention_factor)
        return cls(weights, router, cache_k, cache_v, cos, sin)


class DecodeStep:
    """Steps of `state`'s rows, with buffers of its own. `logits` [N, V] are the last step's, in the model's dtype. The
    lanes of `adjustments` are the rows."""

    def __init__(self, model: DecodeModel, state: RowState, adjustments: LogitAdjustments) -> None:
        self._model, self._state, self._adjustments = model, state, adjustments
        weights = model.weights
        num_rows, dim, device = state.live.num_rows, weights.embeddings.shape[1], weights.embeddings.device

        def buffer(*shape: int, dtype: torch.dtype = weights.embeddings.dtype) -> Tensor:
            return torch.empty(num_rows, *shape, dtype=dtype, device=device)

        self._h, self._normed = buffer(dim), buffer(dim)
        self._q, self._attended = (buffer(weights.num_heads, weights.head_dim) for _ in range(2))
        self._k, self._v = (buffer(weights.num_kv_heads, weights.head_dim) for _ in range(2))
        self._qkv = (self._q.flatten(1), self._k.flatten(1), self._v.flatten(1))
        widths = {len(up.weight) for layer in weights.layers for up in (layer.up, layer.small_up) if up is not None}
        self._fed = {width: buffer(width) for width in widths}
        self._arrivals = torch.zeros(num_rows, weights.num_kv_heads, dtype=torch.int32, device=device)
        self._cos, self._sin = (buffer(weights.head_dim // 2, dtype=torch.float32) for _ in range(2))
        self._scores = buffer(len(model.router.prior), dtype=torch.float32)
        self._paths = buffer(len(weights.layers), dtype=torch.int8)
        self._lists = LayerLists.empty(num_rows, len(weights.layers), device)
        self._rows = torch.arange(num_rows, device=device)
        self._adjusted = buffer(len(weights.embeddings), dtype=torch.float32)
        self._drawn = buffer(dtype=torch.int64)
        self.logits = buffer(len(weights.embeddings))

    def run(self, adjusts: bool) -> None:
        """Launch one step, which `adjusts` logits or draws from them as they are."""
        model, state, weights = self._model, self._state, self._model.weights
        begin_step(state, weights.embeddings, model.cos, model.sin, self._h, self._cos, self._sin)
        for column, layer in enumerate(weights.layers):
            self._run_layer(column, layer)
        self._norm(weights.norm, state.live)
        for column, layer in enumerate(weights.layers):
            if layer.exit_norm is not None:
                self._norm(layer.exit_norm, self._lists.running(column))
        row_linear(self._normed, weights.head.weight, weights.head.bias, state.live, self.logits)
        given = self.logits
        if adjusts:
            adjust_logits(self.logits, self._rows, self._adjustments, state.live, self._adjusted)
            given = self._adjusted
        draw_tokens(given, state.sampling, state.live, self._drawn)
        end_step(state, self._drawn, self._paths)

    def _run_layer(self, column: int, layer: LayerWeights) -> None:
        """K/V of all rows, and the layer for those that run it. The first layer's V decides who runs which."""
        state, weights = self._state, self._model.weights
        running = self._lists.running(column)
        written = state.live if layer.writes_all else running
        norm = self._norm_before(layer.input_norm, written)
        x = self._normed if norm is None else self._h
        # All rows run the first layer.
        row_qkv(x, layer.q, layer.k, layer.v, running if column else state.live, written, *self._qkv, norm)
        if column == 0:
            self._choose_paths()
        attend(
            self._q,
            self._k,
            self._v,
            self._cos,
            self._sin,
            state.positions,
            state.block_tables,
            self._model.cache_k[column],
            self._model.cache_v[column],
            self._paths,
            AttentionLayer(column, weights.head_dim**-0.5, layer.window, layer.q_norm, layer.k_norm, weights.eps),
            written,
            self._arrivals,
            self._attended,
        )
        add_row_linear(self._attended.flatten(1), layer.o.weight, layer.o.bias, running, self._h)
        norm = self._norm_before(layer.post_norm, running)
        if layer.small_gate is None or layer.small_up is None or layer.small_down is None:
            self._feed(layer.gate, layer.up, layer.down, running, norm)
        else:
            self._feed(layer.gate, layer.up, layer.down, self._lists.whole(column), norm)
            self._feed(layer.small_gate, layer.small_up, layer.small_down, self._lists.small(column), norm)

    def _choose_paths(self) -> None:
        state, router = self._state, self._model.router
        lanes, actions = state.lanes, state.path_actions
        score_layers(self._v.flatten(1), state.positions, lanes, actions, router, state.live, self._scores)
        choose_paths(self._scores, state.max_costs, lanes, actions, state.aligned, router, state.live, self._paths)
        fill_layer_lists(self._paths, state.live, self._lists)

    def _feed(self, gate: Projection, up: Projection, down: Projection, rows: RowList, norm: RowNorm | None) -> None:
        fed = self._fed[len(up.weight)]
        row_swiglu(self._normed if norm is None else self._h, gate, up, rows, fed, norm)
        add_row_linear(fed, down.weight, down.bias, rows, self._h)

    def _norm_before(self, weight: Tensor, rows: RowList) -> RowNorm | None:
        """The norm of a single row, which the product after it computes itself; of more rows it is launched here."""
        if self._state.live.num_rows == 1:
            return RowNorm(weight, self._model.weights.eps)
        self._norm(weight, rows)
        return None

    def _norm(self, weight: Tensor, rows: RowList) -> None:
        norm_rows(self._h, weight, self._model.weights.eps, rows, self._normed)
