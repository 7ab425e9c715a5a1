"""Small FFNs: how they are saved, and the two ways through them against each other."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buddy_kernels import PathAction, RoutedStep, StepRows, WeightKind
from buddy_routing.action_space import MILLI_LAYERS, RUN, SMALL
from buddy_routing.artifact import load_duo, load_router, save_duo
from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import MLP, RoutedDecoder
from buddy_routing.duo import DuoRouter, new_small_ffns
from buddy_routing.model_spec import ModelSpec
from buddy_routing.planner import PathPlanner
from buddy_routing.router import DecisionModule, StaticRouter
from buddy_routing.router_config import ArtifactError, DuoConfig, read_kind
from buddy_routing.selection import select_path
from buddy_routing.stepper import decoder_weights, router_weights
from buddy_routing.train.routed_paths import routed_paths
from sparse_decode import SparseDecode, grouped, segment_bounds
from tiny_models import CONFIGS, SHAPE, save_random_model
from tolerances import assert_close, assert_far

CPU = torch.device("cpu")
NUM_LAYERS: int = SHAPE["num_hidden_layers"]
DIVISOR = 4
WIDTH = 60
NUM_PROMPT, ROUTE_BLOCK = 37, 16
TINY = ModelSpec(
    family="llama",
    num_layers=3,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=32,
    vocab_size=32,
    max_context=64,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None,) * 3,
)


def load_tiny(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> RoutedDecoder:
    save_random_model(name, directory)
    return load_model(directory, dtype, CPU).model


def random_duo(model: RoutedDecoder) -> DuoRouter:
    """Its paths change from token to token, and mix all three actions."""
    torch.manual_seed(1)
    small_ffns = new_small_ffns(model, DIVISOR)
    with torch.no_grad():
        for mlp in small_ffns.values():
            for parameter in mlp.parameters():
                parameter.normal_(0.0, 0.2)
            mlp.to(model.norm.weight.dtype).requires_grad_(False)
    decision = DecisionModule(2 * model.spec.kv_dim, model.with_small_ffns(small_ffns).spec.actions.num_scores)
    with torch.no_grad():
        decision.up.weight.mul_(3)
        decision.up.bias.copy_(torch.tensor([1.0, 0.5]).repeat(NUM_LAYERS - 2))
    return DuoRouter(decision.requires_grad_(False), small_ffns, "test")


def decode(
    model: RoutedDecoder, router: DuoRouter, tokens: Tensor, num_run: Sequence[float], native: WeightKind | None = None
) -> SparseDecode:
    return SparseDecode(model.with_small_ffns(router.small_ffns), router, tokens, num_run, native)


def some_tokens(num_sequences: int, num_tokens: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, SHAPE["vocab_size"], (num_sequences, num_tokens), generator=generator)


def test_a_small_ffn_costs_its_share_of_a_layers_weights_rounded_up(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    actions = model.with_small_ffns(new_small_ffns(model, DIVISOR)).spec.actions
    layer = model.blocks[1]
    attention = sum(p.numel() for name, p in layer.self_attn.named_parameters() if name.endswith("proj.weight"))
    big = sum(p.numel() for p in layer.mlp.parameters())
    assert 0 <= actions.costs[1][SMALL] - MILLI_LAYERS * (attention + big / DIVISOR) / (attention + big) < 1
    assert actions.costs[0] == actions.costs[-1] == (0, MILLI_LAYERS)
    assert actions.max_cost(0.55) == int(0.55 * actions.full_cost), "budgets are kept to the milli-layer"
    with pytest.raises(ValueError, match="small FFNs of 1/1 are not allowed: give 2 to"):
        new_small_ffns(model, 1)


def test_new_small_ffns_are_the_units_with_the_largest_weights(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    big = model.blocks[2].mlp
    with torch.no_grad():
        big.down_proj.weight[:, 5:] = 0
        everything = torch.ones_like(big.gate_proj.weight[:5])
        big.gate_proj.weight[:5] = everything
        big.up_proj.weight[:5] = everything
    small = new_small_ffns(model, DIVISOR)[2]
    x = torch.randn(3, SHAPE["hidden_size"])
    with torch.inference_mode():
        assert_close(small(x), big(x), SHAPE["intermediate_size"], 1)


@pytest.mark.parametrize("native", [None, "float32"])
@pytest.mark.parametrize("step_sizes", [[1], [2, 1, 5]])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2-window", "qwen3"])
def test_dense_training_forward_equals_sparse_decode_of_mixed_actions(
    name: str, step_sizes: list[int], native: WeightKind | None, tmp_path: Path
) -> None:
    model = load_tiny(name, tmp_path)
    router = random_duo(model)
    duo = model.with_small_ffns(router.small_ffns)
    num_run = [2.6, 3.35, 4.0, 5.2, 2.6, 6.0]
    tokens = some_tokens(len(num_run))
    begins = (torch.arange(WIDTH) == 0).expand_as(tokens)
    in_answer = (torch.arange(WIDTH) >= NUM_PROMPT).expand_as(tokens)
    max_cost = (MILLI_LAYERS * torch.tensor(num_run)).long()[:, None].expand_as(tokens)
    choose = routed_paths(router, duo.spec.actions, begins, in_answer, max_cost, ROUTE_BLOCK)
    shares = torch.empty(0)

    def noted(v: Tensor) -> Tensor:
        nonlocal shares
        shares = choose(v).round()
        return shares

    with torch.inference_mode():
        dense = model.lm_head(duo.dense(tokens, noted))
    wanted = (shares * torch.tensor([RUN, SMALL])).sum(-1)  # [B, T, L] actions
    sparse = decode(model, router, tokens, num_run, native)
    seen = set()
    for step in grouped(segment_bounds(NUM_PROMPT, WIDTH, ROUTE_BLOCK), step_sizes):
        spans = [(sequence, start, end) for sequence in range(len(num_run)) for start, end in step]
        logits, paths = sparse.step(spans)
        for (sequence, _, end), row_logits, path in zip(spans, logits, paths, strict=True):
            assert path.tolist() == wanted[sequence, end - 1].tolist()
            assert_close(row_logits, dense[sequence, end - 1], WIDTH, NUM_LAYERS)
            assert duo.spec.actions.cost(path.tolist()) <= MILLI_LAYERS * num_run[sequence]
            seen.update(path[1:-1].tolist())
    assert seen == {0, RUN, SMALL}, "not every action was tried"
    with torch.inference_mode():
        others = model.lm_head(model.dense(tokens))
    assert_far(others[0, -1], dense[0, -1], WIDTH, NUM_LAYERS)
    assert_close(others[-1, -1], dense[-1, -1], WIDTH, NUM_LAYERS)


@pytest.mark.parametrize(
    ("dtype", "native"), [("float32", False), ("float32", True), ("bfloat16", True), ("int8", True)]
)
def test_a_row_has_the_same_bits_alone_and_among_other_actions(dtype: WeightKind, native: bool, tmp_path: Path) -> None:
    model = load_tiny("qwen2", tmp_path, torch.float32 if dtype == "float32" else torch.bfloat16)
    router = random_duo(model)
    num_run = [2.6, 3.35, 6.0] * 7
    tokens = some_tokens(len(num_run), 44)
    kind = dtype if native else None
    together, *alone = (decode(model, router, tokens, num_run, kind) for _ in range(4))
    for start, end in segment_bounds(40, 44, ROUTE_BLOCK):
        logits, _ = together.step([(sequence, start, end) for sequence in range(len(num_run))])
        for sequence, one in enumerate(alone):
            assert torch.equal(one.step([(sequence, start, end)])[0][0], logits[sequence])


def test_steps_in_a_row_are_the_steps_one_by_one(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    router, num_run = random_duo(model), [2.6, 3.35, 6.0, 4.0]
    tokens = some_tokens(4, 30)
    in_a_row, one_by_one = (decode(model, router, tokens.clone(), num_run, "float32") for _ in range(2))
    spans = [(sequence, 0, 20) for sequence in range(4)]
    for run in (in_a_row, one_by_one):
        logits, _ = run.step(spans)
        run.tokens[:, 20] = logits.argmax(-1)
    output = in_a_row.run([(sequence, 20, 21) for sequence in range(4)], wanted=[{"max_tokens": 6}] * 4, most_s=60.0)
    for step in range(6):
        logits, paths = one_by_one.step([(sequence, 20 + step, 21 + step) for sequence in range(4)])
        one_by_one.tokens[:, 21 + step] = logits.argmax(-1)
        assert torch.equal(output.paths[step], paths)
        assert [made[step].token_id for made in output.tokens] == one_by_one.tokens[:, 21 + step].tolist()


@pytest.mark.parametrize("native", [None, "float32"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_full_depth_beside_small_ffns_is_the_model_without_them(
    name: str, native: WeightKind | None, tmp_path: Path
) -> None:
    model = load_tiny(name, tmp_path)
    tokens = some_tokens(2, 40)
    router = random_duo(model)
    beside = decode(model, router, tokens, [NUM_LAYERS, 3.35], native)
    alone = SparseDecode(model, StaticRouter(torch.zeros(NUM_LAYERS - 2), "any"), tokens, [NUM_LAYERS] * 2, native)
    for start, end in segment_bounds(30, 40, ROUTE_BLOCK):
        logits, _ = beside.step([(0, start, end), (1, start, end)])
        assert torch.equal(logits[0], alone.step([(0, start, end)])[0][0])


def test_a_saved_router_comes_back_with_its_small_ffns_and_others_are_refused(tmp_path: Path) -> None:
    model = load_tiny("qwen3", tmp_path / "model")
    router, artifact = random_duo(model), tmp_path / "duo"
    size = router.small_ffns[1].down_proj.in_features
    config = DuoConfig("abc", NUM_LAYERS, model.spec.kv_dim, 32, size)
    save_duo(artifact, router, config, torch.float32)
    assert read_kind(artifact) == "duo"
    loaded, found = load_duo(artifact, model, "abc")
    assert found == config
    assert loaded.router_id.startswith("duo:")
    features = torch.randn(5, 2 * model.spec.kv_dim)
    assert torch.equal(loaded.scores(features), router.scores(features))
    for layer, mlp in router.small_ffns.items():
        for name, parameter in mlp.named_parameters():
            assert torch.equal(loaded.small_ffns[layer].get_parameter(name), parameter), name
    with pytest.raises(ArtifactError, match="made for a model with fingerprint abc, this model has xyz"):
        load_duo(artifact, model, "xyz")
    with pytest.raises(ArtifactError, match="is an artifact of the kind 'duo'; allowed here: 'router'"):
        load_router(artifact, "abc", CPU)
    fields = json.loads((artifact / "router_config.json").read_text())
    for changes, told in (
        ({"small_ffn_size": size + 1}, "small_ffns.safetensors does not fit"),
        ({"rank": 3}, "router.safetensors does not fit"),
        ({"small_ffn_size": 0}, "small_ffn_size is 0; allowed is 1 or more"),
        ({"small_ffn_size": "big"}, "small_ffn_size is 'big'; allowed is 1 or more"),
        ({"kv_policy": "drop"}, "kv_policy 'drop' is not supported"),
        ({"small_ffn_size": SHAPE["intermediate_size"]}, "the big ones' size"),
    ):
        (artifact / "router_config.json").write_text(json.dumps(fields | changes))
        with pytest.raises(ArtifactError, match=told):
            load_duo(artifact, model, "abc")
    with torch.no_grad():
        router.decision.up.bias[0] = torch.nan
    save_duo(artifact, router, config, torch.float32)
    with pytest.raises(ArtifactError, match=r"router\.safetensors has weights that are not finite: up\.bias"):
        load_duo(artifact, model, "abc")


def test_small_ffns_belong_to_one_decoder_and_not_to_the_one_that_shares_its_layers(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    duo = model.with_small_ffns(new_small_ffns(model, DIVISOR))
    assert isinstance(duo.small_ffn(1), MLP)
    assert (duo.small_ffn(0), duo.small_ffn(NUM_LAYERS - 1), model.small_ffn(1)) == (None, None, None)
    assert duo.blocks[1] is model.blocks[1]


@pytest.mark.parametrize("num_layers", [3, 6, 18, 36])
def test_the_native_knapsack_is_the_reference_in_ties_too(num_layers: int) -> None:
    torch.manual_seed(0)
    config = replace(TINY, num_layers=num_layers, windows=(None,) * num_layers)
    model = RoutedDecoder(config).requires_grad_(False)
    duo = model.with_small_ffns(new_small_ffns(model, DIVISOR)).requires_grad_(False)
    actions = duo.spec.actions
    step = RoutedStep(decoder_weights(duo), "float32", num_blocks=6, num_threads=1)
    generator = torch.Generator().manual_seed(num_layers)
    for attempt in range(20):
        scores = torch.randn(actions.num_scores, generator=generator) * 3
        if attempt % 2:
            scores = scores.round() / 2
        planner = PathPlanner(StaticRouter(scores, "test"), duo.spec, 6, CPU)
        costs = torch.randint(actions.smallest_cost, actions.full_cost + 1, (6,), generator=generator)
        rows = StepRows(
            tokens=[1] * 6,
            positions=[0] * 6,
            lengths=[1] * 6,
            tables=[[block] for block in range(6)],
            lanes=range(6),
            max_costs=costs.tolist(),
            path_actions=[PathAction.CHOOSE] * 6,
            wanted=(),
            aheads=[0] * 6,
            aligned=range(6),
        )
        weights = router_weights(planner)
        assert weights is not None
        paths = step(rows, weights).paths[0]
        assert torch.equal(paths, select_path(scores.expand(6, -1), costs, actions))
        assert all(actions.cost(path) <= cost for path, cost in zip(paths.tolist(), costs.tolist(), strict=True))
