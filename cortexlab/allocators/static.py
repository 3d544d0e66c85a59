"""Fixed regions of one size, one a sequence: the dense ``[num_seqs, max_seq_len]`` batch of
request-level serving.
"""

from collections.abc import Iterable

from ..errors import at_least
from .base import Extent, Live, Stats, allocations_in, never_extended, pool_stats
from .free_map import FREE, USED, FreeMap


class Static:
    """Regions of ``region_blocks`` blocks (at most the pool); what is left behind the last whole
    one is never handed out. O(1).
    """

    def __init__(self, num_blocks: int, region_blocks: int):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self.region_blocks = min(at_least("region_blocks", region_blocks, 1), num_blocks)
        num_regions = num_blocks // self.region_blocks
        self._tail = num_blocks - num_regions * self.region_blocks
        self._free = list(range(num_regions - 1, -1, -1))
        self._live: Live = {}
        self._map = FreeMap(num_regions)  # of regions, not of blocks

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if at_least("num_blocks", num_blocks, 1) > self.region_blocks or not self._free:
            return None
        region = self._free.pop()
        self._map.mark(((region, 1),), USED)
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
            self._map.mark(((region, 1),), FREE)
            self._free.append(region)

    def stats(self) -> Stats:
        """Free blocks are those of free regions and of the tail; a free run joins neighbouring free
        regions, and the tail the last.
        """
        _, _, longest, at_the_end, holes = self._map.sum()
        size, tail = self.region_blocks, self._tail
        free_blocks = self._map.free_blocks * size + tail
        holes += 1 if tail and not at_the_end else 0
        return pool_stats(
            self.num_blocks, free_blocks, max(longest * size, at_the_end * size + tail), holes
        )

    def check(self) -> None:
        held = [start // self.region_blocks for start in self._live]
        assert sorted(held + self._free) == list(range(self._map.num_blocks)), (
            "a region is lost or held twice"
        )
        self._map.check((region, 1) for region in self._free)
