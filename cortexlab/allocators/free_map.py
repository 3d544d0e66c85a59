"""Which blocks are free, for allocators that do not know their holes: one byte a block.

    blocks   . . . x  x . . .  . . x .        `x` used: holes of 3, 5 and 1 blocks

A mark is one slice assignment, at memset's speed. Holes are counted only for `stats`, in one NumPy
pass over the blocks up to the last used one: 5 us at 2,048 blocks, about 1 ms at a million.
"""

from collections.abc import Iterable

import numpy as np

from .base import Extent, Stats, pool_stats

FREE, USED = 0, 1
BYTE = (b"\0", b"\1")  # of a FREE and of a USED block


class FreeMap:
    """All blocks are free at first. `mark` does not check the state that blocks had before."""

    __slots__ = ("_blocks", "free_blocks", "num_blocks")

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks
        self._blocks = bytearray(num_blocks)

    def mark(self, extents: Iterable[Extent], state: int) -> None:
        """Make the blocks of ``extents``, all in the other state, ``FREE`` or ``USED``."""
        blocks, byte, marked = self._blocks, BYTE[state], 0
        for start, num_blocks in extents:
            marked += num_blocks
            if num_blocks == 1:  # most of what paging marks, in a third of a slice's time
                blocks[start] = state
            else:
                blocks[start : start + num_blocks] = byte * num_blocks
        self.free_blocks += marked if state == FREE else -marked

    def mark_one(self, block: int, state: int) -> None:
        """`mark` of a single block."""
        self._blocks[block] = state
        self.free_blocks += 1 if state == FREE else -1

    def holes(self) -> np.ndarray:
        """Sizes of the free runs, from left to right."""
        top = min(self._blocks.rfind(USED) + 2, self.num_blocks)  # all blocks from here on are free
        used = np.frombuffer(b"".join((BYTE[USED], self._blocks[:top], BYTE[USED])), bool)
        edges = np.flatnonzero(used[1:] != used[:-1])  # begin and end of each hole, in turn
        sizes = edges[1::2] - edges[::2]
        if top < self.num_blocks:
            sizes[-1] += self.num_blocks - top
        return sizes

    def stats(self) -> Stats:
        holes = self.holes()
        return pool_stats(self.num_blocks, self.free_blocks, int(holes.max(initial=0)), len(holes))

    def check(self, free: Iterable[tuple[int, int]]) -> None:
        """`AssertionError` unless exactly the runs ``free`` (first block, blocks) are free."""
        expected = bytearray(BYTE[USED]) * self.num_blocks
        for start, num_blocks in free:
            expected[start : start + num_blocks] = bytes(num_blocks)
        assert self._blocks == expected, "the map of free blocks is wrong"
        assert self.free_blocks == expected.count(FREE), "free blocks are counted wrongly"
        runs = [len(run) for run in expected.split(BYTE[USED]) if run]
        assert self.holes().tolist() == runs, "holes are counted wrongly"
