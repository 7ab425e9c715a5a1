"""Kernels go by addresses: an op refuses every tensor that is not laid out as its kernel takes it for."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from buddy_kernels import Projection, RouterWeights
from buddy_kernels.gpu.attention import AttentionLayer, attend
from buddy_kernels.gpu.logit_adjustment import LogitAdjustments, adjust_logits
from buddy_kernels.gpu.path_choice import choose_paths
from buddy_kernels.gpu.path_router import score_layers
from buddy_kernels.gpu.row_linear import add_row_linear, row_linear, row_qkv, row_swiglu
from buddy_kernels.gpu.row_lists import LayerLists, fill_layer_lists
from buddy_kernels.gpu.row_norm import norm_rows
from buddy_kernels.gpu.row_state import RowState
from buddy_kernels.gpu.row_steps import begin_step, end_step
from buddy_kernels.gpu.token_draw import SamplingRows, draw_tokens
from listed_rows import listed

NUM_ROWS, LANES, LAYERS, BLOCKS, BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 3, 5, 4, 6, 16, 4, 2, 8, 16, 24


def arguments(device):
    """What each op takes, by its name and the parameter's."""

    def floats(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    def ints(*shape, dtype=torch.int64):
        return torch.zeros(shape, dtype=dtype, device=device)

    rows = listed(range(2), NUM_ROWS, device)
    doubles = floats(NUM_ROWS, dtype=torch.float64)
    tables, cache = ints(NUM_ROWS, 2, dtype=torch.int32), floats(BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    q, kv = floats(NUM_ROWS, HEADS, HEAD_DIM), floats(NUM_ROWS, KV_HEADS, HEAD_DIM)
    angles, x, weight = floats(NUM_ROWS, HEAD_DIM // 2), floats(NUM_ROWS, WIDTH), floats(VOCAB, WIDTH)
    actions, paths = ints(NUM_ROWS, dtype=torch.uint8), ints(NUM_ROWS, LAYERS, dtype=torch.int8)
    scores = floats(NUM_ROWS, LAYERS - 2)
    router = RouterWeights(
        prior=floats(LAYERS - 2),
        costs=ints(LAYERS, 2),
        forced=ints(LAYERS, dtype=torch.bool),
        sums=floats(LANES, WIDTH, dtype=torch.float64),
        last_paths=ints(LANES, LAYERS, dtype=torch.int8),
        down=Projection(floats(7, 2 * WIDTH), floats(7)),
        up=Projection(floats(LAYERS - 2, 7), floats(LAYERS - 2)),
    )
    lists = LayerLists(ints(3, LAYERS, NUM_ROWS, dtype=torch.int32), ints(3, LAYERS, dtype=torch.int32))
    of_lanes = floats(LANES, dtype=torch.float64)
    adjustments = LogitAdjustments(
        presence=of_lanes,
        frequency=of_lanes,
        counts=ints(LANES, VOCAB, dtype=torch.int32),
        bias=floats(LANES, VOCAB),
        allowed=ints(NUM_ROWS, VOCAB // 8, dtype=torch.uint8),
    )
    logits, bias = floats(NUM_ROWS, VOCAB), floats(VOCAB)
    routed = {"lanes": ints(NUM_ROWS), "path_actions": actions, "router": router, "live": rows, "scores": scores}
    by = Projection(weight, bias)
    product = {"x": x, "weight": weight, "bias": bias, "rows": rows}
    return {
        norm_rows: {"x": x, "weight": floats(WIDTH), "eps": 1e-5, "rows": rows, "out": x},
        row_linear: product | {"out": logits},
        add_row_linear: product | {"into": logits},
        row_qkv: {"x": x, "q": by, "k": by, "v": by, "running": rows, "written": rows}
        | {"q_out": logits, "k_out": logits, "v_out": logits},
        row_swiglu: {"x": x, "gate": by, "up": by, "rows": rows, "out": logits},
        attend: {"q": q, "k": kv, "v": kv, "cos": angles, "sin": angles, "positions": ints(NUM_ROWS)}
        | {"block_tables": tables, "cache_k": cache, "cache_v": cache, "paths": paths}
        | {
            "layer": AttentionLayer(1, 1.0, None, floats(HEAD_DIM), floats(HEAD_DIM)),
            "written": rows,
            "out": q.clone(),
            "arrivals": ints(NUM_ROWS, KV_HEADS, dtype=torch.int32),
        },
        score_layers: routed | {"first_v": x, "positions": ints(NUM_ROWS)},
        choose_paths: routed | {"max_costs": ints(NUM_ROWS), "aligned": ints(NUM_ROWS), "paths": paths},
        fill_layer_lists: {"paths": paths, "live": rows, "lists": lists},
        adjust_logits: {"logits": logits, "lanes": ints(NUM_ROWS), "adjustments": adjustments, "rows": rows}
        | {"out": logits},
        begin_step: {"embeddings": weight, "cos_table": floats(20, 4), "sin_table": floats(20, 4), "h": x.clone()}
        | {"cos": angles, "sin": angles, "state": RowState.empty(NUM_ROWS, 2, LAYERS, device)},
        end_step: {"drawn": ints(NUM_ROWS), "paths": paths, "state": RowState.empty(NUM_ROWS, 2, LAYERS, device)},
        draw_tokens: {"logits": logits, "rows": rows, "tokens": ints(NUM_ROWS)}
        | {"sampling": SamplingRows(doubles, ints(NUM_ROWS), doubles, doubles, doubles)},
    }


UNREAD = {
    # Made in one piece, and never by users.
    begin_step: ("state",),
    end_step: ("state",),
    score_layers: ("router.costs", "router.forced", "router.last_paths"),
    choose_paths: ("router.prior", "router.sums", "router.down", "router.up"),
}


def tensors(name, value):
    """The tensors in an argument, with their names."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(f"{name}.{field.name}", getattr(value, field.name))


def changed(value, names, change):
    """The same with another tensor at the end of these names."""
    if not names:
        return change(value)
    name, *rest = names
    if isinstance(value, dict):
        return value | {name: changed(value[name], rest, change)}
    return replace(value, **{name: changed(getattr(value, name), rest, change)})


def every_other_column(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


CASES = [
    pytest.param(op, name, id=f"{op.__name__}-{name}")
    for op, given in arguments(torch.device("cpu")).items()
    for argument, value in given.items()
    for name, _ in tensors(argument, value)
    if not name.startswith(UNREAD.get(op, ()))
]
each_tensor = pytest.mark.parametrize(("op", "name"), CASES)
each_row = pytest.mark.parametrize(("op", "name"), [case for case in CASES if not case.id.endswith(".count")])


@each_tensor
def test_a_tensor_of_another_dtype_is_named(op, name, device):
    given = changed(arguments(device)[op], name.split("."), lambda tensor: tensor.to(torch.int16))
    with pytest.raises(ValueError, match=f"{name} has dtype torch.int16, allowed is"):
        op(**given)


@each_tensor
def test_a_tensor_elsewhere_is_refused(op, name, device):
    given = changed(arguments(device)[op], name.split("."), lambda tensor: tensor.to("meta"))
    with pytest.raises(ValueError, match=r"is on device (meta|cpu|cuda:0), allowed is (meta|cpu|cuda:0)"):
        op(**given)


@each_row
def test_a_tensor_with_gaps_is_named(op, name, device):
    given = changed(arguments(device)[op], name.split("."), every_other_column)
    with pytest.raises(ValueError, match=rf"{name} has strides .*, allowed is a contig"):
        op(**given)
