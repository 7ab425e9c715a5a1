"""The native step against plain torch beyond what test_decoder.py holds together."""

from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from buddy_kernels import RoutedStep, RouterWeights, StepRows, WeightKind
from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.model_spec import ModelSpec
from buddy_routing.router import PromptSetRouter, Router, StaticRouter
from buddy_routing.selection import select_layers
from buddy_routing.stepper import decoder_weights
from sparse_decode import SparseDecode, segment_bounds
from tiny_models import CONFIGS, SHAPE, save_random_model
from tolerances import TOLERANCE

NUM_LAYERS = SHAPE["num_hidden_layers"]


def load_tiny(name: str, directory: Path) -> RoutedDecoder:
    save_random_model(name, directory)
    return load_model(directory, torch.float32, torch.device("cpu")).model


def prompt_sets(model: RoutedDecoder) -> PromptSetRouter:
    torch.manual_seed(2)
    rankings, weight = torch.rand(3, NUM_LAYERS - 2), torch.randn(3, 2 * model.spec.kv_dim)
    return PromptSetRouter(rankings, weight, torch.zeros(3), "sets")


def ties(_: RoutedDecoder) -> StaticRouter:
    return StaticRouter(torch.tensor([0.5, 0.7, 0.5, 0.5]), "ties")


def run_both(model: RoutedDecoder, router: Router, native: WeightKind) -> tuple[Tensor, Tensor]:
    """Logits [steps, S, V] in plain torch fp32 and of the native step; their paths are the same."""
    tokens = torch.randint(0, SHAPE["vocab_size"], (3, 60), generator=torch.Generator().manual_seed(3))
    runs = [SparseDecode(model, router, tokens, [4, 3, 6], kind) for kind in (None, native)]
    steps = []
    for start, end in segment_bounds(40, 60, route_block=16):
        (ours, paths), (theirs, their_paths) = (run.step([(s, start, end) for s in range(3)]) for run in runs)
        assert torch.equal(paths, their_paths)
        steps.append((ours, theirs))
    return torch.stack([ours for ours, _ in steps]), torch.stack([theirs for _, theirs in steps])


@pytest.mark.parametrize("make_router", [prompt_sets, ties])
def test_routers_that_the_op_asks_for_or_ranks_itself_choose_the_same(
    make_router: Callable[[RoutedDecoder], Router], tmp_path: Path
) -> None:
    model = load_tiny("llama", tmp_path)
    torch_logits, native_logits = run_both(model, make_router(model), "float32")
    torch.testing.assert_close(native_logits, torch_logits, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("make_router", [prompt_sets, ties])
@pytest.mark.parametrize("native", [None, "float32"])
def test_running_sums_are_told_after_every_segment_and_a_lane_can_go_on_from_them(
    native: WeightKind | None, make_router: Callable[[RoutedDecoder], Router], tmp_path: Path
) -> None:
    model = load_tiny("llama", tmp_path)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 50))
    sparse = SparseDecode(model, make_router(model), tokens, [4, 3], native)
    before = sparse.run([(0, 0, 16), (1, 0, 7), (0, 16, 32)])
    assert before.sums.dtype == torch.float64
    lanes = sparse.stepper.planner.features.sums
    assert torch.equal(before.sums[[2, 1]], lanes)
    after = sparse.run([(0, 32, 48), (0, 48, 50)])
    assert torch.equal(after.sums[1], lanes[0])
    sparse.stepper.planner.start(0, array("d", before.sums[2].tolist()))
    assert torch.equal(before.sums[2], lanes[0])
    again = sparse.run([(0, 32, 48), (0, 48, 50)])
    assert torch.equal(again.sums, after.sums)
    assert torch.equal(again.logits, after.logits)


