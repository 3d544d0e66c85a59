"""Fixed regions of one size, one a sequence: the dense ``[num_seqs, max_seq_len]`` batch of
request-level serving.
"""

from collections.abc import Iterable

from ..errors import at_least
from .base import Extent, Live, Stats, allocations_in, assert_tiles, never_extended, pool_stats
from .free_map import FREE, USED, FreeMap


class Static:
    """Regions of ``region_blocks`` blocks (at most the pool). The tail, too short for a region, is
    never handed out. O(1).
    """

    def __init__(self, num_blocks: int, region_blocks: int):
        self.num_blocks = num_blocks = at_least("num_blocks", num_blocks, 1)
        self.region_blocks = min(at_least("region_blocks", region_blocks, 1), num_blocks)
        num_regions = num_blocks // self.region_blocks
        self._tail = num_blocks - num_regions * self.region_blocks
        self._free = list(range(num_regions - 1, -1, -1))
        self._live: Live = {}
        self._map = FreeMap(num_regions + (self._tail > 0))  # a region each, the tail behind them

    @property
    def free_blocks(self) -> int:
        """Blocks of the free regions and of the tail."""
        return len(self._free) * self.region_blocks + self._tail

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if at_least("num_blocks", num_blocks, 1) > self.region_blocks or not self._free:
            return None
        region = self._free.pop()
        self._map.mark_one(region, USED)
        start = region * self.region_blocks
        self._live[start] = extents = (Extent(start, self.region_blocks),)
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Never: a region has its full size from the start."""
        return never_extended(self._live, extents, num_blocks)

    def free(self, extents: Iterable[Extent]) -> None:
        for (extent,) in allocations_in(self._live, extents):
            del self._live[extent.start]
            region = extent.start // self.region_blocks
            self._map.mark_one(region, FREE)
            self._free.append(region)

    def stats(self) -> Stats:
        """A free run joins neighbouring free regions, and the tail with the last region."""
        holes = self._map.holes() * self.region_blocks
        if self._tail:
            holes[-1] += self._tail - self.region_blocks
        return pool_stats(self.num_blocks, self.free_blocks, int(holes.max(initial=0)), len(holes))

    def check(self) -> None:
        size, end = self.region_blocks, self.num_blocks - self._tail
        held = [extent for (extent,) in self._live.values()]
        assert_tiles([*held, *((region * size, size) for region in self._free)], end)
        tail = [(end // size, 1)] if self._tail else []
        self._map.check([*((region, 1) for region in self._free), *tail])
