"""Exits: what a budget pays for, how they are saved, and the two ways through them against each other."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buddy_kernels import PathAction, WeightKind
from buddy_routing.action_space import MILLI_LAYERS, ActionSpace, BudgetError
from buddy_routing.artifact import load_exits, load_router, save_exits
from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import Exit, RoutedDecoder
from buddy_routing.exits import ExitRouter, new_exits
from buddy_routing.router import StaticRouter
from buddy_routing.router_config import ArtifactError, ExitsConfig, read_kind
from sparse_decode import NATIVE, SparseDecode, grouped, segment_bounds
from tiny_models import CONFIGS, SHAPE, save_random_model
from tolerances import assert_close, assert_far, assert_near

CPU = torch.device("cpu")
NUM_LAYERS: int = SHAPE["num_hidden_layers"]
EXITS = (1, 3)
COSTS = (2, 4, NUM_LAYERS)
"""In layers: of each exit, and of full depth."""
WIDTH = 60
KEEP = PathAction.KEEP


def load_tiny(name: str, directory: Path) -> RoutedDecoder:
    save_random_model(name, directory)
    return load_model(directory, torch.float32, CPU).model


def random_exits(model: RoutedDecoder, exits: tuple[int, ...] = EXITS) -> dict[int, Exit]:
    torch.manual_seed(5)
    made = new_exits(model, exits)
    with torch.no_grad():
        for exit_ in made.values():
            for name, parameter in exit_.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            exit_.requires_grad_(False)
    return made


def some_tokens(num_sequences: int, num_tokens: int = WIDTH) -> Tensor:
    return torch.randint(
        0, SHAPE["vocab_size"], (num_sequences, num_tokens), generator=torch.Generator().manual_seed(4)
    )


def decode(
    model: RoutedDecoder,
    exits: dict[int, Exit],
    tokens: Tensor,
    num_run: Sequence[int],
    native: WeightKind | None = None,
    arithmetic: str | None = None,
) -> SparseDecode:
    return SparseDecode(model.with_exits(exits), ExitRouter(exits, "test"), tokens, num_run, native, arithmetic)


def test_a_budget_takes_the_deepest_exit_that_it_pays_for() -> None:
    actions = ActionSpace.of_exits(16, (5, 9, 13))
    assert (actions.num_layers, actions.num_columns, actions.full_cost) == (16, 19, 16 * MILLI_LAYERS)
    assert actions.smallest_cost == 6 * MILLI_LAYERS
    for budget, num_run in (
        (0.375, 6),
        (0.5, 6),
        (0.62, 6),
        (0.625, 10),
        (0.874, 10),
        (0.875, 14),
        (0.99, 14),
        (1, 16),
    ):
        assert actions.max_cost(budget) == num_run * MILLI_LAYERS, budget
        path = actions.exit_path(actions.max_cost(budget))
        assert actions.path_costs[path] == num_run * MILLI_LAYERS
    assert actions.layers_run(actions.exit_path(10_500)) == (*range(9), 17)
    assert actions.layers_run(actions.exit_path(16_000)) == tuple(range(16))


def test_a_budget_below_the_first_exit_is_refused_with_the_range() -> None:
    with pytest.raises(BudgetError, match=r"budget 0.37 .*a number from 0.375 \(6 of 16 layers\) to 1"):
        ActionSpace.of_exits(16, (5, 9)).max_cost(0.37)


@pytest.mark.parametrize("exits", [(), (0,), (5,), (3, 1), (2, 2), (1, 6)])
def test_exits_that_save_no_layer_or_are_out_of_order_are_refused(exits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"from 1 to 4 in a model of 6 layers"):
        ActionSpace.of_exits(NUM_LAYERS, exits)


def test_saved_exits_come_back_and_others_are_refused(tmp_path: Path) -> None:
    model = load_tiny("qwen3", tmp_path / "model")
    exits, artifact = random_exits(model), tmp_path / "exits"
    save_exits(artifact, exits, ExitsConfig("abc", EXITS), torch.float32)
    assert read_kind(artifact) == "exits"
    loaded, config = load_exits(artifact, model, "abc")
    assert config == ExitsConfig("abc", EXITS)
    assert list(loaded.exits) == list(EXITS)
    for number, exit_ in exits.items():
        for name, parameter in exit_.named_parameters():
            assert torch.equal(loaded.exits[number].get_parameter(name), parameter), name
    with pytest.raises(ArtifactError, match="made for a model with fingerprint abc, this model has xyz"):
        load_exits(artifact, model, "xyz")
    with pytest.raises(ArtifactError, match="is an artifact of the kind 'exits'; allowed here: 'router'"):
        load_router(artifact, "abc", CPU)
    fields = json.loads((artifact / "router_config.json").read_text())
    for changes, told in (
        ({"exits": [1, 2]}, "exits.safetensors does not fit"),
        ({"exits": [3, 1]}, r"does not fit the model: exits \[3, 1\] are not allowed"),
        ({"exits": "13"}, r"exits '13' is not a list of whole numbers"),
        ({"format_version": 2}, "format_version 2 is not supported"),
        ({"rank": 3}, "cannot be read: .*rank"),
    ):
        (artifact / "router_config.json").write_text(json.dumps(fields | changes))
        with pytest.raises(ArtifactError, match=told):
            load_exits(artifact, model, "abc")
    (artifact / "router_config.json").write_text(json.dumps(fields | {"kind": "magic"}))
    with pytest.raises(ArtifactError, match="kind 'magic' is not supported"):
        read_kind(artifact)


def test_new_exits_are_copies_of_the_last_layer_and_leave_the_model_as_it_is(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    exits = new_exits(model, (NUM_LAYERS - 2,))
    exits[NUM_LAYERS - 2].norm.load_state_dict(model.norm.state_dict())
    tokens = some_tokens(2)
    with torch.inference_mode():
        full, (left,) = model.with_exits(exits).dense_exits(tokens)
        assert torch.equal(full, model.dense(tokens))
        without = torch.ones(2, WIDTH, NUM_LAYERS)
        without[..., NUM_LAYERS - 2] = 0
        assert torch.equal(left, model.dense(tokens, lambda _: without[..., None]))
    assert model.spec.exits == ()


@pytest.mark.parametrize("native", [None, "float32"])
@pytest.mark.parametrize("step_sizes", [[1], [2, 1, 5]])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2-window", "qwen3"])
def test_dense_training_forward_equals_sparse_decode_of_mixed_exits(
    name: str, step_sizes: list[int], native: WeightKind | None, tmp_path: Path
) -> None:
    model = load_tiny(name, tmp_path)
    exits = random_exits(model)
    # More rows than a thread prepares on its own, and sequences of one exit beside each other and apart.
    num_run = [2, 6, 4, 2, 4, 6]
    tokens = some_tokens(len(num_run))
    with torch.inference_mode():
        full, left = model.with_exits(exits).dense_exits(tokens)
        dense = {count: model.lm_head(hidden) for count, hidden in zip(COSTS, [*left, full], strict=True)}
    sparse = decode(model, exits, tokens, num_run, native)
    for step in grouped(segment_bounds(37, WIDTH, route_block=16), step_sizes):
        spans = [(sequence, start, end) for sequence in range(len(num_run)) for start, end in step]
        logits, paths = sparse.step(spans, path_actions=[KEEP] * len(spans))
        for (sequence, _, end), row_logits, path in zip(spans, logits, paths, strict=True):
            assert_close(row_logits, dense[num_run[sequence]][sequence, end - 1], WIDTH, NUM_LAYERS)
            assert int(path.sum()) == num_run[sequence]
    for count in COSTS:
        for other in COSTS:
            if other != count:
                assert_far(dense[other][0, -1], dense[count][0, -1], WIDTH, NUM_LAYERS)


@pytest.mark.parametrize("native", [None, "float32"])
def test_layers_behind_an_exit_write_no_keys_and_values(native: WeightKind | None, tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    exits = random_exits(model)
    sparse = decode(model, exits, some_tokens(2, 20), [2, 4], native)
    sparse.step([(0, 0, 20), (1, 0, 20)], path_actions=[KEEP] * 2)
    cache = sparse.stepper.routed_step.cache_k if native else sparse.stepper.cache.k
    for sequence, ran in ((0, {0, 6}), (1, {0, 1, 2, 7})):
        blocks = cache[:, sparse.tables[sequence]]
        assert {column for column, of_column in enumerate(blocks) if not of_column.isnan().all()} == ran


@pytest.mark.parametrize(
    ("dtype", "native"),
    [("float32", False), ("float32", True), ("bfloat16", True), ("int8", True)],
)
def test_a_row_has_the_same_bits_alone_and_among_other_exits(dtype: WeightKind, native: bool, tmp_path: Path) -> None:
    save_random_model("qwen2", tmp_path)
    model = load_model(tmp_path, torch.float32 if dtype == "float32" else torch.bfloat16, CPU).model
    exits = {number: exit_.to(model.norm.weight.dtype) for number, exit_ in random_exits(model).items()}
    num_run = [2, 4, 6] * 7
    tokens = some_tokens(len(num_run), 44)
    kind = dtype if native else None
    together, *alone = (decode(model, exits, tokens, num_run, kind) for _ in range(4))
    for start, end in segment_bounds(40, 44, route_block=16):
        spans = [(sequence, start, end) for sequence in range(len(num_run))]
        logits, _ = together.step(spans, path_actions=[KEEP] * len(spans))
        for sequence, one in enumerate(alone):
            assert torch.equal(one.step([(sequence, start, end)], path_actions=[KEEP])[0][0], logits[sequence])


@pytest.mark.parametrize(("native", "arithmetic"), [pair for pair in NATIVE if pair[0] != "float32"])
def test_rounded_weights_stay_near_fp32(native: WeightKind, arithmetic: str, tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    exits, tokens, num_run = random_exits(model), some_tokens(3), [2, 4, 4]
    exact, rounded = (decode(model, exits, tokens, num_run, *kind) for kind in ((None,), (native, arithmetic)))
    other = decode(model, exits, tokens, [4, 2, 2])
    spans = [(sequence, 0, WIDTH) for sequence in range(3)]
    logits = [run.step(spans, path_actions=[KEEP] * 3)[0] for run in (rounded, exact, other)]
    assert_near(*logits, native, NUM_LAYERS)


def test_steps_in_a_row_are_the_steps_one_by_one(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    exits, num_run = random_exits(model), [2, 4, 6, 2]
    tokens = some_tokens(4, 30)
    in_a_row, one_by_one = (decode(model, exits, tokens.clone(), num_run, "float32") for _ in range(2))
    spans = [(sequence, 0, 20) for sequence in range(4)]
    for run in (in_a_row, one_by_one):
        logits, _ = run.step(spans, path_actions=[KEEP] * 4)
        run.tokens[:, 20] = logits.argmax(-1)
    output = in_a_row.run(
        [(sequence, 20, 21) for sequence in range(4)],
        path_actions=[KEEP] * 4,
        wanted=[{"max_tokens": count} for count in (6, 3, 6, 4)],
        most_s=60.0,
    )
    assert output.paths.sum(-1).tolist()[:3] == [num_run] * 3
    for step in range(6):
        logits, _ = one_by_one.step([(s, 20 + step, 21 + step) for s in range(4)], path_actions=[KEEP] * 4)
        one_by_one.tokens[:, 21 + step] = logits.argmax(-1)
        for sequence, made in enumerate(output.tokens):
            if step < len(made):
                assert made[step].token_id == one_by_one.tokens[sequence, 21 + step]


@pytest.mark.parametrize("native", [None, "float32"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_full_depth_beside_exits_is_the_model_without_them(
    name: str, native: WeightKind | None, tmp_path: Path
) -> None:
    model = load_tiny(name, tmp_path)
    tokens = some_tokens(2, 40)
    beside = decode(model, random_exits(model), tokens, [NUM_LAYERS, 2], native)
    alone = SparseDecode(model, StaticRouter(torch.zeros(NUM_LAYERS - 2), "any"), tokens, [NUM_LAYERS] * 2, native)
    for start, end in segment_bounds(30, 40, route_block=16):
        logits, _ = beside.step([(0, start, end), (1, start, end)], path_actions=[KEEP] * 2)
        expected, _ = alone.step([(0, start, end)])
        assert torch.equal(logits[0], expected[0])
