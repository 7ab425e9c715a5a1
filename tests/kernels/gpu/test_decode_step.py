"""The kernels one after the other are a decode step: the same tokens, paths, sums and cache as TorchStepper's."""

from dataclasses import replace

import pytest
import torch

from buddy_kernels import PathAction, Sampling, StepRows, Wanted, rotary_cos_sin
from buddy_kernels.gpu.decode_attention import decode_attention
from buddy_kernels.gpu.path_choice import choose_paths
from buddy_kernels.gpu.path_router import score_layers
from buddy_kernels.gpu.rotary_cache import rotate_and_write
from buddy_kernels.gpu.row_linear import add_row_linear, row_linear, row_swiglu
from buddy_kernels.gpu.row_lists import LayerLists, RowList, fill_layer_lists
from buddy_kernels.gpu.row_norm import norm_rows
from buddy_kernels.gpu.token_draw import SamplingRows, draw_tokens
from buddy_routing.checkpoint import load_model
from buddy_routing.duo import new_small_ffns
from buddy_routing.kv_cache import KVCache
from buddy_routing.planner import PathPlanner
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.stepper import TorchStepper, router_weights
from tiny_models import save_random_model
from tolerances import assert_close

NUM_LIVE, NUM_ROWS, BLOCK_SIZE, TABLE_WIDTH = 5, 8, 16, 4
SAMPLING = Sampling(temperature=0.8, top_p=0.9)


def tiny_model(name, device, directory):
    save_random_model(name, directory)
    model = load_model(directory, torch.float32, device).model
    if name == "llama":
        model = model.with_small_ffns(new_small_ffns(model, divisor=4))
    return model.requires_grad_(False)


