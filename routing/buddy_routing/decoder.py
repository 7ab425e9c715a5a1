"""The routed decoder: one set of weights, one layer body, two forward passes.

`forward` is for serving: ragged rows over a paged cache, where each layer runs only for the rows whose path includes
it. `dense` is for training: whole sequences, every layer computed, then multiplied by masks. Both compute the same
function (design section 1), which tests/routing/test_decoder.py checks. Parameter names are Hugging Face's, so
checkpoints load without renaming.
"""

# N rows of a ragged step, B sequences, T tokens, D model dim, Hq query heads, Hkv key/value heads, Dh head dim,
# W rows of them wanted, S segments, L layers, C columns of a path (layers, then exits), A actions besides skipping

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from buddy_kernels import (
    apply_rotary,
    gather_rows,
    linear,
    paged_attention,
    rms_norm,
    rotary_cos_sin,
    rotary_inv_freq,
    scatter_rows,
    swiglu,
    write_kv,
)
from buddy_routing.action_space import RUN, SKIP
from buddy_routing.kv_cache import KVCache
from buddy_routing.model_spec import ModelSpec
from buddy_routing.segments import LayerRows, SegmentBatch, rows_by_layer

PathChooser = Callable[[Tensor], Tensor]
"""Maps the first layer's V states to paths: [N, Hkv, Dh] -> paths [S, C] in `forward`, [B, T, Hkv, Dh] -> shares [B, T,
L, A] of the outputs of each layer's actions besides skipping it in `dense`."""


