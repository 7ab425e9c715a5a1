"""One step of a routed decoder on the CPU as one call: all layers, the router's choice after the first, the head.

The contract is step.py, the reference `buddy_routing.stepper.TorchStepper` with the ops beside this file, the fast path
native/routed_step.cpp. Weights are packed once; rows do not depend on each other, whatever the batch.
"""

# N rows, A rows ahead, S segments, W wanted rows, L layers, V vocabulary, F width of one token's V,
# D model dim, Hq query heads, Hkv key/value heads, Dh head dim

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_void_p
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import Tensor

from buddy_kernels import native_interface as interface
from buddy_kernels.arithmetics import AUTO, arithmetics, fastest
from buddy_kernels.native_library import NativeBuildError, load_native_library
from buddy_kernels.packed_product import UnknownArithmeticError, matrix_pointers
from buddy_kernels.packing import LANES, PackedMatrix, interleaved, pack, pad_to
from buddy_kernels.sampling import GREEDY, SampledToken
from buddy_kernels.step import RUN, PathAction, RoutedOutput, StepRows, Wanted, check_rows
from buddy_kernels.step_weights import DecoderWeights, LayerWeights, Projection, RouterWeights

WeightKind = Literal["float32", "bfloat16", "int8"]
BLOCK_SIZE = LANES
"""Slots in a block of the cache: as many keys as fit a vector."""
MAX_HEAD_DIM = 1024
NO_TOKEN = -1
TIMED_ROWS, TIMED_PROMPT, TIMED_BYTES = 8, 64, 96 * 2**20
"""What arithmetics are timed on: rows side by side, tokens of a prompt, weights."""

