"""Paging: any free block serves, so nothing is ever too fragmented; what it costs is the number of extents a sequence ends up in."""

from collections.abc import Iterable

from ..errors import at_least
from .base import Extent, Live, Stats, allocation_in, allocations_in
from .free_map import FREE, USED, FreeMap

NEW = tuple.__new__  # of an Extent: half the time of Extent(...)


class Paged:
    """A stack of free blocks, the last one freed handed out first, as vLLM's and TensorRT-LLM's block pools do. O(blocks moved).

    Blocks that happen to follow each other are reported as one extent: attention then reads them in one piece.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._live: Live = {}
        self._map = FreeMap(num_blocks)

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        extents = self._take(at_least("num_blocks", num_blocks, 1))
        if extents is not None:
            self._live[extents[0].start] = extents
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Chain any free blocks behind ``extents``; they join the last one only when they happen to follow it."""
        extents = allocation_in(self._live, extents)
        more = self._take(at_least("num_blocks", num_blocks, 1))
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
        push, push_all = self._free.append, self._free.extend
        for whole in reversed(allocations_in(self._live, extents)):
            del self._live[whole[0][0]]
            self._map.mark(whole, FREE)
            for start, size in reversed(whole):
                if size == 1:
                    push(start)
                else:
                    push_all(range(start + size - 1, start - 1, -1))

    def stats(self) -> Stats:
        return self._map.stats()

    def check(self) -> None:
        held = [block for extents in self._live.values() for start, size in extents for block in range(start, start + size)]
        assert sorted(held + self._free) == list(range(self.num_blocks)), "a block is lost or held twice"
        assert all(extents[0].start == first for first, extents in self._live.items())
        self._map.check((block, 1) for block in self._free)

    def _take(self, num_blocks: int) -> tuple[Extent, ...] | None:
        """The top of the stack, as extents."""
        free = self._free
        if num_blocks > len(free):
            return None
        if num_blocks == 1:
            block = free.pop()
            self._map.mark_one(block, USED)
            return (NEW(Extent, (block, 1)),)
        extents = runs_of(free[: -num_blocks - 1 : -1])
        del free[-num_blocks:]
        self._map.mark(extents, USED)
        return extents


def runs_of(blocks: list[int]) -> tuple[Extent, ...]:
    """``blocks``, at least one, in their order, neighbours that follow each other as one extent."""
    extents = []
    start = end = blocks[0]
    for block in blocks:
        if block != end:
            extents.append(NEW(Extent, (start, end - start)))
            start = block
        end = block + 1
    extents.append(NEW(Extent, (start, end - start)))
    return tuple(extents)
