"""What the roofline counts: the bytes of a step's weights and K/V, for the columns that any row runs."""

from dataclasses import replace
from math import comb
from types import SimpleNamespace

import pytest
import torch

from buddy_kernels.gpu.offline import ModelShape, step_launches
from buddy_kernels.gpu.roofline import CARD_SPEEDS, ROUTER_KERNELS, ColumnUse, column_uses, predict

SHAPE = ModelShape("small", 6, 256, 4, 2, 64, 512, 1000, has_qkv_bias=True)
CONTEXT, CARD = 100, CARD_SPEEDS[1]
ITEM_BYTES = 2
KV_WEIGHTS = 2 * (256 * 128 + 128)
LAYER_WEIGHTS = 256 * 256 + 256 + KV_WEIGHTS + 256 * 256 + 3 * 256 * 512
HEAD_WEIGHTS = 1000 * 256
KV_NUMBERS = CONTEXT * 2 * 128


def predicted(num_rows, uses, card=CARD, context=CONTEXT):
    launches = step_launches(SHAPE, torch.bfloat16, num_rows, card.capability)
    return predict(launches, uses, context, card)


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("depth", [2, 4, 6])
def test_weights_of_layers_that_run_are_read_once_and_of_the_others_those_of_keys_and_values(num_rows, depth):
    made = predicted(num_rows, column_uses(6, [depth] * num_rows, aligned=True))
    skipped = 6 - depth
    weights = depth * LAYER_WEIGHTS + skipped * KV_WEIGHTS + HEAD_WEIGHTS
    assert made.needed_bytes == pytest.approx(ITEM_BYTES * (weights + depth * num_rows * KV_NUMBERS))
    assert made.memory_bytes > made.needed_bytes


def test_prediction_is_the_same_in_inference_mode():
    uses = column_uses(6, [3], aligned=True)
    with torch.inference_mode():
        inside = predicted(1, uses)
    assert inside == predicted(1, uses)


def test_rows_with_paths_of_their_own_run_more_columns_together_than_rows_that_share_one():
    own, aligned = (column_uses(6, [4] * 3, is_aligned) for is_aligned in (False, True))
    assert aligned[1] == ColumnUse(0.5, 3.0)
    assert own[1].chance == pytest.approx(1 - 0.5**3)
    # Of rows that each run it or not, how many do where any does.
    mean = sum(count * comb(3, count) * 0.5**3 for count in range(4))
    assert own[1].num_rows == pytest.approx(mean / own[1].chance)
    assert own[0] == own[-1] == ColumnUse(1.0, 3.0)
    assert column_uses(6, [2, 2], aligned=False)[1] == ColumnUse(0.0, 0.0)
    assert column_uses(6, [6, 2], aligned=True)[1] == ColumnUse(1.0, 1.0)


def test_less_depth_a_shorter_context_and_a_faster_card_take_less_time():
    full = predicted(1, column_uses(6, [6], True))
    assert predicted(1, column_uses(6, [3], True)).seconds < full.seconds
    assert predicted(1, column_uses(6, [6], True), context=10).seconds < full.seconds
    assert predicted(1, column_uses(6, [6], True), replace(CARD, launch_s=0.0)).seconds == pytest.approx(
        full.seconds - full.num_launches * CARD.launch_s
    )


def test_every_launch_has_its_time_and_the_router_its_part():
    made = predicted(8, column_uses(6, [4] * 8, False))
    assert sum(made.seconds_of.values()) == pytest.approx(made.seconds)
    assert set(ROUTER_KERNELS) < set(made.seconds_of)
    assert made.router_s == pytest.approx(sum(made.seconds_of[name] for name in ROUTER_KERNELS))
    assert made.seconds > made.num_launches * CARD.launch_s


def test_kernel_without_a_prediction_is_named():
    unknown = SimpleNamespace(__name__="_unknown_kernel", arg_names=[])
    launches = step_launches(SHAPE, torch.bfloat16, 1, CARD.capability)
    launches.append(replace(launches[-1], kernel=unknown))
    with pytest.raises(ValueError, match="kernel _unknown_kernel has no prediction"):
        predict(launches, column_uses(6, [6], True), CONTEXT, CARD)