ChoosePaths = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A router that is asked: the first layer's V [N + A, Hkv, Dh] fp32 to paths [S, L] int8 and RoutedOutput.sums."""


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
            small_mlp_dim=next((len(layer.small_up.weight) for layer in weights.layers if layer.small_up), 0),
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
        """Run the rows.

        Raises ValueError for rows that name what does not exist or do not belong together; what the router raises.
        """
        check_rows(rows)
        num_segments, num_wanted, most_steps = len(rows.lanes), len(rows.wanted), rows.most_steps
        most_likeliest = max((wanted.num_likeliest or 0 for wanted in rows.wanted), default=0)
        if num_wanted > len(self._logits):
            self._logits = torch.empty(num_wanted, self.vocab_size)
        paths = torch.zeros(most_steps, num_segments, self.num_layers, dtype=torch.int8)
        sums = torch.empty(num_segments, self._v_shape.numel(), dtype=torch.float64)
        num_tokens = most_steps * num_wanted
        next_tokens = array("q", [NO_TOKEN]) * num_tokens
        logprobs = array("d", bytes(8 * num_tokens))
        likeliest, likeliest_logprobs = (array(kind, bytes(8 * num_tokens * most_likeliest)) for kind in "qd")
        numbers = (
            *(array("q", values) for values in (rows.tokens, rows.positions, rows.lengths, rows.aheads)),
            array("q", chain.from_iterable(rows.tables)),
            array("q", accumulate(map(len, rows.tables), initial=0)),
            *(array("q", values) for values in (rows.lanes, rows.max_costs, rows.aligned)),
            array("B", rows.path_actions),
        )
        wanted, kept = self._wanted(rows.wanted)
        step = interface.Step(
            len(rows.positions),
            len(rows.tokens) - len(rows.positions),
            num_segments,
            num_wanted,
            most_steps,
            most_likeliest,
            *(_address(values) for values in numbers),
            ctypes.addressof(wanted),
            paths.data_ptr(),
            self._logits.data_ptr(),
            *(_address(values) for values in (next_tokens, logprobs, likeliest, likeliest_logprobs)),
            sums.data_ptr(),
            most_s=rows.most_s,
        )
        tell_constraints(rows.wanted, step, next_tokens)
        if isinstance(router, RouterWeights):
            mistake = self._library.buddy_step(self._decoder, ctypes.byref(step), ctypes.byref(router.pointers))
        else:
            mistake = self._asking(router, step, paths[0], sums)
        del kept  # Until here C++ reads them.
        if mistake:
            raise ValueError(f"native step: {mistake.decode()}")

        def token(place: int, index: int) -> SampledToken:
            asked = rows.wanted[index].num_likeliest
            if asked is None:
                return SampledToken(next_tokens[place])
            first = place * most_likeliest
            found = zip(likeliest[first : first + asked], likeliest_logprobs[first : first + asked], strict=True)
            return SampledToken(next_tokens[place], logprobs[place], tuple(found))

        made = [
            [
                token(place, index)
                for place in range(index, step.num_steps * num_wanted, num_wanted)
                if next_tokens[place] != NO_TOKEN
            ]
            for index in range(num_wanted)
        ]
        return RoutedOutput(made, paths[: step.num_steps], sums, self._logits[:num_wanted], step.router_s)

    def _wanted(self, rows: Sequence[Wanted]) -> tuple[ctypes.Array[interface.Wanted], list[object]]:
        """The wanted rows as C++ reads them, and what they point to.

        Raises ValueError for a bit mask of another vocabulary.
        """
        kept: list[object] = []

        def keep(kind: str, values: Iterable[float]) -> int | None:
            kept.append(values := array(kind, values))
            return _address(values) if values else None

        given = (interface.Wanted * len(rows))()
        for wanted, into in zip(rows, given, strict=True):
            how = wanted.sampling
            into.row, into.max_tokens = wanted.row, wanted.max_tokens
            into.given = NO_TOKEN if wanted.given is None else wanted.given
            into.num_likeliest = -1 if wanted.num_likeliest is None else wanted.num_likeliest
            into.top_p = how.top_p
            into.num_end_tokens, into.end_tokens = len(wanted.end_tokens), keep("q", wanted.end_tokens)
            if how is GREEDY and wanted.constraint is None:
                continue
            into.temperature, into.top_k, into.min_p = how.temperature, how.top_k, how.min_p
            into.uniforms = keep("d", wanted.uniforms)
            if how.has_penalties:
                into.presence_penalty, into.frequency_penalty = how.presence_penalty, how.frequency_penalty
                into.num_counts = len(wanted.counts)
                into.counted, into.counts = keep("q", wanted.counts), keep("q", wanted.counts.values())
            into.num_bias, into.bias_tokens, into.bias = (
                len(how.bias),
                keep("q", how.bias),
                keep("d", how.bias.values()),
            )
            if wanted.constraint is not None:
                allowed = wanted.constraint.allowed()
                if len(allowed) * 8 < self.vocab_size:
                    raise ValueError(f"allowed has {len(allowed)} bytes, allowed are {self.vocab_size} bits or more")
                # Not a copy: C++ reads what the constraint writes there between steps.
                kept.append(memory := (ctypes.c_uint8 * len(allowed)).from_buffer(allowed))
                into.allowed = ctypes.addressof(memory)
        return given, kept

    def _asking(self, router: ChoosePaths, step: interface.Step, paths: Tensor, sums: Tensor) -> bytes | None:
        """A step whose paths are chosen in Python."""
        v = torch.empty(step.num_rows + step.num_ahead, *self._v_shape)
        step.first_v = v.data_ptr()
        raised: list[BaseException] = []

        def choose() -> None:
            # An exception does not cross C++: the step ends on full depth and raises then.
            paths.fill_(RUN)
            try:
                chosen, after = router(v)
                paths.copy_(chosen)
                sums.copy_(after)
            except BaseException as error:
                raised.append(error)

        step.choose = interface.Callback(choose)
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
        # The first layers are forced and cost one each; the others are free and not paid for.
        forced = torch.arange(self.num_layers) < num_layers
        router = RouterWeights(
            prior=torch.zeros(self.num_layers - num_layers),
            costs=torch.tensor([[0, 1]] * self.num_layers),
            forced=forced,
            sums=torch.zeros(TIMED_ROWS, self._v_shape.numel(), dtype=torch.float64),
            last_paths=torch.zeros(TIMED_ROWS, self.num_layers, dtype=torch.int8),
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
                max_costs=[num_layers] * num_segments,
                path_actions=[PathAction.CHOOSE] * num_segments,
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
            gate_up=self._gate_up(layer.gate, layer.up, kind),
            down=self._matrix(layer.down.weight, layer.down.bias, kind),
            k=self.cache_k[index].data_ptr(),
            v=self.cache_v[index].data_ptr(),
            window=layer.window or 0,
            writes_all=layer.writes_all,
            exit_norm=None if layer.exit_norm is None else self._norm(layer.exit_norm),
            **self._small_ffn(layer, kind),
        )

    def _small_ffn(self, layer: LayerWeights, kind: WeightKind) -> dict[str, interface.Matrix]:
        if layer.small_gate is None or layer.small_up is None or layer.small_down is None:
            return {}
        return {
            "small_gate_up": self._gate_up(layer.small_gate, layer.small_up, kind),
            "small_down": self._matrix(layer.small_down.weight, layer.small_down.bias, kind),
        }

    def _gate_up(self, gate: Projection, up: Projection, kind: WeightKind) -> interface.Matrix:
        bias = None
        if gate.bias is not None and up.bias is not None:
            bias = interleaved(gate.bias.detach(), up.bias.detach())
        return self._matrix(interleaved(gate.weight.detach(), up.weight.detach()), bias, kind)

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


def tell_constraints(wanted: Sequence[Wanted], step: interface.Step, next_tokens: "array[int]") -> None:
    """Have `step` call back after each of its steps, if there are constraints: they take their rows' tokens and write
    what may come next."""
    constraints = [(index, row.constraint) for index, row in enumerate(wanted) if row.constraint is not None]
    first = 0

    def accept() -> None:
        # Does not ask `step` which of its steps this is: in a cycle with it, constraints, which hold megabytes, would
        # live until a garbage collection.
        nonlocal first
        for index, constraint in constraints:
            token = next_tokens[first + index]
            if token != NO_TOKEN:
                constraint.accept(token)
                constraint.allowed()
        first += len(wanted)

    if constraints:
        step.accept = interface.Callback(accept)


def _address(values: "array[Any]") -> int:
    return values.buffer_info()[0]
