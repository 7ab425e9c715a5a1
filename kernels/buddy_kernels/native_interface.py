"""native/interface.h in ctypes, field by field. Pointers are of tensors and arrays that the caller keeps alive."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_int64, c_void_p

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""Of weights, inputs and the cache."""


class Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("kind", c_int64),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("q", "kv", "o", "gate_up", "down")),
        ("k", c_void_p),
        ("v", c_void_p),
        ("window", c_int64),
        ("writes_all", c_int64),
        ("exit_norm", c_void_p),
        *((name, Matrix) for name in ("small_gate_up", "small_down")),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in (
                *("kind", "cache_kind", "num_layers", "dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
                *("small_mlp_dim", "vocab", "num_blocks", "num_threads"),
            )
        ),
        *((name, c_double) for name in ("eps", "scale", "attention_factor")),
        ("inv_freq", c_void_p),
        ("embeddings", c_void_p),
        ("norm", c_void_p),
        ("head", Matrix),
        ("layers", POINTER(Layer)),
    )


class Router(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("down", "down_bias", "up", "up_bias", "prior")),
        ("num_features", c_int64),
        ("rank", c_int64),
        ("num_lanes", c_int64),
        ("num_actions", c_int64),
        *((name, c_void_p) for name in ("costs", "forced", "sums", "last_paths")),
    )


class Wanted(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("row", "given", "num_likeliest", "max_tokens")),
        *((name, c_int64) for name in ("num_counts", "num_bias", "num_end_tokens")),
        *((name, c_double) for name in ("temperature", "top_k", "top_p", "min_p")),
        *((name, c_double) for name in ("presence_penalty", "frequency_penalty")),
        *((name, c_void_p) for name in ("uniforms", "counted", "counts", "bias_tokens", "bias")),
        *((name, c_void_p) for name in ("end_tokens", "allowed")),
    )


Callback = ctypes.CFUNCTYPE(None)


class Step(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_rows", "num_ahead", "num_segments", "num_wanted")),
        *((name, c_int64) for name in ("most_steps", "most_likeliest")),
        *((name, c_void_p) for name in ("tokens", "positions", "lengths", "aheads", "tables", "table_starts")),
        *((name, c_void_p) for name in ("lanes", "max_costs", "aligned", "path_actions", "wanted")),
        *((name, c_void_p) for name in ("paths", "logits", "next_tokens")),
        *((name, c_void_p) for name in ("logprobs", "likeliest", "likeliest_logprobs", "sums", "first_v")),
        ("choose", Callback),
        ("accept", Callback),
        ("most_s", c_double),
        ("router_s", c_double),
        ("num_steps", c_int64),
    )


STRUCTS = (Matrix, Layer, Model, Router, Wanted, Step)


def layout(structs: Sequence[type[ctypes.Structure]] = STRUCTS) -> list[int]:
    """Each struct's size, then its fields' offsets in order; native/layout.h has the same of the other side."""
    return [
        number
        for struct in structs
        for number in (ctypes.sizeof(struct), *(getattr(struct, name).offset for name, _ in struct._fields_))  # type: ignore[misc]
    ]
