"""Paging: any free block serves, so nothing is ever too fragmented; what it costs is the number of extents a sequence ends up in."""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby

from ..errors import BadInput, at_least
from .base import Extent, Stats, merged, pool_stats


class Paged:
    """A stack of free blocks, the last one freed handed out first, as vLLM's and TensorRT-LLM's block pools do. O(blocks moved).

    Blocks that happen to follow each other are reported as one extent: attention then reads them in one piece.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self._free = list(range(num_blocks))[::-1]
        self._owner: list[int | None] = [None] * num_blocks  # block -> allocation
        self._sizes: dict[int, int] = {}  # allocation -> its blocks
        self._next = 0

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        owner = self._next
        extents = self._take(num_blocks, owner)
        if extents is not None:
            self._next += 1
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Chain any free blocks behind ``extents``; they join the last one only when they happen to follow it."""
        owner, *others = self._owners(self._checked(extents))
        if others:
            raise BadInput(f"{extents} is not one allocation, but {len(others) + 1}")
        more = self._take(num_blocks, owner)
        return None if more is None else merged((*extents, *more))

    def free(self, extents: Iterable[Extent]) -> None:
        blocks = self._checked(extents)
        for owner in self._owners(blocks):
            del self._sizes[owner]
        for block in reversed(blocks):
            self._owner[block] = None
            self._free.append(block)

    def stats(self) -> Stats:
        """O(pool): the runs of free blocks are counted along the map."""
        runs = [sum(1 for _ in run) for free, run in groupby(self._owner, lambda owner: owner is None) if free]
        return pool_stats(self.num_blocks, len(self._free), max(runs, default=0), len(runs))

    def check(self) -> None:
        assert len(set(self._free)) == len(self._free), "a block stands twice in the free list"
        assert sorted(self._free) == [b for b, owner in enumerate(self._owner) if owner is None], "a block is lost or held twice"
        assert self._owners(b for b, owner in enumerate(self._owner) if owner is not None) == self._sizes

    def _take(self, num_blocks: int, owner: int) -> tuple[Extent, ...] | None:
        if at_least("num_blocks", num_blocks, 1) > len(self._free):
            return None
        blocks = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        for block in blocks:
            self._owner[block] = owner
        self._sizes[owner] = self._sizes.get(owner, 0) + num_blocks
        return merged(Extent(block, 1) for block in blocks)

    def _owners(self, blocks: Iterable[int]) -> Counter:
        return Counter(self._owner[block] for block in blocks)

    def _checked(self, extents: Iterable[Extent]) -> list[int]:
        """The blocks of ``extents``, which must be allocations handed out, each of them whole."""
        extents = tuple(extents)
        blocks = [block for extent in extents for block in range(extent.start, extent.end)]
        if not blocks or max(blocks) >= self.num_blocks:
            raise BadInput(f"extents must be given, and lie in this pool of {self.num_blocks} blocks, not {extents}")
        if len(set(blocks)) != len(blocks) or any(self._sizes.get(owner) != n for owner, n in self._owners(blocks).items()):
            raise BadInput(f"{extents} is not an allocation handed out and not yet got back, or not the whole of it")
        return blocks
