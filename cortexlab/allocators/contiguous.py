"""Contiguous placement: one extent a request, holes coalesced with both neighbours when an extent is freed.

A hole is known by its two ends (Knuth's boundary tags, TAOCP 1, 2.5), so freeing finds its neighbours in O(1). Which hole serves
a request is the one thing a placement adds.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

from ..errors import BadInput, at_least
from .base import Extent, Stats, pool_stats


class ContiguousAllocator:
    """Boundary tags over a pool; a placement says which hole (`_find`) and keeps its own index of them."""

    def __init__(self, num_blocks: int):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self._free_blocks = self.num_blocks
        self._hole_at: dict[int, int] = {}  # first block of a hole -> its size
        self._hole_ending: dict[int, int] = {}  # block behind a hole -> its first block
        self._live: dict[int, int] = {}  # first block of an extent handed out -> its size
        self._add_hole(0, self.num_blocks)

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        start = self._find(at_least("num_blocks", num_blocks, 1))
        if start is None:
            return None
        self._take_front(start, num_blocks)
        self._live[start] = num_blocks
        return (Extent(start, num_blocks),)

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Grow in place when the hole right behind is large enough."""
        extent, *others = self._checked(extents)
        if others:
            raise BadInput(f"a contiguous allocation is one extent, not {len(others) + 1}")
        if self._hole_at.get(extent.end, 0) < at_least("num_blocks", num_blocks, 1):
            return None
        self._take_front(extent.end, num_blocks)
        self._live[extent.start] = extent.num_blocks + num_blocks
        return (Extent(extent.start, extent.num_blocks + num_blocks),)

    def free(self, extents: Iterable[Extent]) -> None:
        for extent in self._checked(extents):
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
        return pool_stats(self.num_blocks, self._free_blocks, max(self._hole_at.values(), default=0), len(self._hole_at))

    def check(self) -> None:
        pieces = sorted([*self._hole_at.items(), *self._live.items()])
        at = 0
        for start, size in pieces:
            assert start == at, f"block {at} is lost or held twice"
            at += size
        assert at == self.num_blocks, f"blocks behind {at} are lost"
        assert self._free_blocks == sum(self._hole_at.values())
        assert self._hole_ending == {start + size: start for start, size in self._hole_at.items()}
        assert not any(start in self._hole_ending for start in self._hole_at), "two neighbouring holes were not joined"

    # --- what a placement adds ------------------------------------------------------------------------------------------------

    def _find(self, num_blocks: int) -> int | None:
        """First block of the hole that serves ``num_blocks``, or None."""
        raise NotImplementedError

    # --- holes ----------------------------------------------------------------------------------------------------------------

    def _add_hole(self, start: int, size: int) -> None:
        self._hole_at[start] = size
        self._hole_ending[start + size] = start

    def _remove_hole(self, start: int) -> int:
        size = self._hole_at.pop(start)
        del self._hole_ending[start + size]
        return size

    def _take_front(self, start: int, num_blocks: int) -> None:
        size = self._remove_hole(start)
        if size > num_blocks:
            self._add_hole(start + num_blocks, size - num_blocks)
        self._free_blocks -= num_blocks

    def _checked(self, extents: Iterable[Extent]) -> tuple[Extent, ...]:
        extents = tuple(extents)
        for extent in extents:
            if self._live.get(extent.start) != extent.num_blocks:
                raise BadInput(f"{extent} is not an extent this allocator has handed out and not yet got back")
        if len(set(extents)) != len(extents):
            raise BadInput(f"the same extent stands twice in {extents}")
        if not extents:
            raise BadInput("no extents given: name at least one that this allocator has handed out")
        return extents


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
