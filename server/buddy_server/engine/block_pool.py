"""KV cache blocks: who holds them, and which ones to keep when nobody holds them."""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, slots=True, eq=False)
class CachedPrefix:
    """Blocks that together hold a full route block, under the `key` of its content (prefix_keys.py). `sums` are the
    router's running features after it. The blocks are held, released and evicted together."""

    key: bytes
    blocks: tuple[int, ...]
    sums: "array[float]"


class BlockPool:
    """Hands out block numbers 0 .. num_blocks - 1 and counts the holders of each.

    A block without holders is free or, as part of a `CachedPrefix`, idle: its content stays until its room is needed.
    Idle prefixes are evicted in the order of their release. A block table releases its last blocks first, and a holder
    of cached blocks also holds those before them in the prompt. So a chain is evicted from its end, and what remains
    can still be found.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Blocks are taken from the end; reversed so that low numbers come first, which keeps tests readable.
        self._free = list(reversed(range(num_blocks)))
        self._num_holders = [0] * num_blocks
        self._num_held = 0
        self._cached: dict[bytes, CachedPrefix] = {}
        self._cached_by_block: dict[int, CachedPrefix] = {}
        self._idle: OrderedDict[CachedPrefix, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, idle ones included."""
        return self.num_blocks - self._num_held

    @property
    def num_idle(self) -> int:
        return self.num_free - len(self._free)

    @property
    def usage_ratio(self) -> float:
        return self._num_held / self.num_blocks

    def num_held_only_by(self, tables: list[list[int]]) -> int:
        """Blocks that nobody would hold if all `tables` were released."""
        counts = Counter(chain.from_iterable(tables))
        return sum(count == self._num_holders[block] for block, count in counts.items())

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` to hold `num_tokens`. Returns False and takes nothing if too few blocks are free."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        while missing > len(self._free):
            self._evict()
        taken = [self._free.pop() for _ in range(missing)]
        self._hold(taken)
        table.extend(taken)
        return True

    def trim(self, table: list[int], num_tokens: int) -> None:
        """Release the blocks of `table` beyond `num_tokens`."""
        num_blocks = self.blocks_for(num_tokens)
        self._let_go(table[num_blocks:])
        del table[num_blocks:]

    def release(self, table: list[int]) -> None:
        """Release every block of `table` and empty it."""
        self._let_go(table)
        table.clear()

    def find(self, key: bytes) -> CachedPrefix | None:
        return self._cached.get(key)

    def cache(self, key: bytes, blocks: Sequence[int], sums: "array[float]") -> None:
        """Cache `blocks`, which must have a holder, under the new key `key`."""
        assert key not in self._cached, "cached twice"
        cached = CachedPrefix(key, tuple(blocks), sums)
        self._cached[key] = cached
        self._cached_by_block.update(dict.fromkeys(cached.blocks, cached))

    def share(self, cached: CachedPrefix, table: list[int], start: int) -> None:
        """Put `cached` into `table` at index `start`: at its end, or in place of blocks it already has."""
        replaced = table[start : start + len(cached.blocks)]
        self._hold(cached.blocks)
        self._idle.pop(cached, None)
        table[start : start + len(cached.blocks)] = cached.blocks
        self._let_go(replaced)

    def check(self, tables: list[list[int]]) -> None:
        """The integrity check: free, idle and held blocks are all blocks, each exactly once, and `tables` are the
        holders."""
        num_holders = Counter(chain.from_iterable(tables))
        wrong = [block for block, count in enumerate(self._num_holders) if count != num_holders[block]]
        assert not wrong, f"blocks lost or held twice: {wrong} of {self.num_blocks}"
        idle = chain.from_iterable(cached.blocks for cached in self._idle)
        seen = sorted([*self._free, *idle, *num_holders])
        assert seen == list(range(self.num_blocks)), f"blocks lost or held twice: {seen} of {self.num_blocks}"
        assert self._num_held == len(num_holders), f"{self._num_held} blocks held, {len(num_holders)} in tables"
        cached_blocks = sorted(chain.from_iterable(cached.blocks for cached in self._cached.values()))
        assert cached_blocks == sorted(self._cached_by_block), "blocks cached twice, or under no key"

    def _hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._num_held += self._num_holders[block] == 0
            self._num_holders[block] += 1

    def _let_go(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            self._num_held -= 1
            cached = self._cached_by_block.get(block)
            if cached is None:
                self._free.append(block)
            elif block == cached.blocks[0]:
                self._idle[cached] = None

    def _evict(self) -> None:
        cached, _ = self._idle.popitem(last=False)
        del self._cached[cached.key]
        for block in reversed(cached.blocks):
            del self._cached_by_block[block]
            self._free.append(block)
