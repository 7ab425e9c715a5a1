"""The native step against plain torch beyond what test_decoder.py holds together."""

import gc
import os
import random
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from buddy_kernels import (
    GREEDY,
    PathAction,
    RoutedOutput,
    RoutedStep,
    Sampling,
    StepRows,
    Wanted,
    WeightKind,
    draw,
)
from buddy_kernels.sampling import adjusted, with_logprobs
from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.features import causal_features
from buddy_routing.first_layer import FirstLayer
from buddy_routing.model_spec import ModelSpec
from buddy_routing.planner import PathPlanner
from buddy_routing.router import DecisionModule, LearnedRouter, PromptSetRouter, Router, StaticRouter
from buddy_routing.selection import select_path
from buddy_routing.stepper import decoder_weights, router_weights
from fakes.fixed_mask import FixedMask
from sparse_decode import NATIVE, SparseDecode, segment_bounds
from tiny_models import CONFIGS, SHAPE, save_random_model
from tolerances import assert_close, assert_near

NUM_LAYERS = SHAPE["num_hidden_layers"]
WIDTH = 60
"""The longest sum is over the tokens of a sequence. What this tolerance notices is in test_decoder.py."""


def load_tiny(name: str, directory: Path) -> RoutedDecoder:
    save_random_model(name, directory)
    return load_model(directory, torch.float32, torch.device("cpu")).model


def prompt_sets(model: RoutedDecoder) -> PromptSetRouter:
    torch.manual_seed(2)
    rankings, weight = torch.rand(3, NUM_LAYERS - 2), torch.randn(3, 2 * model.spec.kv_dim)
    return PromptSetRouter(rankings, weight, torch.zeros(3), "sets")


def random_router(model: RoutedDecoder) -> LearnedRouter:
    torch.manual_seed(3)
    decision = DecisionModule(2 * model.spec.kv_dim, NUM_LAYERS - 2)
    with torch.no_grad():
        decision.down.weight.mul_(10)
        decision.up.bias.zero_()
    return LearnedRouter(decision, torch.zeros(NUM_LAYERS - 2), 0.0, "random")


def some_tokens(num_sequences: int, num_tokens: int) -> Tensor:
    return torch.randint(
        1, SHAPE["vocab_size"], (num_sequences, num_tokens), generator=torch.Generator().manual_seed(4)
    )


def ties(_: RoutedDecoder | None) -> StaticRouter:
    return StaticRouter(torch.tensor([0.5, 0.7, 0.5, 0.5]), "ties")