def random_rows(model):
    """Sequences of several lengths; the last keeps its path."""
    spec = model.spec
    positions = [0, 15, 16, 40, 63]
    tables = torch.randperm(NUM_ROWS * TABLE_WIDTH).view(NUM_ROWS, TABLE_WIDTH)[:NUM_LIVE].tolist()
    cheapest, full = spec.actions.smallest_cost, spec.actions.full_cost
    uniforms = torch.rand(NUM_LIVE, dtype=torch.float64).tolist()
    return StepRows(
        tokens=torch.randint(0, spec.vocab_size, (NUM_LIVE,)).tolist(),
        positions=positions,
        lengths=[1] * NUM_LIVE,
        tables=tables,
        lanes=[3, 0, 4, 1, 2],
        max_costs=[cheapest, (cheapest + full) // 2, full - 1000, cheapest + 1000, full],
        path_actions=[PathAction.CHOOSE] * (NUM_LIVE - 1) + [PathAction.KEEP],
        wanted=[Wanted(row, SAMPLING, [uniform]) for row, uniform in enumerate(uniforms)],
        aheads=[0] * NUM_LIVE,
        aligned=list(range(NUM_LIVE)),
    )


def a_planner(model, device):
    spec = model.spec
    decision = DecisionModule(2 * spec.kv_dim, spec.actions.num_scores).to(device).requires_grad_(False)
    prior = torch.randn(spec.actions.num_scores, device=device)
    planner = PathPlanner(LearnedRouter(decision, prior, 0.3, "test"), spec, NUM_LIVE, device)
    planner.features.sums.normal_()
    return planner


def padded(values, dtype, device):
    """Behind the live rows, what none may read: a graph has more rows than are live."""
    made = torch.tensor(values)
    rest = torch.full((NUM_ROWS - NUM_LIVE, *made.shape[1:]), 10**6)
    return torch.cat((made, rest)).to(device, dtype)


def decode(model, rows, router, cache, device):
    """Logits, tokens and paths [NUM_ROWS, ...] of a step by the kernels."""
    spec, eps = model.spec, model.spec.norm_eps
    positions, lanes, max_costs, aligned = (
        padded(values, torch.int64, device) for values in (rows.positions, rows.lanes, rows.max_costs, rows.aligned)
    )
    tables, actions = padded(rows.tables, torch.int32, device), padded(rows.path_actions, torch.uint8, device)
    cos, sin = rotary_cos_sin(positions, model.inv_freq, model.attention_factor)

    def buffer(*shape):
        return torch.full((NUM_ROWS, *shape), torch.nan, device=device)

    live, lists = RowList.of_first(NUM_LIVE, NUM_ROWS, device), LayerLists.empty(NUM_ROWS, spec.num_layers, device)
    h, normed, q = buffer(spec.hidden_size), buffer(spec.hidden_size), buffer(spec.num_heads, spec.head_dim)
    k, v, attended = buffer(spec.num_kv_heads, spec.head_dim), buffer(spec.num_kv_heads, spec.head_dim), q.clone()
    scores, paths = buffer(spec.actions.num_scores), torch.full((NUM_ROWS, spec.num_layers), 9, dtype=torch.int8)
    paths = paths.to(device)
    h[:NUM_LIVE] = model.embed_tokens(torch.tensor(rows.tokens, device=device))
    for index, layer in enumerate(model.blocks):
        attention = layer.self_attn
        norms = (attention.q_norm.weight, attention.k_norm.weight, eps) if attention.qk_norm else ()
        norm_rows(h, layer.input_layernorm.weight, eps, live, normed)
        row_linear(normed, attention.k_proj.weight, attention.k_proj.bias, live, k.flatten(1))
        row_linear(normed, attention.v_proj.weight, attention.v_proj.bias, live, v.flatten(1))
        if index == 0:
            score_layers(v.flatten(1), positions, lanes, actions, router, live, scores)
            choose_paths(scores, max_costs, lanes, actions, aligned, router, live, paths)
            fill_layer_lists(paths, live, lists)
        running, cache_k, cache_v = lists.running(index), cache.k[index], cache.v[index]
        row_linear(normed, attention.q_proj.weight, attention.q_proj.bias, running, q.flatten(1))
        rotate_and_write(q, k, v, cos, sin, positions, tables, cache_k, cache_v, live, running, *norms)
        scale = spec.head_dim**-0.5
        decode_attention(q, cache_k, cache_v, tables, positions, scale, attention.window, running, attended)
        add_row_linear(attended.flatten(1), attention.o_proj.weight, attention.o_proj.bias, running, h)
        norm_rows(h, layer.post_attention_layernorm.weight, eps, running, normed)
        for taken, mlp in ((lists.whole(index), layer.mlp), (lists.small(index), model.small_ffn(index))):
            if mlp is not None:
                gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
                fed = buffer(len(gate.weight))
                row_swiglu(normed, gate.weight, up.weight, gate.bias, up.bias, taken, fed)
                add_row_linear(fed, down.weight, down.bias, taken, h)
    norm_rows(h, model.norm.weight, eps, live, normed)
    logits, tokens = buffer(spec.vocab_size), torch.full((NUM_ROWS,), -1, device=device)
    row_linear(normed, model.lm_head.weight, None, live, logits)
    draw_tokens(logits, sampling_rows(rows, device), live, tokens)
    return logits, tokens, paths


def sampling_rows(rows, device):
    def of_rows(value, dtype=torch.float64):
        return torch.full((NUM_ROWS,), value, dtype=dtype, device=device)

    uniforms = padded([wanted.uniforms[0] for wanted in rows.wanted], torch.float64, device)
    return SamplingRows(
        of_rows(SAMPLING.temperature), of_rows(0, torch.int64), of_rows(SAMPLING.top_p), of_rows(0.0), uniforms
    )


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "qwen3"])
def test_a_step_of_kernels_is_a_step_of_the_reference(name, device, tmp_path):
    model = tiny_model(name, device, tmp_path)
    torch.manual_seed(3)
    rows, planner = random_rows(model), a_planner(model, device)
    router = router_weights(planner)
    router = replace(
        router,
        costs=router.costs.to(device),
        forced=router.forced.to(device),
        sums=router.sums.clone(),
        last_paths=router.last_paths.to(device, copy=True),
    )
    cache = KVCache.allocate(model.spec, NUM_ROWS * TABLE_WIDTH, BLOCK_SIZE, torch.float32, device)
    cache.k.normal_()
    cache.v.normal_()
    own_cache = KVCache(cache.k.clone(), cache.v.clone())
    want = TorchStepper(model, cache, planner).step(rows)
    logits, tokens, paths = decode(model, rows, router, own_cache, device)
    assert torch.equal(paths[:NUM_LIVE].cpu(), want.paths[0])
    assert len(set(map(tuple, want.paths[0].tolist()))) > 2
    assert torch.equal(router.last_paths.cpu(), planner.last_paths)
    depth, width = model.spec.num_layers, model.spec.intermediate_size
    assert_close(router.sums[rows.lanes].cpu().float(), want.sums.cpu().float(), width)
    assert_close(logits[:NUM_LIVE].cpu(), want.logits, width, depth)
    assert tokens[:NUM_LIVE].tolist() == [made[0].token_id for made in want.tokens]
    for own, wanted in ((own_cache.k, cache.k), (own_cache.v, cache.v)):
        assert_close(own, wanted, width, depth)
    assert logits[NUM_LIVE:].isnan().all()
    assert (paths[NUM_LIVE:] == 9).all()
