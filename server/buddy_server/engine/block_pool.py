"""The free list of KV cache blocks."""


class BlockPool:
    """Hands out block numbers 0 .. num_blocks - 1; every block is free or borrowed by one sequence."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Taken from the end; reversed so that low numbers go first, which keeps tests readable.
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage_ratio(self) -> float:
        return 1.0 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` to hold `num_tokens`; False, and nothing taken, when too few blocks are free."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > len(self._free):
            return False
        table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, table: list[int]) -> None:
        """Take every block of `table` back and empty it."""
        self._free.extend(reversed(table))
        table.clear()

    def check(self, tables: list[list[int]]) -> None:
        """The integrity check: free and borrowed blocks are all blocks, each once."""
        held = sorted([*self._free, *(block for table in tables for block in table)])
        assert held == list(range(self.num_blocks)), f"blocks lost or held twice: {held} of {self.num_blocks}"
