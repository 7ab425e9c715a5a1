"""One step of a routed decoder on the CPU as one call: all layers, the router's choice after the first, the head.

The reference is `buddy_routing.decoder.RoutedDecoder.forward` with the ops beside this file; the fast path is
native/routed_step.cpp. Weights are packed once; rows do not depend on each other, whatever the batch.
"""

# N rows, A rows ahead, S segments, W wanted rows, L layers, V vocabulary, F width of one token's V,
# D model dim, Hq query heads, Hkv key/value heads, Dh head dim

import ctypes
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Literal

import torch
from torch import Tensor

from buddy_kernels import native_interface as interface
from buddy_kernels.arithmetics import AUTO, arithmetics, fastest
from buddy_kernels.native_library import NativeBuildError, load_native_library
from buddy_kernels.packed_product import UnknownArithmeticError, matrix_pointers
from buddy_kernels.packing import LANES, PackedMatrix, interleaved, pack, pad_to
from buddy_kernels.sampling import Sampling

WeightKind = Literal["float32", "bfloat16", "int8"]
BLOCK_SIZE = LANES
"""Slots in a block of the cache: as many keys as fit a vector."""
MAX_HEAD_DIM = 1024
TIMED_ROWS, TIMED_PROMPT, TIMED_BYTES = 8, 64, 96 * 2**20
"""What arithmetics are timed on: rows side by side, tokens of a prompt, weights."""

ChoosePaths = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A router that is asked: the first layer's V [N + A, Hkv, Dh] fp32 to masks [S, L] int8 and RoutedOutput.sums."""


@dataclass(frozen=True, slots=True)
class Projection:
    """weight [outputs, inputs], bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. `q_norm` and `k_norm` [Dh] are Qwen3's; `window` None sees all."""

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
    """Scores are prior [L - 2] + up(silu(down(features))); without `down` the prior alone. `sums` [lanes, F] fp64 and
    `last_masks` [lanes, L] int8 are what routing remembers, changed in place."""

    prior: Tensor
    sums: Tensor
    last_masks: Tensor
    down: Projection | None = None
    up: Projection | None = None

    @cached_property
    def pointers(self) -> interface.Router:
        given = interface.Router(
            prior=self.prior.data_ptr(),
            num_lanes=len(self.sums),
            sums=self.sums.data_ptr(),
            last_masks=self.last_masks.data_ptr(),
        )
        if self.down is not None and self.up is not None:
            assert self.down.bias is not None
            assert self.up.bias is not None
            given.down, given.down_bias = self.down.weight.data_ptr(), self.down.bias.data_ptr()
            given.up, given.up_bias = self.up.weight.data_ptr(), self.up.bias.data_ptr()
            given.rank, given.num_features = self.down.weight.shape
        return given


KEEP, CHOOSE, CONTINUE = 0, 1, 2
"""What a segment does about its path: keep the lane's last one, choose anew, or go on with a prefill block whose path
is chosen and whose features are counted."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step's work in plain numbers: the smallest steps take less time than a few tensors take to make.

    `tokens` [N + A]: the rows', then those that segments look ahead to. `positions` [N]; `lengths`, `aheads`, `lanes`,
    `budgets` (layers to run) and `choices` [S]; a block table for each segment; the rows whose logits are `wanted` [W].
    A prefill block that is cut short looks ahead to the rest of itself, since its path follows from its last token.
    Segments `aligned` [S] with an earlier one of the same budget share a path, the best by the sum of their scores; a
    segment's own index leaves it alone.

    The next token of each wanted row is drawn as its entry of `samplings` [W] says, by its `uniforms` [W, most_steps]
    from [0, 1), one a step; without them it is the likeliest.

    With `most_steps` over 1, where every row is a segment and wanted, rows go on by their next tokens: for so many
    steps, until one of those is an end token, or until `most_s` seconds are over. One step is what may always come.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    lengths: Sequence[int]
    tables: Sequence[Sequence[int]]
    lanes: Sequence[int]
    budgets: Sequence[int]
    choices: Sequence[int]
    wanted: Sequence[int]
    aheads: Sequence[int]
    aligned: Sequence[int]
    samplings: Sequence[Sampling] = ()
    uniforms: Sequence[Sequence[float]] = ()
    most_steps: int = 1
    most_s: float = 0.0
    end_tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class RoutedOutput:
    """What one step or several did. `logits` [W, V] fp32 of the last, valid until the next call; `next_tokens` [W] of
    each step; `masks` [steps, S, L] int8 that were run; `sums` [S, F] fp64 of the first layer's V over each
    segment's sequence, after the last step, with the tokens it looked ahead to; and the seconds that choosing took."""

    logits: Tensor
    next_tokens: Sequence[Sequence[int]]
    masks: Tensor
    sums: Tensor
    router_s: float


