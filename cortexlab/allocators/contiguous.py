"""Contiguous placement: one extent a request, holes coalesced with both neighbours when an extent
is freed.

A hole is known by its two ends (Knuth's boundary tags, TAOCP 1, 2.5), so freeing finds its
neighbours in O(1), and by its exact size, so the largest and the smallest that is large enough are
found in O(1). Which hole serves a request is all a placement adds.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from ..errors import at_least
from .base import NEW, Extent, Live, Stats, allocation_in, allocations_in, pool_stats, split_off
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
        self._hole_at[0], self._hole_ending[num_blocks] = num_blocks, 0
        self._put(0, num_blocks)

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if (
            num_blocks.__class__ is not int or num_blocks < 1
        ):  # in here, since the call takes a tenth of the whole
            at_least("num_blocks", num_blocks, 1)
        start = self._pop(num_blocks)
        if start is None:
            return None
        self._cut(start, num_blocks)
        self._live[start] = extents = (NEW(Extent, (start, num_blocks)),)
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Grow in place when the hole right behind is large enough."""
        ((start, size),) = allocation_in(self._live, extents)
        behind = self._hole_at.get(start + size, 0)
        if behind < at_least("num_blocks", num_blocks, 1):
            return None
        self._drop(start + size, behind)
        self._cut(start + size, num_blocks)
        self._live[start] = grown = (NEW(Extent, (start, size + num_blocks)),)
        return grown

    def free(self, extents: Iterable[Extent]) -> None:
        hole_at, hole_ending = self._hole_at, self._hole_ending
        for ((start, size),) in allocations_in(self._live, extents):
            del self._live[start]
            self._free_blocks += size
            end = start + size
            if (before := hole_ending.pop(start, None)) is not None:
                self._drop(before, start - before)
                start = before
            if (behind := hole_at.pop(end, None)) is not None:
                self._drop(end, behind)
                end += behind
            hole_at[start] = end - start
            hole_ending[end] = start
            self._put(start, end - start)

    def split(
        self, extents: tuple[Extent, ...], num_blocks: int
    ) -> tuple[list[tuple[Extent, ...]], tuple[Extent, ...]]:
        """As `split_off`."""
        return split_off(self._live, extents, num_blocks)

    def stats(self) -> Stats:
        return pool_stats(
            self.num_blocks, self._free_blocks, self._sizes.largest(), len(self._hole_at)
        )

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
        assert not any(start in self._hole_ending for start in self._hole_at), (
            "two neighbouring holes were not joined"
        )

    def _cut(self, start: int, num_blocks: int) -> None:
        """Take the front of a hole that the placement has let go of."""
        end = start + self._hole_at.pop(start)
        self._free_blocks -= num_blocks
        start += num_blocks
        if start < end:
            self._hole_at[start] = end - start
            self._hole_ending[end] = start
            self._put(start, end - start)
        else:
            del self._hole_ending[end]

    # --- what a placement adds: where it keeps the holes, and which it takes ----------------------

    @abstractmethod
    def _pop(self, num_blocks: int) -> int | None:
        """First block of the hole that serves ``num_blocks``, which is kept no more; or None."""

    def _put(self, start: int, size: int) -> None:
        """Keep a hole."""
        self._sizes.add(start, size)

    def _drop(self, start: int, size: int) -> None:
        """Keep it no more."""
        self._sizes.remove(start, size)


class FirstFit(ContiguousAllocator):
    """The hole with the lowest address that is large enough, as CortexStream's allocator searches.
    O(log n), where it scans the pool.
    """

    def __init__(self, num_blocks: int):
        self._addresses = HoleAddresses(at_least("num_blocks", num_blocks, 1))
        super().__init__(num_blocks)

    def _pop(self, num_blocks: int) -> int | None:
        start = self._addresses.lowest_from(num_blocks)
        if start is not None:
            self._drop(start, self._hole_at[start])
        return start

    def _put(self, start: int, size: int) -> None:
        super()._put(start, size)
        self._addresses.add(start, size)

    def _drop(self, start: int, size: int) -> None:
        super()._drop(start, size)
        self._addresses.remove(start, size)

    def check(self) -> None:
        super().check()
        self._addresses.check(self._hole_at)


class BestFit(ContiguousAllocator):
    """The smallest hole that is large enough. O(1)."""

    def _pop(self, num_blocks: int) -> int | None:
        size = self._sizes.smallest_from(num_blocks)
        return None if size is None else self._sizes.pop(size)


class Segregated(ContiguousAllocator):
    """Good fit by size classes (Masmano et al., TLSF, ECRTS 2004). O(1).

    Between two powers of two lie `SUBDIVISIONS` classes. A request is rounded up to the next class,
    where any hole serves; only when there is none does an exact search decide, so it fails only
    when no hole is large enough.
    """

    SUBDIVISIONS = 16

    def _pop(self, num_blocks: int) -> int | None:
        step = (1 << num_blocks.bit_length() - 1) // self.SUBDIVISIONS or 1
        size = self._sizes.smallest_from(-(-num_blocks // step) * step)
        if size is None and step > 1:
            size = self._sizes.smallest_from(num_blocks)
        return None if size is None else self._sizes.pop(size)
