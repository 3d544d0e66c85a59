"""Paging: any free block serves, so nothing is ever too fragmented; what it costs is the number of extents a sequence ends up in."""

from collections.abc import Iterable

from ..errors import BadInput, at_least
from .base import Extent, Stats, merged, pool_stats


class Paged:
    """A stack of free blocks, the last one freed handed out first, as vLLM's and TensorRT-LLM's block pools do. O(blocks moved).

    Blocks that happen to follow each other are reported as one extent: attention then reads them in one piece.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self._free = list(range(num_blocks))[::-1]
        self._used = bytearray(num_blocks)

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if at_least("num_blocks", num_blocks, 1) > len(self._free):
            return None
        blocks = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        for block in blocks:
            self._used[block] = 1
        return merged(Extent(block, 1) for block in blocks)

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Chain any free blocks behind ``extents``; they join the last one only when they happen to follow it."""
        self._checked(extents)
        more = self.allocate(num_blocks)
        return None if more is None else merged((*extents, *more))

    def free(self, extents: Iterable[Extent]) -> None:
        for block in reversed(self._checked(extents)):
            self._used[block] = 0
            self._free.append(block)

    def stats(self) -> Stats:
        """O(pool): the runs of free blocks are counted by splitting the map at the used ones."""
        runs = [len(run) for run in bytes(self._used).split(b"\1") if run]
        return pool_stats(self.num_blocks, len(self._free), max(runs, default=0), len(runs))

    def check(self) -> None:
        assert len(set(self._free)) == len(self._free), "a block stands twice in the free list"
        assert sorted(self._free) == [block for block, used in enumerate(self._used) if not used], "a block is lost or held twice"

    def _checked(self, extents: Iterable[Extent]) -> list[int]:
        blocks = [block for extent in extents for block in range(extent.start, extent.end)]
        for block in blocks:
            if block >= self.num_blocks or not self._used[block]:
                raise BadInput(f"block {block} is not in use: freed twice, or not of this pool of {self.num_blocks}")
        if len(set(blocks)) != len(blocks) or not blocks:
            raise BadInput(f"extents must be given, and must not overlap: {tuple(extents)}")
        return blocks
