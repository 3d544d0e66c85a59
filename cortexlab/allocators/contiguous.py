"""Contiguous placement: one extent a request, holes coalesced with both neighbours when an extent is freed.

A hole is known by its two ends (Knuth's boundary tags, TAOCP 1, 2.5), so freeing finds its neighbours in O(1), and by its exact
size, so the largest and the smallest that is large enough are found in O(1). Which hole serves a request is all a placement adds.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable

from ..errors import at_least
from .base import Extent, Live, Stats, allocation_in, allocations_in, pool_stats


class HoleSizes:
    """Holes by exact size, and a bitmap in two levels of the sizes there are: 1,024 words of 1,024 bits hold a million sizes."""

    __slots__ = ("_holes", "_sizes", "_words")

    def __init__(self, largest: int):
        self._sizes = [0] * ((largest >> 10) + 1)  # word w, bit b: a hole of 1024 w + b blocks exists
        self._words = 0  # bit w: word w is not zero
        self._holes: dict[int, dict[int, None]] = {}  # size -> first blocks, in the order they became holes

    def add(self, start: int, size: int) -> None:
        holes = self._holes.get(size)
        if holes is not None:
            holes[start] = None
            return
        self._holes[size] = {start: None}
        self._sizes[size >> 10] |= 1 << (size & 1023)
        self._words |= 1 << (size >> 10)

    def remove(self, start: int, size: int) -> None:
        holes = self._holes[size]
        del holes[start]
        if not holes:
            del self._holes[size]
            self._sizes[size >> 10] ^= 1 << (size & 1023)
            if not self._sizes[size >> 10]:
                self._words ^= 1 << (size >> 10)

    def largest(self) -> int:
        word = self._words.bit_length() - 1
        return (word << 10) + self._sizes[word].bit_length() - 1 if self._words else 0

    def smallest_from(self, size: int) -> int | None:
        """The smallest size of a hole that is at least ``size``."""
        word = size >> 10
        if word >= len(self._sizes):
            return None
        found = self._sizes[word] >> (size & 1023)
        if found:
            return size + _lowest_bit(found)
        words = self._words >> (word + 1)
        if not words:
            return None
        word += 1 + _lowest_bit(words)
        return (word << 10) + _lowest_bit(self._sizes[word])

    def one_of(self, size: int) -> int:
        """First block of the hole of exactly ``size`` that became one last. O(1): a dict finds its last key at once, its first does not."""
        holes = self._holes[size]
        start, _ = holes.popitem()
        holes[start] = None
        return start


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


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
    """The hole with the lowest address that is large enough, as CortexStream's allocator searches. O(holes)."""

    def __init__(self, num_blocks: int):
        self._starts: list[int] = []  # of the holes, sorted by address
        super().__init__(num_blocks)

    def _find(self, num_blocks: int) -> int | None:
        sizes = self._hole_at
        return next((start for start in self._starts if sizes[start] >= num_blocks), None)

    def _add_hole(self, start: int, size: int) -> None:
        super()._add_hole(start, size)
        insort(self._starts, start)

    def _remove_hole(self, start: int) -> int:
        del self._starts[bisect_left(self._starts, start)]
        return super()._remove_hole(start)

    def check(self) -> None:
        super().check()
        assert self._starts == sorted(self._hole_at)


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