class RoutedStep:
    """A decoder with its packed weights and its paged cache of `num_blocks` blocks of 16 tokens.

    `arithmetic` is a name of those that this processor has for the kind of weights, or "auto" for the fastest; the
    attribute says which it is.

    Raises NativeBuildError where the library cannot be built; ValueError for a `kind` or a shape it does not take;
    UnknownArithmeticError.
    """

    def __init__(
        self, weights: DecoderWeights, kind: WeightKind, num_blocks: int, num_threads: int, arithmetic: str = AUTO
    ) -> None:
        if weights.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim is {weights.head_dim}, allowed is up to {MAX_HEAD_DIM}")
        names = arithmetics(kind)
        if arithmetic not in (AUTO, *names):
            raise UnknownArithmeticError(arithmetic, kind, (AUTO, *names))
        self._library = load_native_library()
        self._kept: list[object] = []
        cache_dtype = torch.float32 if kind == "float32" else torch.bfloat16
        k_width, v_width = weights.head_dim, weights.head_dim + -weights.head_dim % LANES
        shape = (len(weights.layers), num_blocks, weights.num_kv_heads)
        self.cache_k = torch.zeros(*shape, k_width, LANES, dtype=cache_dtype)
        self.cache_v = torch.zeros(*shape, LANES, v_width, dtype=cache_dtype)
        layers = (interface.Layer * len(weights.layers))(
            *(self._layer(layer, index, kind) for index, layer in enumerate(weights.layers))
        )
        self._kept.append(layers)
        model = interface.Model(
            kind=interface.KINDS[kind],
            cache_kind=interface.KINDS["float32" if kind == "float32" else "bfloat16"],
            num_layers=len(weights.layers),
            dim=weights.embeddings.shape[1],
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            mlp_dim=weights.mlp_dim,
            vocab=weights.embeddings.shape[0],
            num_blocks=num_blocks,
            eps=weights.eps,
            scale=weights.head_dim**-0.5,
            attention_factor=weights.attention_factor,
            inv_freq=self._keep(weights.inv_freq.float()),
            embeddings=self._keep(weights.embeddings.detach().to(cache_dtype)),
            norm=self._norm(weights.norm),
            head=self._matrix(weights.head.weight, weights.head.bias, kind),
            layers=layers,
        )
        self.num_layers = len(weights.layers)
        self.vocab_size = weights.embeddings.shape[0]
        self._logits = torch.empty(0, self.vocab_size)
        self._v_shape = torch.Size((weights.num_kv_heads, weights.head_dim))
        self._decoder: c_void_p | None = None
        self.arithmetic = names[0] if arithmetic == AUTO else arithmetic
        if arithmetic == AUTO and len(names) > 1:
            self._make_decoder(model, num_threads=1)
            self.arithmetic = self._fastest(names)
        self._make_decoder(model, num_threads)
        self._use(self.arithmetic)

    def _make_decoder(self, model: interface.Model, num_threads: int) -> None:
        """In place of the one that there is."""
        self._free_decoder()
        model.num_threads = num_threads
        made = self._library.buddy_decoder(ctypes.byref(model))
        if not made:
            raise NativeBuildError("there is no memory for the native step")
        self._decoder = c_void_p(made)

    def _free_decoder(self) -> None:
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            self._library.buddy_free(decoder)

    def __del__(self) -> None:
        if hasattr(self, "_decoder"):
            self._free_decoder()

    def pin_threads(self) -> None:
        """Keep this thread, which is to make all calls, and the step's own each on a processor of its own. Only where
        these are all that the process may use: others may have been given the rest, and all would take the first."""
        self._library.buddy_pin(self._decoder)

    def __call__(self, rows: StepRows, router: RouterWeights | ChoosePaths) -> RoutedOutput:
        """Run the rows; K/V of each are written at every layer.

        Raises ValueError for rows that name what does not exist or do not belong together; what the router raises.
        """
        num_segments, num_wanted = len(rows.lanes), len(rows.wanted)
        check_counts(rows)
        if num_wanted > len(self._logits):
            self._logits = torch.empty(num_wanted, self.vocab_size)
        masks = torch.empty(rows.most_steps, num_segments, self.num_layers, dtype=torch.int8)
        next_tokens = array("q", bytes(8 * num_wanted * rows.most_steps))
        sums = torch.empty(num_segments, self._v_shape.numel(), dtype=torch.float64)
        tables = array("q")
        for table in rows.tables:
            tables.extend(table)
        numbers = (
            *(array("q", values) for values in (rows.tokens, rows.positions, rows.lengths, rows.aheads)),
            tables,
            array("q", accumulate(map(len, rows.tables), initial=0)),
            *(array("q", values) for values in (rows.lanes, rows.budgets, rows.wanted, rows.aligned, rows.end_tokens)),
            array("B", rows.choices),
        )
        samplings = array("d", chain.from_iterable(map(_numbers, rows.samplings)))
        uniforms = array("d", chain.from_iterable(rows.uniforms))
        step = interface.Step(
            len(rows.positions),
            len(rows.tokens) - len(rows.positions),
            num_segments,
            num_wanted,
            rows.most_steps,
            len(rows.end_tokens),
            *(values.buffer_info()[0] for values in numbers),
            samplings.buffer_info()[0] if samplings else None,
            uniforms.buffer_info()[0],
            masks.data_ptr(),
            self._logits.data_ptr(),
            next_tokens.buffer_info()[0],
            sums.data_ptr(),
            most_s=rows.most_s,
        )
        if isinstance(router, RouterWeights):
            mistake = self._library.buddy_step(self._decoder, ctypes.byref(step), ctypes.byref(router.pointers))
        else:
            mistake = self._asking(router, step, masks[0], sums)
        if mistake:
            raise ValueError(f"native step: {mistake.decode()}")
        said = [next_tokens[index * num_wanted : (index + 1) * num_wanted] for index in range(step.num_steps)]
        return RoutedOutput(self._logits[:num_wanted], said, masks[: step.num_steps], sums, step.router_s)

    def _asking(self, router: ChoosePaths, step: interface.Step, masks: Tensor, sums: Tensor) -> bytes | None:
        """A step whose paths are chosen in Python."""
        v = torch.empty(step.num_rows + step.num_ahead, *self._v_shape)
        step.first_v = v.data_ptr()
        raised: list[BaseException] = []

        def choose() -> None:
            # An exception does not cross C++: the step ends on full depth and raises then.
            masks.fill_(1)
            try:
                chosen, after = router(v)
                masks.copy_(chosen)
                sums.copy_(after)
            except BaseException as error:
                raised.append(error)

        step.choose = interface.Choose(choose)
        mistake: bytes | None = self._library.buddy_step(
            self._decoder, ctypes.byref(step), ctypes.byref(interface.Router())
        )
        if raised:
            raise raised[0]
        return mistake

    def _fastest(self, names: Sequence[str]) -> str:
        """For this model: by steps of its first layers, more of them than a processor's caches hold if there are so
        many. A row alone, rows side by side and a prompt count the same, since nobody knows who will ask for what."""
        layer_bytes = (
            sum(kept.panels.nbytes for kept in self._kept if isinstance(kept, PackedMatrix)) // self.num_layers
        )
        num_layers = min(self.num_layers, max(2, -(-TIMED_BYTES // layer_bytes)))
        num_blocks = self.cache_k.shape[1]
        router = RouterWeights(
            prior=torch.zeros(self.num_layers - 2),
            sums=torch.zeros(TIMED_ROWS, self._v_shape.numel(), dtype=torch.float64),
            last_masks=torch.zeros(TIMED_ROWS, self.num_layers, dtype=torch.int8),
        )

        def work(num_segments: int, length: int) -> Callable[[str], object]:
            num_rows = num_segments * length
            rows = StepRows(
                tokens=[0] * num_rows,
                positions=[*range(length)] * num_segments,
                lengths=[length] * num_segments,
                tables=[
                    [(segment + i) % num_blocks for i in range(-(-length // BLOCK_SIZE))]
                    for segment in range(num_segments)
                ],
                lanes=range(num_segments),
                budgets=[num_layers] * num_segments,
                choices=[CHOOSE] * num_segments,
                wanted=(),
                aheads=[0] * num_segments,
                aligned=range(num_segments),
            )

            def step(name: str) -> None:
                self._use(name)
                self(rows, router)

            return step

        return fastest(
            names,
            [work(1, 1), work(min(TIMED_ROWS, num_blocks), 1), work(1, min(TIMED_PROMPT, num_blocks * BLOCK_SIZE))],
        )

    def _use(self, arithmetic: str) -> None:
        used = self._library.buddy_use(self._decoder, arithmetic.encode())
        assert used, arithmetic

    def _layer(self, layer: LayerWeights, index: int, kind: WeightKind) -> interface.Layer:
        gate_up = interleaved(layer.gate.weight.detach(), layer.up.weight.detach())
        gate_up_bias = None
        if layer.gate.bias is not None and layer.up.bias is not None:
            gate_up_bias = interleaved(layer.gate.bias.detach(), layer.up.bias.detach())
        kv_bias = None
        if layer.k.bias is not None and layer.v.bias is not None:
            kv_bias = torch.cat((layer.k.bias, layer.v.bias))
        return interface.Layer(
            input_norm=self._norm(layer.input_norm),
            post_norm=self._norm(layer.post_norm),
            q_norm=None if layer.q_norm is None else self._keep(layer.q_norm.detach().float()),
            k_norm=None if layer.k_norm is None else self._keep(layer.k_norm.detach().float()),
            q=self._matrix(layer.q.weight, layer.q.bias, kind),
            kv=self._matrix(torch.cat((layer.k.weight, layer.v.weight)), kv_bias, kind),
            o=self._matrix(layer.o.weight, layer.o.bias, kind),
            gate_up=self._matrix(gate_up, gate_up_bias, kind),
            down=self._matrix(layer.down.weight, layer.down.bias, kind),
            k=self.cache_k[index].data_ptr(),
            v=self.cache_v[index].data_ptr(),
            window=layer.window or 0,
        )

    def _matrix(self, weight: Tensor, bias: Tensor | None, kind: str) -> interface.Matrix:
        matrix = pack(weight, bias, kind)
        self._kept.append(matrix)
        return matrix_pointers(matrix)

    def _norm(self, weight: Tensor) -> int:
        return self._keep(pad_to(weight.detach().float(), 64, 0))

    def _keep(self, tensor: Tensor) -> int:
        """A tensor's address; it lives as long as this object."""
        tensor = tensor.cpu().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _numbers(sampling: Sampling) -> tuple[float, float, float, float]:
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p


def check_counts(rows: StepRows) -> None:
    """Raises ValueError for rows or segments of which some lack what others have."""
    num_segments = len(rows.lanes)
    for name in ("lengths", "tables", "budgets", "choices", "aheads", "aligned"):
        count = len(getattr(rows, name))
        if count != num_segments:
            raise ValueError(f"{name} are {count}, allowed is one for each of {num_segments} lanes")
    if len(rows.positions) > len(rows.tokens):
        raise ValueError(f"tokens are {len(rows.tokens)}, allowed is one for each of {len(rows.positions)} positions")
    if rows.samplings and not len(rows.samplings) == len(rows.uniforms) == len(rows.wanted):
        raise ValueError(
            f"samplings are {len(rows.samplings)} and uniforms {len(rows.uniforms)}, allowed is one for each of "
            f"{len(rows.wanted)} wanted rows"
        )
    for of_row in rows.uniforms:
        if len(of_row) != rows.most_steps:
            raise ValueError(f"uniforms of a row are {len(of_row)}, allowed is one for each of {rows.most_steps} steps")
