"""Paging: any free block serves, so no request fails for fragmentation. The cost is the number of
extents of a sequence.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from operator import itemgetter

from ..errors import at_least
from .base import (
    NEW,
    Extent,
    FrontBySplit,
    Live,
    Stats,
    allocation_in,
    allocations_in,
    assert_tiles,
    merged,
    split_off,
)
from .free_map import FREE, USED, FreeMap

SIZE = itemgetter(1)


class Paged(FrontBySplit):
    """A stack of free blocks, the last one freed handed out first, as in vLLM's first block
    allocator. O(blocks moved).

    vLLM's present queue hands out the block freed the longest ago; under load it leaves sequences
    in as many extents (experiments/LOG.md).

    Blocks that happen to follow each other are one extent, which attention reads in one piece.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks = at_least("num_blocks", num_blocks, 1)
        self._stack: list[Extent] = []  # freed extents: the last one is handed out first
        self._fresh = 0  # first block never handed out: from here on blocks lie under the stack
        self._live: Live = {}
        self._map = FreeMap(num_blocks)

    @property
    def free_blocks(self) -> int:
        return self._map.free_blocks

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        extents = self._take(at_least("num_blocks", num_blocks, 1))
        if extents is not None:
            self._live[extents[0].start] = extents
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Chain any free blocks behind ``extents``; only blocks that happen to follow the last
        extent join it.
        """
        if num_blocks.__class__ is not int or num_blocks < 1:  # saves a call, a tenth of the time
            num_blocks = at_least("num_blocks", num_blocks, 1)
        extents = allocation_in(self._live, extents)
        more = self._take(num_blocks)
        if more is None:
            return None
        start, size = extents[-1]
        first = more[0]
        if start + size == first[0]:
            extents = (*extents[:-1], NEW(Extent, (start, size + first[1])), *more[1:])
        else:
            extents += more
        self._live[extents[0][0]] = extents
        return extents

    def free(self, extents: Iterable[Extent]) -> None:
        for whole in reversed(allocations_in(self._live, extents)):
            del self._live[whole[0][0]]
            self._map.mark(whole, FREE)
            self._stack.extend(reversed(whole))

    def split(
        self, extents: tuple[Extent, ...], num_blocks: int
    ) -> tuple[list[tuple[Extent, ...]], tuple[Extent, ...]]:
        """As `OptionalParts.split`."""
        return split_off(self._live, extents, num_blocks)

    def stats(self) -> Stats:
        return self._map.stats()

    def check(self) -> None:
        free = [*self._stack]
        if self._fresh < self.num_blocks:
            free.append(Extent(self._fresh, self.num_blocks - self._fresh))
        held = [extent for extents in self._live.values() for extent in extents]
        assert_tiles([*free, *held], self.num_blocks)
        assert all(extents[0].start == first for first, extents in self._live.items())
        self._map.check(free)

    def _take(self, num_blocks: int) -> tuple[Extent, ...] | None:
        """The top of the stack, as extents."""
        if num_blocks > self._map.free_blocks:
            return None
        stack = self._stack
        if num_blocks == 1 and stack and stack[-1][1] == 1:
            extents = (stack.pop(),)
            self._map.mark_one(extents[0][0], USED)
            return extents
        top = stack[: -num_blocks - 1 : -1]
        reached = list(accumulate(map(SIZE, top)))  # blocks of an extent and of those above it
        if reached and reached[-1] >= num_blocks:
            last = bisect_left(reached, num_blocks)
            del top[last + 1 :], stack[-last - 1 :]
            if left := reached[last] - num_blocks:
                start, size = top[last]
                top[last] = NEW(Extent, (start, size - left))
                stack.append(NEW(Extent, (start + size - left, left)))
        else:
            stack.clear()
            missing = num_blocks - (reached[-1] if reached else 0)
            top.append(NEW(Extent, (self._fresh, missing)))
            self._fresh += missing
        extents = merged(top)
        self._map.mark(extents, USED)
        return extents
