from dataclasses import fields, replace

import pytest
import torch

from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.gpu.row_state import MAX_END_TOKENS, MAX_STEPS, RowState
from buddy_kernels.gpu.row_steps import begin_step, begin_step_reference, end_step, end_step_reference

NUM_ROWS, VOCAB, POSITIONS = 9, 50, 40


def random_state(num_columns, device):
    """Rows 0, 2, 3, 5 and 8 are live; of the others nothing may be looked up."""
    state = RowState.empty(NUM_ROWS, 3, num_columns, device)
    state.ints[0] = torch.randint(0, VOCAB, (NUM_ROWS,))
    state.ints[1] = torch.randint(0, POSITIONS, (NUM_ROWS,))
    state.ints[5] = torch.randint(1, 3, (NUM_ROWS,))
    state.ints[:, [1, 4, 6, 7]] = 10**6
    state.reals[:] = torch.rand(state.reals.shape, dtype=torch.float64)
    state.end_tokens[:] = torch.randint(0, VOCAB, (NUM_ROWS, MAX_END_TOKENS))
    state.live.indices[:] = torch.tensor([0, 2, 3, 5, 8, 77, 77, 77, 77])
    state.live.count.fill_(5)
    state.step.fill_(3)
    state.made.fill_(-1)
    return state


def copied(state):
    copies = {
        field.name: getattr(state, field.name).clone() for field in fields(RowState) if field.name not in ("live",)
    }
    return replace(state, **copies, live=RowList(state.live.indices.clone(), state.live.count.clone()))


def same(one, other):
    """All that is to be read of two states."""
    count = int(one.live.count)
    assert count == int(other.live.count)
    assert torch.equal(one.live.indices[:count], other.live.indices[:count])
    for field in fields(RowState):
        if field.name != "live":
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize(("width", "head_dim"), [(1, 2), (63, 10), (257, 64)])
def test_step_begins_with_embedding_rotation_and_number_of_each_live_row(width, head_dim, device):
    torch.manual_seed(0)
    state = random_state(5, device)
    embeddings = torch.randn(VOCAB, width, dtype=torch.bfloat16, device=device)
    cos_table, sin_table = torch.randn(2, POSITIONS, head_dim // 2, device=device).unbind(0)

    def buffers():
        h = torch.full((NUM_ROWS, width), torch.nan, dtype=torch.bfloat16, device=device)
        return h, *torch.full((2, NUM_ROWS, head_dim // 2), torch.nan, device=device).unbind(0)

    wanted_state, wanted, made = copied(state), buffers(), buffers()
    begin_step_reference(wanted_state, embeddings, cos_table, sin_table, *wanted)
    begin_step(state, embeddings, cos_table, sin_table, *made)
    same(state, wanted_state)
    for one, other in zip(made, wanted, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert torch.equal(state.uniform[[0, 2]], state.uniforms[3, [0, 2]])


@pytest.mark.parametrize("num_columns", [1, 6, 33])
def test_step_ends_with_tokens_written_down_and_rows_that_end_left_out(num_columns, device):
    torch.manual_seed(0)
    state = random_state(num_columns, device)
    for step in range(3, 6):
        drawn = torch.randint(0, VOCAB, (NUM_ROWS,), device=device)
        # One ends by its last end token, and one by none that is beyond its own.
        drawn[2] = state.end_tokens[2, -1] if step == 3 else VOCAB
        paths = torch.randint(0, 3, (NUM_ROWS, num_columns), dtype=torch.int8, device=device)
        wanted = copied(state)
        end_step_reference(wanted, drawn, paths)
        end_step(state, drawn, paths)
        same(state, wanted)
        assert int(state.step) == step + 1
    assert int(state.live.count) == 0
    assert (state.made[4:, 2] == -1).all()


def test_step_without_live_rows_changes_nothing_but_its_number(device):
    state = random_state(4, device)
    state.live.count.zero_()
    before = copied(state)
    end_step(state, torch.zeros(NUM_ROWS, dtype=torch.int64, device=device), torch.ones_like(state.ran_paths[0]))
    before.step.add_(1)
    same(state, before)


def test_first_rows_share_memory_and_keep_the_strides_of_a_call(device):
    state = random_state(4, device)
    first = state.first(3)
    assert (first.tokens.shape, first.made.shape) == ((3,), (MAX_STEPS, 3))
    first.live.indices[:3] = torch.tensor([0, 1, 2])
    first.live.count.fill_(3)
    end_step(first, torch.arange(3, device=device), torch.ones(3, 4, dtype=torch.int8, device=device))
    assert state.made[3].tolist() == [0, 1, 2, *[-1] * 6]
    assert state.tokens[:3].tolist() == [0, 1, 2]
    assert state.ran_paths[3, :4].sum(-1).tolist() == [4, 4, 4, 0]
