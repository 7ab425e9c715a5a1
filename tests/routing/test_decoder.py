"""Parity: the routed decoder against transformers, and its two ways through against each other."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from buddy_kernels import WeightKind
from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.features import causal_features
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router import DecisionModule, LearnedRouter, StaticRouter
from buddy_routing.selection import action_shares, select_path, straight_through
from buddy_routing.train.routed_paths import routed_paths
from sparse_decode import SparseDecode, grouped, segment_bounds
from tiny_models import CONFIGS, SHAPE, save_random_model
from tolerances import assert_close, assert_far

CPU = torch.device("cpu")
NUM_LAYERS = SHAPE["num_hidden_layers"]
WIDTH = 60
"""The longest sum is over the tokens of a sequence."""


def load_tiny(name: str, directory: Path) -> RoutedDecoder:
    save_random_model(name, directory)
    return load_model(directory, torch.float32, CPU).model


def full_depth() -> StaticRouter:
    return StaticRouter(torch.arange(NUM_LAYERS - 2).float(), "test")


def learned_router(model: RoutedDecoder) -> LearnedRouter:
    """Random, with a weak prior: its paths change from token to token."""
    torch.manual_seed(1)
    decision = DecisionModule(2 * model.spec.kv_dim, NUM_LAYERS - 2)
    with torch.no_grad():
        decision.up.bias.zero_()
        decision.up.weight.mul_(3)
    return LearnedRouter(decision, torch.linspace(0, 1, NUM_LAYERS - 2), 0.1, "test")


@pytest.mark.parametrize("native", [None, "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_full_depth_logits_and_greedy_tokens_equal_transformers(
    name: str, native: WeightKind | None, tmp_path: Path
) -> None:
    theirs = save_random_model(name, tmp_path)
    ours = load_model(tmp_path, torch.float32, CPU).model
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = theirs(tokens).logits
        assert_close(ours.lm_head(ours.dense(tokens)), expected, WIDTH, NUM_LAYERS)

    prompt = tokens[:, :40]
    generated = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    sparse = SparseDecode(ours, full_depth(), generated, [NUM_LAYERS] * 2, native)
    for start, end in segment_bounds(40, 51, route_block=16):
        logits, _ = sparse.step([(0, start, end), (1, start, end)])
        if end >= 40:
            assert logits.argmax(-1).tolist() == generated[:, end].tolist()


@pytest.mark.parametrize("native", [None, "float32"])
@pytest.mark.parametrize("budget_layers", [3, 4])
@pytest.mark.parametrize("step_sizes", [[1], [3], [2, 1, 5]])
@pytest.mark.parametrize(("num_sequences", "end_to_end"), [(1, False), (3, False), (3, True)])
def test_masked_dense_training_forward_equals_sparse_decode(
    budget_layers: int,
    step_sizes: list[int],
    num_sequences: int,
    end_to_end: bool,
    native: WeightKind | None,
    tmp_path: Path,
) -> None:
    model = load_tiny("llama", tmp_path)
    router = learned_router(model)
    num_prompt, num_tokens, route_block = 37, 60, 16
    tokens = torch.randint(0, SHAPE["vocab_size"], (num_sequences, num_tokens))
    begins = (torch.arange(num_tokens) == 0).expand_as(tokens)
    in_answer = (torch.arange(num_tokens) >= num_prompt).expand_as(tokens)
    rows, begins, in_answer = (x.reshape(1 if end_to_end else num_sequences, -1) for x in (tokens, begins, in_answer))
    choose = routed_paths(
        router, model.spec.actions, begins, in_answer, torch.full(rows.shape, MILLI_LAYERS * budget_layers), route_block
    )
    masks = torch.empty(0)

    def noted(v: Tensor) -> Tensor:
        nonlocal masks
        masks = choose(v).round()[..., 0]
        return masks[..., None]

    with torch.inference_mode():
        starts = conversation_starts(begins) if end_to_end else None
        dense = model.lm_head(model.dense(rows, noted, starts=starts)).view(num_sequences, num_tokens, -1)
    masks = masks.view(num_sequences, num_tokens, -1)

    sparse = SparseDecode(model, router, tokens, [budget_layers] * num_sequences, native)
    seen_paths = set()
    for step in grouped(segment_bounds(num_prompt, num_tokens, route_block), step_sizes):
        spans = [(sequence, start, end) for sequence in range(num_sequences) for start, end in step]
        logits, ran = sparse.step(spans)
        for (sequence, _, end), row_logits, path in zip(spans, logits, ran, strict=True):
            assert_close(row_logits, dense[sequence, end - 1], WIDTH, NUM_LAYERS)
            assert path.tolist() == masks[sequence, end - 1].tolist()
            assert int(path.sum()) == budget_layers
            seen_paths.add(tuple(path.tolist()))
    assert len(seen_paths) > 1, "the router never changed its path: the test shows nothing"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tolerance_notices_a_skipped_layer_a_wrong_mask_and_a_lost_token(name: str, tmp_path: Path) -> None:
    model = load_tiny(name, tmp_path)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, WIDTH), generator=torch.Generator().manual_seed(2))
    right = torch.ones(2, WIDTH, NUM_LAYERS)
    right[:, :, 2] = 0

    def last_logits(masks: Tensor, first: int = 0) -> Tensor:
        with torch.inference_mode():
            return model.lm_head(model.dense(tokens[:, first:], lambda _: masks[:, first:, :, None])[:, -1])

    want = last_logits(right)
    skipped, wrong, wrong_before = right.clone(), right.clone(), right.clone()
    skipped[:, -1, 3] = 0
    wrong[:, -1] = right[:, -1].flip(-1)
    wrong_before[:, -2] = right[:, -2].flip(-1)
    for far in (last_logits(skipped), last_logits(wrong), last_logits(wrong_before), last_logits(right, first=1)):
        for sequence in range(2):
            assert_far(far[sequence], want[sequence], WIDTH, NUM_LAYERS)


@pytest.mark.parametrize(
    ("dtype", "native"),
    [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True), ("int8", True)],
)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: WeightKind, native: bool, tmp_path: Path) -> None:
    save_random_model("qwen2", tmp_path)
    model = load_model(tmp_path, torch.float32 if dtype == "float32" else torch.bfloat16, CPU).model
    router = learned_router(model)
    num_sequences = 21  # more than a tile of rows, and no multiple of one
    tokens = torch.randint(0, SHAPE["vocab_size"], (num_sequences, 44))
    budgets = [3, 4, 5, 6, 3, 6, 6] * 3
    together = SparseDecode(model, router, tokens, budgets, dtype if native else None)
    alone = SparseDecode(model, router, tokens, budgets, dtype if native else None)
    for start, end in segment_bounds(40, 44, route_block=16):
        logits, _ = together.step([(sequence, start, end) for sequence in range(num_sequences)])
        single, _ = alone.step([(2, start, end)])
        assert torch.equal(single[0], logits[2])


def test_gradients_reach_the_router_and_leave_the_forward_exact(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path).requires_grad_(True)
    router = learned_router(model).requires_grad_(True)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 20))
    max_cost, actions = torch.full((2, 20), 4 * MILLI_LAYERS), model.spec.actions

    def soft(v: Tensor) -> Tensor:
        scores = router.scores(causal_features(v))
        return straight_through(scores, select_path(scores, max_cost, actions), actions)

    def hard(v: Tensor) -> Tensor:
        return action_shares(select_path(router.scores(causal_features(v)), max_cost, actions))

    hidden = model.dense(tokens, soft)
    assert torch.equal(hidden, model.dense(tokens, hard))
    hidden.square().mean().backward()
    assert router.decision.down.weight.grad is not None
    assert router.decision.down.weight.grad.abs().sum() > 0
