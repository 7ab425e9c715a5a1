"""Blocks are free or borrowed by one sequence, never both, never lost."""

import pytest

from buddy_server.engine.block_pool import BlockPool


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (63, 16), (257, 65)])
def test_tokens_take_whole_blocks(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(8, 4).blocks_for(num_tokens) == num_blocks


def test_table_grows_only_by_what_it_lacks() -> None:
    pool = BlockPool(8, 4)
    table: list[int] = []
    assert pool.grow(table, 5)
    assert table == [0, 1]
    assert pool.grow(table, 8)
    assert table == [0, 1]
    assert pool.grow(table, 9)
    assert table == [0, 1, 2]
    assert (pool.num_free, pool.usage_ratio) == (5, 3 / 8)


def test_growing_beyond_the_free_blocks_takes_none() -> None:
    pool = BlockPool(3, 4)
    first: list[int] = []
    second: list[int] = []
    assert pool.grow(first, 8)
    assert not pool.grow(second, 5)
    assert (second, pool.num_free) == ([], 1)
    assert pool.grow(second, 4)
    assert not pool.grow(second, 5)
    assert second == [2]
    pool.check([first, second])


def test_released_blocks_can_be_borrowed_again() -> None:
    pool = BlockPool(3, 4)
    table: list[int] = []
    assert pool.grow(table, 12)
    pool.release(table)
    assert (table, pool.num_free, pool.usage_ratio) == ([], 3, 0.0)
    assert pool.grow(table, 12)
    assert sorted(table) == [0, 1, 2]


def test_check_finds_a_lost_block_and_one_held_twice() -> None:
    pool = BlockPool(4, 4)
    table: list[int] = []
    assert pool.grow(table, 8)
    pool.check([table])
    with pytest.raises(AssertionError, match="lost or held twice"):
        pool.check([])
    with pytest.raises(AssertionError, match="lost or held twice"):
        pool.check([table, table[:1]])
