"""Every block is free, held, or idle with something worth keeping; never two of these, never lost."""

from array import array

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


SUMS = array("d")


def kept_chain(pool: BlockPool, *keys: bytes) -> list[int]:
    """A table of two blocks a key, cached in that order."""
    table: list[int] = []
    assert pool.grow(table, 2 * len(keys) * pool.block_size)
    for index, key in enumerate(keys):
        pool.cache(key, table[2 * index : 2 * index + 2], SUMS)
    return table


def found(pool: BlockPool, *keys: bytes) -> list[bool]:
    return [pool.find(key) is not None for key in keys]


def test_kept_blocks_are_idle_when_nobody_holds_them_and_do_not_count_as_used() -> None:
    pool = BlockPool(8, 4)
    table = kept_chain(pool, b"a", b"b")
    assert (pool.num_free, pool.num_idle, pool.usage_ratio) == (4, 0, 0.5)
    pool.check([table])
    pool.release(table)
    assert (pool.num_free, pool.num_idle, pool.usage_ratio) == (8, 4, 0.0)
    assert found(pool, b"a", b"b") == [True, True]
    pool.check([])


def test_shared_blocks_stay_held_until_the_last_holder_lets_go() -> None:
    pool = BlockPool(8, 4)
    first = kept_chain(pool, b"a")
    cached = pool.find(b"a")
    assert cached is not None
    second: list[int] = []
    pool.share(cached, second, 0)
    assert second == first
    assert pool.grow(second, 12)
    pool.check([first, second])
    pool.release(first)
    assert (pool.num_idle, pool.num_free) == (0, 5)
    pool.check([second])
    pool.release(second)
    assert (pool.num_idle, pool.num_free) == (2, 8)


def test_sharing_in_place_of_own_blocks_gives_those_back() -> None:
    pool = BlockPool(8, 4)
    quicker = kept_chain(pool, b"a")
    table: list[int] = []
    assert pool.grow(table, 12)
    own, last = table[:2], table[2]
    cached = pool.find(b"a")
    assert cached is not None
    pool.share(cached, table, 0)
    assert table == [*quicker, last]
    assert pool.num_free == 5
    pool.check([quicker, table])
    other: list[int] = []
    assert pool.grow(other, 20)
    assert set(own) <= set(other)


def test_free_blocks_are_taken_before_idle_ones() -> None:
    pool = BlockPool(6, 4)
    pool.release(kept_chain(pool, b"a"))
    table: list[int] = []
    assert pool.grow(table, 16)
    assert found(pool, b"a") == [True]
    assert pool.grow(table, 17)
    assert found(pool, b"a") == [False]
    pool.check([table])


def test_longest_unused_goes_first_and_of_a_chain_the_end() -> None:
    pool = BlockPool(8, 4)
    pool.release(kept_chain(pool, b"a", b"b"))
    pool.release(kept_chain(pool, b"x", b"y"))
    again: list[int] = []
    cached = pool.find(b"a")
    assert cached is not None
    pool.share(cached, again, 0)
    pool.release(again)
    order = []
    table: list[int] = []
    for num_tokens in (8, 16, 24, 32):
        assert pool.grow(table, num_tokens)
        order.append(found(pool, b"a", b"b", b"x", b"y"))
        pool.check([table])
    assert order == [
        [True, False, True, True],
        [True, False, True, False],
        [True, False, False, False],
        [False, False, False, False],
    ]


def test_block_that_others_hold_too_is_not_free_without_a_table() -> None:
    pool = BlockPool(8, 4)
    first, second = kept_chain(pool, b"a"), list[int]()
    cached = pool.find(b"a")
    assert cached is not None
    pool.share(cached, second, 0)
    assert pool.grow(second, 16)
    num_shared = len(cached.blocks)
    assert pool.num_held_only_by([]) == pool.num_held_only_by([first]) == 0
    assert pool.num_held_only_by([second]) == 4 - num_shared
    assert pool.num_held_only_by([first, second]) == 4


def test_held_blocks_are_never_evicted() -> None:
    pool = BlockPool(4, 4)
    held = kept_chain(pool, b"a")
    table: list[int] = []
    assert not pool.grow(table, 12)
    assert pool.grow(table, 8)
    assert found(pool, b"a") == [True]
    pool.check([held, table])


def test_check_counts_the_holders_of_a_shared_block() -> None:
    pool = BlockPool(4, 4)
    table = kept_chain(pool, b"a")
    with pytest.raises(AssertionError, match="held twice"):
        pool.check([table, table])
