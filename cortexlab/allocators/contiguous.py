"""Contiguous placement: one extent a request, holes coalesced with both neighbours when an extent is freed.

A hole is known by its two ends (Knuth's boundary tags, TAOCP 1, 2.5), so freeing finds its neighbours in O(1), and by its exact
size, so the largest and the smallest that is large enough are found in O(1). Which hole serves a request is all a placement adds.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from ..errors import at_least
from .base import Extent, Live, Stats, allocation_in, allocations_in, pool_stats
from .holes import HoleAddresses, HoleSizes


class ContiguousAllocator(ABC):
    """Boundary tags over a pool; a placement says which hole serves (`_find`)."""

    def __init__(self, num_blocks: int):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self._free_blocks = self.num_blocks
        self._hole_at: dict[int, int] = {}  # first block of a hole -> its size
        self._hole_ending: dict[int, int] = {}  # block behind a hole -> its first block
        self._sizes = HoleSizes(self.num_blocks)
        self._live: Live = {}
        self._add_hole(0, self.num_blocks)

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        start = self._find(at_least("num_blocks", num_blocks, 1))
        if start is None:
            return None
        self._take_front(start, num_blocks)
        self._live[start] = extents = (Extent(start, num_blocks),)
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Grow in place when the hole right behind is large enough."""
        (extent,) = allocation_in(self._live, extents)
        if self._hole_at.get(extent.end, 0) < at_least("num_blocks", num_blocks, 1):
            return None
        self._take_front(extent.end, num_blocks)
        self._live[extent.start] = grown = (Extent(extent.start, extent.num_blocks + num_blocks),)
        return grown

    def free(self, extents: Iterable[Extent]) -> None:
        for (extent,) in allocations_in(self._live, extents):
            del self._live[extent.start]
            start, end = extent.start, extent.end
            if (before := self._hole_ending.get(start)) is not None:
                self._remove_hole(before)
                start = before
            if (behind := self._hole_at.get(end)) is not None:
                self._remove_hole(end)
                end += behind
            self._add_hole(start, end - start)
            self._free_blocks += extent.num_blocks

    def stats(self) -> Stats:
        return pool_stats(self.num_blocks, self._free_blocks, self._sizes.largest(), len(self._hole_at))

    def check(self) -> None:
        pieces = sorted([*self._hole_at.items(), *(extent for (extent,) in self._live.values())])
        at = 0
        for start, size in pieces:
            assert start == at, f"block {at} is lost or held twice"
            at += size
        assert at == self.num_blocks, f"blocks behind {at} are lost"
        assert self._free_blocks == sum(self._hole_at.values())
        assert self._sizes.largest() == max(self._hole_at.values(), default=0)
        assert self._hole_ending == {start + size: start for start, size in self._hole_at.items()}
        assert not any(start in self._hole_ending for start in self._hole_at), "two neighbouring holes were not joined"

    # --- what a placement adds ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _find(self, num_blocks: int) -> int | None:
        """First block of the hole that serves ``num_blocks``, or None."""

    # --- holes ----------------------------------------------------------------------------------------------------------------

    def _add_hole(self, start: int, size: int) -> None:
        self._hole_at[start] = size
        self._hole_ending[start + size] = start
        self._sizes.add(start, size)

    def _remove_hole(self, start: int) -> int:
        size = self._hole_at.pop(start)
        del self._hole_ending[start + size]
        self._sizes.remove(start, size)
        return size

    def _take_front(self, start: int, num_blocks: int) -> None:
        size = self._remove_hole(start)
        if size > num_blocks:
            self._add_hole(start + num_blocks, size - num_blocks)
        self._free_blocks -= num_blocks


class FirstFit(ContiguousAllocator):
    """The hole with the lowest address that is large enough, as CortexStream's allocator searches. O(log n), where it scans the pool."""

    def __init__(self, num_blocks: int):
        self._addresses = HoleAddresses(at_least("num_blocks", num_blocks, 1))
        super().__init__(num_blocks)

    def _find(self, num_blocks: int) -> int | None:
        return self._addresses.lowest_from(num_blocks)

    def _add_hole(self, start: int, size: int) -> None:
        super()._add_hole(start, size)
        self._addresses.add(start, size)

    def _remove_hole(self, start: int) -> int:
        size = super()._remove_hole(start)
        self._addresses.remove(start, size)
        return size

    def check(self) -> None:
        super().check()
        self._addresses.check(self._hole_at)


class BestFit(ContiguousAllocator):
    """The smallest hole that is large enough. O(1)."""

    def _find(self, num_blocks: int) -> int | None:
        size = self._sizes.smallest_from(num_blocks)
        return None if size is None else self._sizes.one_of(size)


class Segregated(ContiguousAllocator):
    """Good fit by size classes (Masmano et al., TLSF, ECRTS 2004). O(1).

    Between two powers of two lie `SUBDIVISIONS` classes. A request is rounded up to the next class, where any hole serves; only
    when there is none does an exact search decide, so it fails only when no hole is large enough.
    """

    SUBDIVISIONS = 16

    def _find(self, num_blocks: int) -> int | None:
        step = max(1, (1 << num_blocks.bit_length() - 1) // self.SUBDIVISIONS)
        rounded = -(-num_blocks // step) * step
        size = self._sizes.smallest_from(rounded)
        if size is None:
            size = self._sizes.smallest_from(num_blocks)
        return None if size is None else self._sizes.one_of(size)