class Linear(nn.Linear):
    """torch's Linear over any leading dims; 2-D inputs go through the row-stable kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention without the attention itself: projections and rotation. The caller supplies the
    context."""

    def __init__(self, spec: ModelSpec, window: int | None) -> None:
        super().__init__()
        q_dim = spec.num_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, q_dim, bias=spec.qkv_bias)
        self.k_proj = Linear(spec.hidden_size, spec.kv_dim, bias=spec.qkv_bias)
        self.v_proj = Linear(spec.hidden_size, spec.kv_dim, bias=spec.qkv_bias)
        self.o_proj = Linear(q_dim, spec.hidden_size, bias=spec.output_bias)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps)
        self.qk_norm = spec.qk_norm
        self.head_dim = spec.head_dim
        self.window = window

    def query(self, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.q_proj(normed).unflatten(-1, (-1, self.head_dim))  # [..., Hq, Dh]
        return rotate(self.q_norm(q) if self.qk_norm else q, cos, sin)

    def key_value(self, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        k = self.k_proj(normed).unflatten(-1, (-1, self.head_dim))  # [..., Hkv, Dh]
        v = self.v_proj(normed).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(k) if self.qk_norm else k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [..., Hq, Dh]. The leading dims, flattened, are the rows of cos and sin."""
    return apply_rotary(x.reshape(-1, *x.shape[-2:]), cos, sin).view(x.shape)


class MLP(nn.Module):
    """The FFN of a layer: gate and values, `inner_size` wide."""

    def __init__(self, spec: ModelSpec, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(spec.hidden_size, inner_size, bias=spec.mlp_bias)
        self.up_proj = Linear(spec.hidden_size, inner_size, bias=spec.mlp_bias)
        self.down_proj = Linear(inner_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec, window: int | None) -> None:
        super().__init__()
        self.self_attn = Attention(spec, window)
        self.mlp = MLP(spec, spec.intermediate_size)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def value(self, h: Tensor) -> Tensor:
        """V states [..., Hkv, Dh] of h [..., D], without attention."""
        v = self.self_attn.v_proj(self.input_layernorm(h))
        return v.unflatten(-1, (-1, self.self_attn.head_dim))

    def attend(self, h: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, over: Callable[[Tensor], Tensor]) -> Tensor:
        """h plus its attention `over` K/V, for rows; `feed` is the rest of the layer. Both forward passes use it."""
        q = self.self_attn.query(normed, cos, sin)
        return h + self.self_attn.o_proj(over(q).flatten(-2))

    def feed(self, h: Tensor, mlp: MLP) -> Tensor:
        """h plus what the FFN, the layer's own or a small one, makes of it."""
        # Small FFNs that are trained are of another dtype than the model.
        normed = self.post_attention_layernorm(h).to(mlp.gate_proj.weight.dtype)
        fed: Tensor = mlp(normed)
        return h + fed.to(h.dtype)

    def dense(
        self, h: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None, small: MLP | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The layer over whole sequences: h [B, T, D] -> h [B, T, D] after running it and, if there is one, after
        running it with the `small` FFN; and V states [B, T, Hkv, Dh]."""
        normed = self.input_layernorm(h)
        k, v = self.self_attn.key_value(normed, cos, sin)
        attended = self.attend(h, normed, cos, sin, lambda q: dense_attention(q, k, v, visible))
        return [self.feed(attended, mlp) for mlp in (self.mlp, small) if mlp is not None], v


class Exit(nn.Module):
    """What stands for the layers behind it: a layer with K/V of its own, then a norm before the model's head (Balcony,
    arXiv 2503.05005)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.layer = DecoderLayer(spec, spec.windows[-1])
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention over whole sequences: q [B, T, Hq, Dh], k and v [B, T, Hkv, Dh] -> [B, T, Hq, Dh].

    `visible` comes from `visible_keys`.
    """
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None).transpose(1, 2)


def visible_keys(num_tokens: int, window: int | None, starts: Tensor | None, device: torch.device) -> Tensor | None:
    """The keys that each query attends to, [1 or B, 1, T, T] bool, or None for all up to its own.

    `starts` [B, T] is where each token's sequence starts, if several share a row.
    """
    if starts is None and (window is None or window >= num_tokens):
        return None
    index = torch.arange(num_tokens, device=device)
    visible = index <= index[:, None]  # [T, T], query by key
    if window is not None:
        visible &= index > index[:, None] - window
    if starts is None:
        return visible[None, None]
    return (visible & (index >= starts[..., None]))[:, None]


@dataclass(frozen=True, slots=True)
class PagedContext:
    """Attention of one layer's rows in one step over the paged cache: q [M, Hq, Dh] -> [M, Hq, Dh]."""

    cache_k: Tensor
    cache_v: Tensor
    todo: LayerRows
    positions: Tensor  # [M]
    scale: float
    window: int | None

    def __call__(self, q: Tensor) -> Tensor:
        tables, start = self.todo.block_tables, self.todo.query_start
        return paged_attention(q, self.cache_k, self.cache_v, tables, start, self.positions, self.scale, self.window)


class RoutedDecoder(nn.Module):
    """A dense Llama, Mistral, Qwen2/2.5 or Qwen3 decoder whose layers can be skipped per token or run with small FFNs,
    or, with exits, left early by whole sequences."""

    inv_freq: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec, window) for window in spec.windows)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.exits = nn.ModuleList(Exit(spec) for _ in spec.exits)
        # By layer; the first and the last, which always run, have none.
        num_small = spec.num_layers - 2 if spec.small_ffn_size else 0
        self.small_ffns = nn.ModuleDict({str(i): MLP(spec, spec.small_ffn_size) for i in range(1, num_small + 1)})
        inv_freq, self.attention_factor = rotary_inv_freq(spec.head_dim, spec.rope_theta, spec.rope_scaling)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._tie()

    def _tie(self) -> None:
        if self.spec.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def empty(cls, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> "RoutedDecoder":
        """A decoder with allocated but uninitialized parameters, to be filled from a checkpoint."""
        with torch.device("meta"):
            model = cls(spec)
        model = model.to(dtype).to_empty(device=device)
        # The meta device loses shared storage and computed values, so both are restored.
        model._tie()
        model.inv_freq = rotary_inv_freq(spec.head_dim, spec.rope_theta, spec.rope_scaling)[0].to(device)
        return model

    def with_exits(self, exits: Mapping[int, Exit]) -> "RoutedDecoder":
        """A decoder with the same weights that can be left after these numbers of layers."""
        model = self._with(replace(self.spec, exits=tuple(exits)))
        model.exits = nn.ModuleList(exits.values())
        return model

    def with_small_ffns(self, small_ffns: Mapping[int, MLP]) -> "RoutedDecoder":
        """A decoder with the same weights, and a small FFN of one size beside that of every layer but the first and the
        last."""
        (size,) = {mlp.down_proj.in_features for mlp in small_ffns.values()}
        model = self._with(replace(self.spec, small_ffn_size=size))
        model.small_ffns = nn.ModuleDict({str(layer): mlp for layer, mlp in small_ffns.items()})
        return model

    def _with(self, spec: ModelSpec) -> "RoutedDecoder":
        """A decoder of another spec with the same modules."""
        with torch.device("meta"):
            model = RoutedDecoder(spec)
        for name, module in self.named_children():
            setattr(model, name, module)
        model.inv_freq = self.inv_freq
        return model.eval()

    @property
    def blocks(self) -> list[DecoderLayer]:
        """The layers in order, with their type."""
        return [cast(DecoderLayer, layer) for layer in self.layers]

    @property
    def exit_modules(self) -> list[Exit]:
        """The exits in order, with their type."""
        return [cast(Exit, exit_) for exit_ in self.exits]

    def small_ffn(self, index: int) -> MLP | None:
        """The small FFN of a layer, if it has one."""
        return cast(MLP, self.small_ffns[str(index)]) if str(index) in self.small_ffns else None

    @property
    def columns(self) -> list[DecoderLayer]:
        """What the columns of a path run: the layers, then those of the exits."""
        return [*self.blocks, *(exit_.layer for exit_ in self.exit_modules)]

    def forward(self, batch: SegmentBatch, cache: KVCache, choose_paths: PathChooser) -> tuple[Tensor, Tensor]:
        """One step: logits [W, V] after the wanted rows, and the paths [S, C] that were run.

        K/V of every row are written at every layer, skipped or not ("project" policy), so the cache has no gaps. With
        exits, which a sequence does not change, nobody reads those of a skipped layer, and they are not computed.
        """
        h = self.embed_tokens(batch.tokens)  # [N, D]
        cos, sin = rotary_cos_sin(batch.positions, self.inv_freq, self.attention_factor)
        scale = self.spec.head_dim**-0.5
        slots = batch.slots(cache.block_size)
        plan: list[LayerRows] = []
        for index, layer in enumerate(self.columns):
            cache_k, cache_v = cache.k[index], cache.v[index]
            only_running = index > 0 and bool(self.spec.exits)
            if only_running and not plan[index].num_rows:
                continue
            written = [h, cos, sin, batch.positions, slots]
            if only_running:
                written = picked(written, plan[index].rows)
            x, x_cos, x_sin, x_positions, x_slots = written
            normed = layer.input_layernorm(x)
            k, v = layer.self_attn.key_value(normed, x_cos, x_sin)
            write_kv(cache_k, cache_v, x_slots, k, v)
            if index == 0:
                ahead = layer.value(self.embed_tokens(batch.ahead_tokens))  # [A, Hkv, Dh]
                paths = choose_paths(torch.cat((v, ahead)))  # [S, C]
                plan = rows_by_layer(batch, paths)
            todo = plan[index]
            if todo.num_rows:
                inputs = [x, normed, x_cos, x_sin, x_positions]
                if not only_running:
                    inputs = picked(inputs, todo.rows)
                rows, rows_normed, rows_cos, rows_sin, positions = inputs
                context = PagedContext(cache_k, cache_v, todo, positions, scale, layer.self_attn.window)
                ran = layer.attend(rows, rows_normed, rows_cos, rows_sin, context)
                for action, places in todo.taking.items():
                    ffn = layer.mlp if action == RUN else self.small_ffn(index)
                    assert ffn is not None
                    fed = layer.feed(picked([ran], places)[0], ffn)
                    if places is None:
                        ran = fed
                    else:
                        scatter_rows(ran, places, fed)
                if todo.rows is None:
                    h = ran
                else:
                    scatter_rows(h, todo.rows, ran)
        return self.lm_head(self._final_norm(h, batch, paths)), paths

    def _final_norm(self, h: Tensor, batch: SegmentBatch, paths: Tensor) -> Tensor:
        """[N, D] -> the wanted rows [W, D], ready for the head: an exit's by its norm, the others by the model's."""
        rows = gather_rows(h, batch.wanted)
        normed: Tensor = self.norm(rows)
        if self.spec.exits:
            of_rows = paths.to(h.device)[batch.segment_of_row[batch.wanted]]  # [W, C]
            for column, exit_ in enumerate(self.exit_modules, self.spec.num_layers):
                normed = torch.where(of_rows[:, column : column + 1] != SKIP, exit_.norm(rows), normed)
        return normed

    def dense(
        self,
        tokens: Tensor,
        choose_paths: PathChooser | None = None,
        layers_on: Sequence[bool] | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Whole sequences: tokens [B, T] -> final hidden states [B, T, D], the input of `lm_head`. Without exits.

        `choose_paths` gives the shares of every token's path; gradients reach its scores through them
        (straight-through). `layers_on` [L] drops layers for the whole batch without computing them (random depth in
        pretraining). `starts` [B, T] is where each token's sequence starts, for several sequences in a row that do not
        attend to each other; without it a row is one sequence.
        """
        cos, sin, visible = self._dense_positions(tokens, starts)
        h = self.embed_tokens(tokens)  # [B, T, D]
        shares: Tensor | None = None
        for index, layer in enumerate(self.blocks):
            if layers_on is not None and not layers_on[index]:
                continue
            small = None if choose_paths is None else self.small_ffn(index)
            ran, v = layer.dense(h, cos, sin, visible[layer.self_attn.window], small)
            if index == 0 and choose_paths is not None:
                shares = choose_paths(v)  # [B, T, L, A]
            h = ran[0] if shares is None else chosen_output(h, ran, shares[..., index, :])
        return self.norm(h)

    def dense_exits(self, tokens: Tensor, starts: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Whole sequences at full depth and at each exit: final hidden states [B, T, D], and as many for every exit.

        Only exits have gradients; they may be of another dtype than the model. `starts` as in `dense`.
        """
        cos, sin, visible = self._dense_positions(tokens, starts)
        before: dict[int, Tensor] = {}
        with torch.no_grad():
            h = self.embed_tokens(tokens)  # [B, T, D]
            for index, layer in enumerate(self.blocks):
                if index in self.spec.exits:
                    before[index] = h
                (h,), _ = layer.dense(h, cos, sin, visible[layer.self_attn.window])
            full: Tensor = self.norm(h)
        left = []
        for num_layers, exit_ in zip(self.spec.exits, self.exit_modules, strict=True):
            given = before[num_layers].to(exit_.norm.weight.dtype)
            (ran,), _ = exit_.layer.dense(given, cos, sin, visible[exit_.layer.self_attn.window])
            left.append(exit_.norm(ran).to(full.dtype))
        return full, left

    def _dense_positions(
        self, tokens: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[int | None, Tensor | None]]:
        """Rotation of all tokens [B, T], and by window what each one sees."""
        num_tokens, device = tokens.shape[1], tokens.device
        positions = torch.arange(num_tokens, device=device).expand_as(tokens)
        if starts is not None:
            positions = positions - starts
        cos, sin = rotary_cos_sin(positions.flatten(), self.inv_freq, self.attention_factor)
        visible = {window: visible_keys(num_tokens, window, starts, device) for window in set(self.spec.windows)}
        return cos, sin, visible


def picked(tensors: Sequence[Tensor], rows: Tensor | None) -> list[Tensor]:
    """The `rows` [M] of each tensor [N, ...]; None picks all."""
    return list(tensors) if rows is None else [gather_rows(x, rows) for x in tensors]


def chosen_output(h: Tensor, ran: Sequence[Tensor], shares: Tensor) -> Tensor:
    """h [..., D] or the one of the outputs `ran` [..., D] whose share is 1, exactly; with the gradient of h + the sum
    of s_a * (ran_a - h) with respect to the shares s [..., A].

    Adding s * (ran - h) would round; the terms added at the end are zero in value and only carry the gradient.
    """
    each = [share[..., None] for share in shares.unbind(-1)]
    chosen = h
    for output, share in zip(ran, each, strict=False):
        chosen = torch.where(share > 0.5, output, chosen)
    if shares.requires_grad:
        for output, share in zip(ran, each, strict=False):
            chosen = chosen + (share - share.detach()).to(h.dtype) * (output - h).detach()
    return chosen
