"""Contiguous placement: one extent a request, holes coalesced with both neighbours when an extent
is freed.

`Holes` finds the neighbours of a freed extent in O(1). A placement adds an index of the holes and
the search for the hole that serves a request.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from ..errors import at_least
from .base import (
    NEW,
    Extent,
    FrontBySplit,
    Live,
    Stats,
    allocation_in,
    allocations_in,
    pool_stats,
    split_off,
)
from .holes import HoleAddresses, Holes, HoleSizes


class ContiguousAllocator(FrontBySplit, ABC):
    """One extent a request, at the front of the hole that the placement finds (`_pop`)."""

    Index: type[HoleSizes] | type[HoleAddresses] = HoleSizes  # where a placement searches

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks = at_least("num_blocks", num_blocks, 1)
        self._index = self.Index(num_blocks)
        self._holes = Holes(num_blocks, self._index)
        self._live: Live = {}

    @property
    def free_blocks(self) -> int:
        return self._holes.free_blocks

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if num_blocks.__class__ is not int or num_blocks < 1:  # saves a call, a tenth of the time
            num_blocks = at_least("num_blocks", num_blocks, 1)
        start = self._pop(num_blocks)
        if start is None:
            return None
        self._holes.take(start, start, num_blocks)
        self._live[start] = extents = (NEW(Extent, (start, num_blocks)),)
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Grow in place when the hole right behind is large enough."""
        ((start, size),) = allocation_in(self._live, extents)
        num_blocks = at_least("num_blocks", num_blocks, 1)
        if self._holes.at.get(start + size, 0) < num_blocks:
            return None
        self._holes.drop(start + size)
        self._holes.take(start + size, start + size, num_blocks)
        self._live[start] = grown = (NEW(Extent, (start, size + num_blocks)),)
        return grown

    def free(self, extents: Iterable[Extent]) -> None:
        for ((start, size),) in allocations_in(self._live, extents):
            del self._live[start]
            self._holes.give(start, size)

    def split(
        self, extents: tuple[Extent, ...], num_blocks: int
    ) -> tuple[list[tuple[Extent, ...]], tuple[Extent, ...]]:
        """As `OptionalParts.split`."""
        return split_off(self._live, extents, num_blocks)

    def stats(self) -> Stats:
        holes = self._holes
        return pool_stats(self.num_blocks, holes.free_blocks, self._index.largest(), len(holes.at))

    def check(self) -> None:
        self._holes.check((extent for (extent,) in self._live.values()), self.num_blocks)

    @abstractmethod
    def _pop(self, num_blocks: int) -> int | None:
        """First block of the hole that serves ``num_blocks``, taken out of the index; or None."""


class FirstFit(ContiguousAllocator):
    """The hole with the lowest address that is large enough, as CortexStream's allocator searches.
    O(log n), where CortexStream scans the pool.
    """

    Index = HoleAddresses

    def _pop(self, num_blocks: int) -> int | None:
        start = self._index.lowest_from(num_blocks)
        if start is not None:
            self._holes.drop(start)
        return start


class BestFit(ContiguousAllocator):
    """The smallest hole that is large enough. O(1)."""

    def _pop(self, num_blocks: int) -> int | None:
        size = self._index.smallest_from(num_blocks)
        return None if size is None else self._index.pop(size)


class Segregated(ContiguousAllocator):
    """Good fit by size classes (Masmano et al., TLSF, ECRTS 2004). O(1).

    Between two powers of two lie `SUBDIVISIONS` classes. A request is rounded up to the next class,
    where any hole serves. Without such a hole an exact search decides, so a request fails only when
    no hole is large enough.
    """

    SUBDIVISIONS = 16

    def _pop(self, num_blocks: int) -> int | None:
        step = (1 << num_blocks.bit_length() - 1) // self.SUBDIVISIONS or 1
        size = self._index.smallest_from(-(-num_blocks // step) * step)
        if size is None and step > 1:
            size = self._index.smallest_from(num_blocks)
        return None if size is None else self._index.pop(size)