def test_running_sums_of_the_native_step_are_those_of_plain_torch(tmp_path: Path) -> None:
    model = load_tiny("qwen3", tmp_path)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 40))
    ours, theirs = (SparseDecode(model, ties(model), tokens, [4], kind).run([(0, 0, 33)]) for kind in (None, "float32"))
    torch.testing.assert_close(theirs.sums, ours.sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
@pytest.mark.parametrize(("kind", "error"), [("bfloat16", 0.05), ("int8", 0.15)])
def test_rounded_weights_stay_near_fp32(name: str, kind: WeightKind, error: float, tmp_path: Path) -> None:
    model = load_tiny(name, tmp_path)
    exact, rounded = run_both(model, ties(model), kind)
    assert (exact - rounded).norm() / exact.norm() < error


def test_an_error_of_the_router_comes_through_and_the_next_step_works(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)

    class Broken:
        router_id, reroute_every, is_broken = "broken", 1, True

        def choose(self, features: Tensor, num_run: Tensor) -> Tensor:
            if self.is_broken:
                raise RuntimeError("no path today")
            return select_layers(torch.zeros(len(features), NUM_LAYERS - 2), num_run)

    router = Broken()
    sparse = SparseDecode(model, router, torch.ones(1, 20, dtype=torch.int64), [4], "float32")
    with pytest.raises(RuntimeError, match="no path today"):
        sparse.step([(0, 0, 10)])
    router.is_broken = False
    assert sparse.step([(0, 0, 10)])[1].sum() == 4


@pytest.mark.parametrize("name", list(CONFIGS))
def test_threads_do_not_show_in_the_result(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny(name, tmp_path)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 30))
    logits = []
    for num_threads in (1, 2, 5):
        monkeypatch.setattr("sparse_decode.NUM_THREADS", num_threads)
        sparse = SparseDecode(model, ties(model), tokens, [4, 6], "float32")
        sparse.step([(0, 0, 29), (1, 0, 29)])
        logits.append(sparse.step([(0, 29, 30), (1, 29, 30)])[0])
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


ODD_SHAPES = {
    "wide": {"hidden_size": 512, "intermediate_size": 700, "num_attention_heads": 8, "num_key_value_heads": 1},
    "odd-mlp": {"hidden_size": 130, "intermediate_size": 1, "num_attention_heads": 5, "num_key_value_heads": 5},
    "seven-queries": {"hidden_size": 70, "intermediate_size": 257, "num_attention_heads": 14, "num_key_value_heads": 2},
    "three-queries": {"hidden_size": 102, "intermediate_size": 63, "num_attention_heads": 6, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("head_dim", [6, 18, 64])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_sizes_that_fill_no_vector_are_the_same_in_fp32_and_near_in_int8(shape: str, head_dim: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, **ODD_SHAPES[shape]}, head_dim=head_dim, architectures=["LlamaForCausalLM"])
    model = RoutedDecoder(ModelSpec.from_config(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    exact, native = run_both(model, ties(model), "float32")
    torch.testing.assert_close(native, exact, rtol=1e-3, atol=1e-3)
    _, int8 = run_both(model, ties(model), "int8")
    assert (exact - int8).norm() / exact.norm() < 0.15


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"tokens": torch.tensor([SHAPE["vocab_size"]])}, "a token is not in the vocabulary"),
        ({"positions": torch.tensor([16])}, "a position is past its block table"),
        ({"block_tables": torch.tensor([[1]])}, "a block is not in the pool"),
        ({"lanes": torch.tensor([1])}, "a lane is unknown"),
        ({"budgets": torch.tensor([1])}, "a budget is not 2 to all layers"),
        ({"wanted": torch.tensor([1])}, "a wanted row is not in the step"),
        ({"lengths": torch.tensor([2])}, "a segment is empty or too long"),
        ({"tokens": torch.tensor([0], dtype=torch.int32)}, "tokens has dtype torch.int32, allowed is torch.int64"),
        ({"positions": torch.tensor([0, 1])}, "positions has shape"),
    ],
)
def test_rows_that_name_what_does_not_exist_are_refused(wrong: dict[str, Tensor], told: str, tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    step = RoutedStep(decoder_weights(model), "float32", num_blocks=1, num_threads=1)
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    right = StepRows(zero, zero, one, torch.zeros(1, 1, dtype=torch.int64), zero, 3 * one, torch.ones(1).byte(), zero)
    router = RouterWeights(
        torch.zeros(NUM_LAYERS - 2), torch.zeros(1, model.spec.kv_dim).double(), torch.ones(1, NUM_LAYERS).char()
    )
    assert step(right, router).masks.sum() == 3
    with pytest.raises(ValueError, match=told):
        step(replace(right, **wrong), router)