def run_both(
    model: RoutedDecoder, router: Router, native: WeightKind, arithmetic: str | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [steps, S, V] in plain torch fp32 and of the native step; their paths are the same."""
    tokens = torch.randint(0, SHAPE["vocab_size"], (3, 60), generator=torch.Generator().manual_seed(3))
    runs = [SparseDecode(model, router, tokens, [4, 3, 6], kind, arithmetic) for kind in (None, native)]
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
    assert_close(native_logits, torch_logits, WIDTH, NUM_LAYERS)


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
    sparse.stepper.planner.start(0, 4 * MILLI_LAYERS, array("d", before.sums[2].tolist()))
    assert torch.equal(before.sums[2], lanes[0])
    again = sparse.run([(0, 32, 48), (0, 48, 50)])
    assert torch.equal(again.sums, after.sums)
    assert torch.equal(again.logits, after.logits)


def test_running_sums_of_the_native_step_are_those_of_plain_torch(tmp_path: Path) -> None:
    model = load_tiny("qwen3", tmp_path)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 40))
    ours, theirs = (SparseDecode(model, ties(model), tokens, [4], kind).run([(0, 0, 33)]) for kind in (None, "float32"))
    assert_close(theirs.sums.float(), ours.sums.float(), SHAPE["hidden_size"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
@pytest.mark.parametrize(("kind", "arithmetic"), [pair for pair in NATIVE if pair[0] != "float32"])
def test_rounded_weights_stay_near_fp32(name: str, kind: WeightKind, arithmetic: str, tmp_path: Path) -> None:
    model = load_tiny(name, tmp_path)
    exact, rounded = run_both(model, ties(model), kind, arithmetic)
    other_path, _ = run_both(model, StaticRouter(torch.tensor([0.5, 0.4, 0.6, 0.7]), "other"), kind, arithmetic)
    assert_near(rounded, exact, other_path, kind, NUM_LAYERS)


def test_an_error_of_the_router_comes_through_and_the_next_step_works(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)

    class Broken:
        router_id, reroute_every, is_broken = "broken", 1, True

        def scores(self, features: Tensor) -> Tensor:
            if self.is_broken:
                raise RuntimeError("no path today")
            return torch.zeros(len(features), NUM_LAYERS - 2)

    router = Broken()
    sparse = SparseDecode(model, router, torch.ones(1, 20, dtype=torch.int64), [4], "float32")
    with pytest.raises(RuntimeError, match="no path today"):
        sparse.step([(0, 0, 10)])
    router.is_broken = False
    assert sparse.step([(0, 0, 10)])[1].sum() == 4


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no processor affinity")
def test_pinned_threads_have_a_processor_each_and_only_where_all_are_theirs(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    allowed = os.sched_getaffinity(0)

    def pinned(num_threads: int) -> set[int]:
        """Where the thread that steps may run, on a thread of its own."""
        step = RoutedStep(decoder_weights(model), "float32", num_blocks=1, num_threads=num_threads)
        step.pin_threads()
        return os.sched_getaffinity(0)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pinned, len(allowed) + 1).result() == allowed
        assert pool.submit(pinned, len(allowed)).result() == {min(allowed)}
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize(("native", "arithmetic"), NATIVE)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_threads_do_not_show_in_the_result(
    name: str, native: WeightKind, arithmetic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny(name, tmp_path)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 30))
    logits = []
    for num_threads in (1, 2, 5):
        monkeypatch.setattr("sparse_decode.NUM_THREADS", num_threads)
        sparse = SparseDecode(model, ties(model), tokens, [4, 6], native, arithmetic)
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
    assert_close(native, exact, max(config.hidden_size, config.intermediate_size), NUM_LAYERS)
    _, int8 = run_both(model, ties(model), "int8")
    other_path, _ = run_both(model, StaticRouter(torch.tensor([0.5, 0.4, 0.6, 0.7]), "other"), "float32")
    assert_near(int8, exact, other_path, "int8", NUM_LAYERS)


@pytest.mark.parametrize(("native", "arithmetic"), NATIVE)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_token_has_the_same_bits_in_a_prompt_and_alone(
    name: str, native: WeightKind, arithmetic: str, tmp_path: Path
) -> None:
    model = load_tiny(name, tmp_path)
    tokens, num_run = some_tokens(2, 37), (NUM_LAYERS, NUM_LAYERS)
    prompt, alone = (SparseDecode(model, ties(model), tokens, num_run, native, arithmetic) for _ in range(2))
    for token in range(36):
        alone.step([(0, token, token + 1)])
    expected, _ = alone.step([(0, 36, 37)])
    logits, _ = prompt.step([(1, 0, 20), (0, 0, 37)])
    assert torch.equal(logits[1:], expected)


@pytest.mark.parametrize(("native", "arithmetic"), [(None, None), *NATIVE])
def test_a_prefill_block_run_in_pieces_is_the_block_run_at_once(
    native: WeightKind | None, arithmetic: str | None, tmp_path: Path
) -> None:
    model = load_tiny("qwen3", tmp_path)
    router, tokens = random_router(model), some_tokens(2, 40)

    def assert_same(got: Tensor, want: Tensor) -> None:
        """To the bit where the step is native."""
        assert torch.equal(got, want) if native else assert_close(got, want, WIDTH, NUM_LAYERS) is None

    whole, pieces = (SparseDecode(model, router, tokens, (4, 3), native, arithmetic) for _ in range(2))
    expected_logits, expected_masks = whole.step([(0, 0, 32), (1, 0, 32)])
    masks = [
        pieces.step([(0, 0, 5), (1, 0, 32)], block_ends=[32, 32])[1][0],
        pieces.step([(0, 5, 18)], path_actions=[PathAction.CONTINUE])[1][0],
    ]
    logits, last_masks = pieces.step([(0, 18, 32)], path_actions=[PathAction.CONTINUE])
    for mask in (*masks, last_masks[0]):
        assert torch.equal(mask, expected_masks[0])
    assert_same(logits[0], expected_logits[0])
    # The features go on as if the block had been one, too.
    for token in range(32, 40):
        expected_logits, expected_masks = whole.step([(0, token, token + 1)])
        logits, token_masks = pieces.step([(0, token, token + 1)])
        assert torch.equal(token_masks, expected_masks)
        assert_same(logits, expected_logits)


def test_steps_in_a_row_are_the_steps_one_by_one(tmp_path: Path) -> None:
    model = load_tiny("qwen3", tmp_path)
    router, tokens = random_router(model), some_tokens(2, 40)
    in_a_row, one_by_one = (SparseDecode(model, router, tokens.clone(), (4, 3), "float32") for _ in range(2))
    for decode in (in_a_row, one_by_one):
        decode.step([(0, 0, 20), (1, 0, 9)])
    output = in_a_row.run([(0, 20, 21), (1, 9, 10)], wanted=[{"max_tokens": 6}] * 2, most_s=60.0)
    for step in range(6):
        spans = [(0, 20 + step, 21 + step), (1, 9 + step, 10 + step)]
        logits, masks = one_by_one.step(spans)
        assert [row[step].token_id for row in output.tokens] == logits.argmax(-1).tolist()
        assert torch.equal(output.paths[step], masks)
        one_by_one.tokens[[0, 1], [21 + step, 10 + step]] = logits.argmax(-1)
    assert torch.equal(output.logits, logits)


def test_a_row_leaves_at_its_end_token_and_the_others_go_on_as_if_it_had_never_been(tmp_path: Path) -> None:
    model = load_tiny("qwen3", tmp_path)
    router, tokens = random_router(model), some_tokens(4, 40)
    spans = [(sequence, 0, 1) for sequence in range(4)]

    def run(sequences: Sequence[int], ends: Mapping[int, int], counts: Mapping[int, int]) -> RoutedOutput:
        decode = SparseDecode(model, router, tokens, (4, 3, 4, 4), "float32")
        wanted = [
            {"max_tokens": counts.get(sequence, 8), "end_tokens": [ends[sequence]] if sequence in ends else []}
            for sequence in sequences
        ]
        return decode.run([spans[sequence] for sequence in sequences], wanted=wanted, most_s=60.0)

    alone = [[token.token_id for token in run([sequence], {}, {}).tokens[0]] for sequence in range(4)]
    assert [len(answer) for answer in alone] == [8] * 4
    ends, counts = {1: alone[1][2]}, {2: 5}
    output = run(range(4), ends, counts)
    lengths = [8, alone[1].index(ends[1]) + 1, 5, 8]
    assert [[token.token_id for token in row] for row in output.tokens] == [
        answer[:length] for answer, length in zip(alone, lengths, strict=True)
    ]
    assert (output.paths.sum(-1) > 0).sum(0).tolist() == lengths, "who has left runs no layer"
    assert torch.equal(output.paths.sum(-1)[0], torch.tensor([4, 3, 4, 4]))


def test_those_aligned_with_a_row_that_leaves_follow_the_next(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    decode = SparseDecode(model, random_router(model), some_tokens(3, 40), (4, 4, 4), "float32")
    wanted = [{"max_tokens": count} for count in (2, 5, 5)]
    output = decode.run([(row, 0, 1) for row in range(3)], aligned=[0, 0, 0], wanted=wanted, most_s=60.0)
    assert torch.equal(output.paths[:, 1], output.paths[:, 2])
    assert torch.equal(output.paths[:2, 0], output.paths[:2, 1])
    assert not output.paths[2:, 0].any()


def test_steps_in_a_row_stop_when_the_time_is_over(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    decode = SparseDecode(model, random_router(model), some_tokens(1, 32), [4], "float32")
    assert len(decode.run([(0, 0, 1)], wanted=[{"max_tokens": 8}], most_s=0.0).paths) == 1


SAMPLINGS = (
    GREEDY,
    *(Sampling(temperature) for temperature in (0.01, 0.3, 1.0, 5.0, 1e-30, 5e-324)),
    *(Sampling(1.0, top_k=top_k) for top_k in (1, 2, 30, 97, 1000)),
    *(Sampling(0.5, top_p=top_p) for top_p in (0.0, 1e-12, 0.3, 0.9, 0.999)),
    *(Sampling(0.5, min_p=min_p) for min_p in (0.02, 0.5, 1.0)),
    Sampling(0.7, top_k=20, top_p=0.6, min_p=0.1),
    Sampling(0.7, top_p=0.6, min_p=0.3),
)


@pytest.mark.parametrize("is_flat", [False, True])
def test_tokens_are_drawn_as_by_the_reference(is_flat: bool, tmp_path: Path) -> None:
    model = load_tiny("qwen2", tmp_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(0 if is_flat else 30)
    num_rows = 30
    decode = SparseDecode(model, random_router(model), some_tokens(num_rows, 1), [4] * num_rows, "float32")
    numbers = random.Random(0)
    for sampling in SAMPLINGS:
        uniforms = [2**-53, 1 - 2**-53, *(numbers.random() for _ in range(num_rows - 2))]
        output = decode.run(
            [(row, 0, 1) for row in range(num_rows)],
            wanted=[{"sampling": sampling, "uniforms": [uniform]} for uniform in uniforms],
        )
        expected = [draw(row, sampling, uniform) for row, uniform in zip(output.logits, uniforms, strict=True)]
        assert [row[0].token_id for row in output.tokens] == expected, sampling


@pytest.mark.parametrize("native", [None, "float32"])
def test_each_row_and_step_has_its_own_sampling_and_number(native: WeightKind | None, tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    decode = SparseDecode(model, random_router(model), some_tokens(3, 32), [4] * 3, native)
    samplings = [Sampling(1.0), GREEDY, Sampling(1.0, top_k=5)]
    numbers = random.Random(0)
    num_steps = 1 if native is None else 6
    uniforms = [[numbers.random() for _ in range(num_steps)] for _ in samplings]
    wanted = [
        {"sampling": sampling, "uniforms": numbers, "max_tokens": num_steps}
        for sampling, numbers in zip(samplings, uniforms, strict=True)
    ]
    output = decode.run([(row, 0, 1) for row in range(3)], wanted=wanted, most_s=60.0)
    assert len(output.paths) == num_steps
    for row, sampling in enumerate(samplings):
        expected = draw(output.logits[row], sampling, uniforms[row][num_steps - 1])
        assert output.tokens[row][-1].token_id == expected


ADJUSTED = (
    {"sampling": Sampling(presence_penalty=1.5, frequency_penalty=0.5), "counts": {3: 2, 7: 1}},
    {"sampling": Sampling(bias={5: 100.0})},
    {"sampling": Sampling(1.0, bias={5: -100.0, 6: 3.0}), "uniforms": [0.7] * 6},
    {"sampling": Sampling(0.8, frequency_penalty=-2.0, top_p=0.9), "uniforms": [0.2] * 6},
    {"constraint": FixedMask([0, 0b1010, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])},
    {"num_likeliest": 5},
    {"num_likeliest": 0, "given": 11},
    {"sampling": Sampling(1.0), "uniforms": [0.5] * 6, "num_likeliest": SHAPE["vocab_size"]},
)


def test_penalties_bias_masks_and_log_probabilities_are_those_of_the_reference_in_every_step(tmp_path: Path) -> None:
    model = load_tiny("qwen3", tmp_path)
    router, tokens = random_router(model), some_tokens(len(ADJUSTED), 40)
    num_run = [4] * len(ADJUSTED)
    in_a_row = SparseDecode(model, router, tokens.clone(), num_run, "float32")
    wanted = [{"max_tokens": 6, **fields} for fields in ADJUSTED]
    output = in_a_row.run([(row, 0, 1) for row in range(len(ADJUSTED))], wanted=wanted, most_s=60.0)
    one_by_one = SparseDecode(model, router, tokens.clone(), num_run, "float32")
    counts = [Counter(fields.get("counts", {})) for fields in ADJUSTED]
    for step in range(6):
        logits, _ = one_by_one.step([(row, step, step + 1) for row in range(len(ADJUSTED))])
        for row, fields in enumerate(ADJUSTED):
            sampling, made = fields.get("sampling", GREEDY), output.tokens[row][step]
            allowed = fields["constraint"].allowed() if "constraint" in fields else None
            given = adjusted(logits[row], sampling, counts[row], allowed)
            uniform = fields.get("uniforms", [0.0])[0]
            assert made.token_id == fields.get("given", draw(given, sampling, uniform)), (row, step)
            counts[row][made.token_id] += 1
            one_by_one.tokens[row, step + 1] = made.token_id
            asked = fields.get("num_likeliest")
            if asked is None:
                assert made.logprob is None
                continue
            expected = with_logprobs(logits[row], made.token_id, asked)
            assert made.logprob == pytest.approx(expected.logprob, abs=1e-5)
            assert [token for token, _ in made.likeliest] == [token for token, _ in expected.likeliest]
            assert [x for _, x in made.likeliest] == pytest.approx([x for _, x in expected.likeliest], abs=1e-5)


@pytest.mark.parametrize("native", [None, "float32"])
def test_only_allowed_tokens_are_made_at_any_temperature(native: WeightKind | None, tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    decode = SparseDecode(model, random_router(model), some_tokens(3, 2), [4] * 3, native)
    constraint = FixedMask([0, 0, 0b100, 0, 0b1, 0, 0, 0, 0, 0, 0, 0, 0])
    samplings = [GREEDY, Sampling(5.0), Sampling(5.0, top_k=50, top_p=0.99)]
    for number in range(20):
        wanted = [{"sampling": how, "uniforms": [number / 20], "constraint": constraint} for how in samplings]
        output = decode.run([(row, 0, 1) for row in range(3)], wanted=wanted)
        assert {row[0].token_id for row in output.tokens} <= {18, 32}


class Ending(FixedMask):
    """Allows nothing after so many tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__([255] * 13)
        self._num_tokens = num_tokens

    def accept(self, token: int) -> None:
        super().accept(token)
        if len(self.accepted) == self._num_tokens:
            self._allowed[:] = bytes(13)


@pytest.mark.parametrize("native", [None, "float32"])
def test_constraint_is_told_every_token_and_ends_its_row_where_it_allows_no_more(
    native: WeightKind | None, tmp_path: Path
) -> None:
    model = load_tiny("llama", tmp_path)
    decode = SparseDecode(model, random_router(model), some_tokens(4, 32), [4] * 4, native)
    num_steps = 1 if native is None else 6
    constraints = [Ending(2), None, Ending(9), Ending(1)]
    wanted = [{"constraint": constraint, "max_tokens": num_steps} for constraint in constraints]
    output = decode.run([(row, 0, 1) for row in range(4)], wanted=wanted, most_s=60.0)
    assert [len(made) for made in output.tokens] == [min(2, num_steps), num_steps, num_steps, 1]
    for constraint, made in zip(constraints, output.tokens, strict=True):
        assert constraint is None or constraint.accepted == [token.token_id for token in made]


def test_step_keeps_no_constraint_alive(tmp_path: Path) -> None:
    decode = SparseDecode(load_tiny("llama", tmp_path), ties(None), some_tokens(1, 32), [4], "float32")
    constraint = FixedMask([255] * 13)
    kept = weakref.ref(constraint)
    gc.disable()
    try:
        decode.run([(0, 0, 1)], wanted=[{"constraint": constraint}])
        del constraint
        assert kept() is None
    finally:
        gc.enable()


def test_samplings_without_numbers_are_refused(tmp_path: Path) -> None:
    decode = SparseDecode(load_tiny("llama", tmp_path), ties(None), some_tokens(1, 32), [4], "float32")
    with pytest.raises(ValueError, match="uniforms of row 0 are 0, allowed is one for each of 1 tokens"):
        decode.run([(0, 0, 1)], wanted=[{"sampling": Sampling(1.0)}])
    with pytest.raises(ValueError, match="allowed has 3 bytes, allowed are 97 bits or more"):
        decode.run([(0, 0, 1)], wanted=[{"constraint": FixedMask(3)}])
    with pytest.raises(ValueError, match="a wanted row allows no token"):
        decode.run([(0, 0, 1)], wanted=[{"constraint": FixedMask(13)}])


def test_rows_go_on_by_themselves_only_where_each_is_a_segment(tmp_path: Path) -> None:
    decode = SparseDecode(load_tiny("llama", tmp_path), ties(None), some_tokens(1, 32), [4], "float32")
    with pytest.raises(ValueError, match="each is a segment and wanted"):
        decode.run([(0, 0, 2)], wanted=[{"max_tokens": 2}])


@pytest.mark.parametrize("native", [None, "float32"])
def test_aligned_segments_share_the_path_of_their_summed_scores(native: WeightKind | None, tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    router, tokens = random_router(model), some_tokens(4, 6)
    decode = SparseDecode(model, router, tokens, (4, 4, 4, 3), native)
    spans = [(sequence, 0, 6) for sequence in range(4)]
    with torch.inference_mode():
        scores = router.scores(causal_features(FirstLayer.of(model).v(tokens))[:, -1])
    _, masks = decode.step(spans, aligned=[0, 1, 0, 3])
    expected = select_path(torch.stack((scores[0] + scores[2], scores[1])), torch.tensor(4000), model.spec.actions)
    assert torch.equal(masks[[0, 2, 1]], expected[[0, 0, 1]])
    assert masks[3].sum() == 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"tokens": [SHAPE["vocab_size"]]}, "a token is not in the vocabulary"),
        ({"positions": [16]}, "a position is past its block table"),
        ({"tables": [[1]]}, "a block is not in the pool"),
        ({"lanes": [1]}, "a lane is unknown"),
        ({"max_costs": [1999]}, "a segment may cost less than the layers that always run"),
        ({"wanted": [Wanted(1)]}, "a wanted row is not in the step"),
        ({"wanted": [Wanted(0, max_tokens=0)]}, "a wanted row makes no token"),
        ({"wanted": [Wanted(0, given=SHAPE["vocab_size"])]}, "a token of a wanted row is not in the vocabulary"),
        ({"lengths": [2]}, "a segment is empty or too long"),
        ({"aligned": [1]}, "a segment is aligned with one that is later"),
        ({"aheads": [1]}, "a segment looks too far ahead"),
        ({"tokens": [0, 0]}, "the segments do not look ahead at all of the tokens"),
        ({"positions": [0, 1]}, "tokens are 1, allowed is one for each of 2 positions"),
        ({"tables": []}, "tables are 0, allowed is one for each of 1 lanes"),
    ],
)
def test_rows_that_name_what_does_not_exist_are_refused(wrong: dict[str, Any], told: str, tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    step = RoutedStep(decoder_weights(model), "float32", num_blocks=1, num_threads=1)
    right = StepRows([0], [0], [1], [[0]], [0], [3000], [PathAction.CHOOSE], [Wanted(0)], [0], [0])
    router = router_weights(PathPlanner(ties(None), model.spec, 1, torch.device("cpu")))
    assert router is not None
    assert step(right, router).paths.sum() == 3
    with pytest.raises(ValueError, match=told):
        step(replace(right, **wrong), router)
