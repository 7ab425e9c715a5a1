"""native/interface.h in ctypes, field by field. Pointers are of tensors and arrays that the caller keeps alive."""

import ctypes
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
    )


class Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in (
                *("kind", "cache_kind", "num_layers", "dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
                *("vocab", "num_blocks", "num_threads"),
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
        ("sums", c_void_p),
        ("last_masks", c_void_p),
    )


Choose = ctypes.CFUNCTYPE(None)


class Step(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in (*("num_rows", "num_ahead", "num_segments", "num_wanted"), *("most_steps", "num_end_tokens"))
        ),
        *(
            (name, c_void_p)
            for name in (
                *("tokens", "positions", "lengths", "aheads", "tables", "table_starts", "lanes", "budgets", "wanted"),
                *("aligned", "end_tokens", "choices", "samplings", "uniforms"),
                *("masks", "logits", "next_tokens", "sums", "first_v"),
            )
        ),
        ("choose", Choose),
        ("most_s", c_double),
        ("router_s", c_double),
        ("num_steps", c_int64),
    )
