import pytest
import torch

from buddy_kernels import RUN
from buddy_kernels.gpu.row_lists import LayerLists, fill_layer_lists, fill_layer_lists_reference
from listed_rows import every_other, listed

POISON = -7


def poisoned_lists(num_rows, num_columns, device):
    lists = LayerLists.empty(num_rows, num_columns, device)
    lists.indices.fill_(POISON)
    lists.counts.fill_(POISON)
    return lists


@pytest.mark.parametrize("num_rows", [1, 63, 257])
@pytest.mark.parametrize("live", [every_other, lambda n, device: listed(range(n), n, device)], ids=["some", "all"])
def test_lists_name_the_live_rows_of_each_action_in_order(num_rows, live, device):
    torch.manual_seed(num_rows)
    paths = torch.randint(0, 3, (num_rows, 5), dtype=torch.int8, device=device)
    got, want = (poisoned_lists(num_rows, 5, device) for _ in range(2))
    fill_layer_lists(paths, live(num_rows, device), got)
    fill_layer_lists_reference(paths, live(num_rows, device), want)
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.indices, want.indices)


def test_a_column_has_its_running_whole_and_small_rows(device):
    paths = torch.tensor([[1, 2], [1, 0], [1, 1]], dtype=torch.int8, device=device)
    lists = poisoned_lists(3, 2, device)
    fill_layer_lists(paths, listed(range(3), 3, device), lists)
    assert lists.running(0).listed().tolist() == lists.whole(0).listed().tolist() == [0, 1, 2]
    assert lists.small(0).listed().tolist() == []
    assert lists.running(1).listed().tolist() == [0, 2]
    assert lists.whole(1).listed().tolist() == [2]
    assert lists.small(1).listed().tolist() == [0]


def test_without_live_rows_every_list_is_empty(device):
    lists = poisoned_lists(3, 2, device)
    fill_layer_lists(torch.full((3, 2), RUN, dtype=torch.int8, device=device), listed([], 3, device), lists)
    assert not lists.counts.any()
    assert (lists.indices == POISON).all()


def test_paths_of_other_rows_or_dtypes_are_named(device):
    lists, live = LayerLists.empty(3, 2, device), listed(range(3), 3, device)
    with pytest.raises(ValueError, match=r"paths has shape \[4, 2\], allowed is \[3, 2\]"):
        fill_layer_lists(torch.zeros(4, 2, dtype=torch.int8, device=device), live, lists)
    with pytest.raises(ValueError, match=r"paths has dtype torch.int64, allowed is torch.int8"):
        fill_layer_lists(torch.zeros(3, 2, dtype=torch.int64, device=device), live, lists)
