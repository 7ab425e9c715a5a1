"""The server's running features equal training's, however the tokens were cut into steps."""

import itertools

import pytest
import torch
from torch import Tensor

from buddy_kernels import PathAction
from buddy_routing.features import RunningFeatures, causal_features, feature_dim
from buddy_routing.segments import SegmentBatch

GROUPS, HEAD_DIM = 2, 3
KV_DIM = GROUPS * HEAD_DIM
NUM_TOKENS = 12


def batch_of(spans: list[tuple[int, int, int]]) -> SegmentBatch:
    """A step of (lane, start, end) segments; what features do not look at is empty."""
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
    nothing = torch.empty(0, dtype=torch.int64)
    return SegmentBatch(
        tokens=nothing,
        positions=positions,
        lengths=torch.tensor([end - start for _, start, end in spans]),
        host_lengths=[end - start for _, start, end in spans],
        block_tables=nothing,
        lanes=tuple(lane for lane, _, _ in spans),
        max_costs=(2000,) * len(spans),
        path_actions=(PathAction.CHOOSE,) * len(spans),
        wanted=nothing,
        ahead_tokens=nothing,
        aheads=torch.zeros(len(spans), dtype=torch.int64),
        aligned=range(len(spans)),
    )


def states(num_sequences: int = 1, num_tokens: int = NUM_TOKENS, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (num_sequences, num_tokens, GROUPS, HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_features_are_the_mean_so_far_beside_the_newest() -> None:
    v = states()
    features = causal_features(v)
    assert features.shape == (1, NUM_TOKENS, feature_dim(KV_DIM))
    for token in range(NUM_TOKENS):
        mean, newest = features[0, token].split(KV_DIM)
        torch.testing.assert_close(mean, v[0, : token + 1].flatten(1).mean(0))
        assert torch.equal(newest, v[0, token].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_features_equal_causal_ones_for_every_cut_into_segments(dtype: torch.dtype) -> None:
    v = states(num_tokens=8, dtype=dtype)
    expected = causal_features(v)[0]
    for inner in itertools.product([False, True], repeat=7):
        ends = [token + 1 for token in range(7) if inner[token]] + [8]
        running = RunningFeatures(1, KV_DIM, torch.device("cpu"))
        for start, end in itertools.pairwise([0, *ends]):
            assert torch.equal(running.update(batch_of([(0, start, end)]), v[0, start:end])[0][0], expected[end - 1])


def test_conversations_end_to_end_have_the_features_of_each_alone() -> None:
    v = states()
    starts = torch.tensor([[0] * 5 + [5] * 7])
    together = causal_features(v, starts)
    torch.testing.assert_close(together[:, :5], causal_features(v[:, :5]))
    torch.testing.assert_close(together[:, 5:], causal_features(v[:, 5:]))


def test_several_segments_of_several_lanes_in_one_step_do_not_mix() -> None:
    v = states(num_sequences=3)
    expected = causal_features(v)
    running = RunningFeatures(5, KV_DIM, torch.device("cpu"))
    lanes = {0: 4, 1: 0, 2: 2}  # sequence to lane
    steps = [
        [(0, 0, 5), (1, 0, 3), (1, 3, 6), (2, 0, 1)],
        [(2, 1, 2), (0, 5, 6)],
        [(1, 6, 7), (2, 2, 10), (2, 10, 12), (0, 6, 7)],
    ]
    for step in steps:
        rows = torch.cat([v[sequence, start:end] for sequence, start, end in step])
        features, _ = running.update(batch_of([(lanes[s], start, end) for s, start, end in step]), rows)
        for got, (sequence, _, end) in zip(features, step, strict=True):
            assert torch.equal(got, expected[sequence, end - 1])


def test_reset_forgets_the_lane_and_no_other() -> None:
    v = states(num_sequences=2)
    running = RunningFeatures(2, KV_DIM, torch.device("cpu"))
    running.update(batch_of([(0, 0, 5), (1, 0, 5)]), v[:, :5].flatten(0, 1))
    running.reset(0)
    features, _ = running.update(batch_of([(0, 0, 5), (1, 5, 6)]), torch.cat((v[1, :5], v[1, 5:6])))
    assert torch.equal(features, causal_features(v)[1, 4:6])


def test_state_does_not_grow_with_the_sequence() -> None:
    running = RunningFeatures(3, KV_DIM, torch.device("cpu"))

    def num_values() -> int:
        return sum(value.numel() for value in vars(running).values() if isinstance(value, Tensor))

    before = num_values()
    for token in range(50):
        running.update(batch_of([(1, token, token + 1)]), torch.randn(1, GROUPS, HEAD_DIM))
    assert num_values() == before == 3 * KV_DIM
