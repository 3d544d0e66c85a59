"""Fixed regions of one size, one a sequence: the dense ``[num_seqs, max_seq_len]`` batch of request-level serving."""

from collections.abc import Iterable

from ..errors import at_least
from .base import Extent, Stats, pool_stats, whole_extents


class Static:
    """Regions of ``region_blocks`` blocks (at most the pool); what is left behind the last whole one is never handed out. O(1)."""

    def __init__(self, num_blocks: int, region_blocks: int):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self.region_blocks = min(at_least("region_blocks", region_blocks, 1), num_blocks)
        self._free = [start for start in range(0, num_blocks - self.region_blocks + 1, self.region_blocks)][::-1]
        self._live: dict[int, int] = {}  # first block of a region handed out -> its size

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if at_least("num_blocks", num_blocks, 1) > self.region_blocks or not self._free:
            return None
        start = self._free.pop()
        self._live[start] = self.region_blocks
        return (Extent(start, self.region_blocks),)

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Never: a region has its full size from the start."""
        whole_extents(self._live, extents)
        at_least("num_blocks", num_blocks, 1)
        return None

    def free(self, extents: Iterable[Extent]) -> None:
        for extent in whole_extents(self._live, extents):
            del self._live[extent.start]
            self._free.append(extent.start)

    def stats(self) -> Stats:
        """Free blocks are those of free regions and of the tail; a free run joins neighbouring free regions (O(regions))."""
        size, holes, at = self.region_blocks, [], 0
        for start in [*sorted(self._live), self.num_blocks]:
            if start > at:
                holes.append(start - at)
            at = start + size
        return pool_stats(self.num_blocks, self.num_blocks - len(self._live) * size, max(holes, default=0), len(holes))

    def check(self) -> None:
        starts = sorted([*self._free, *self._live])
        assert starts == [i * self.region_blocks for i in range(self._num_regions)], "a region is lost or held twice"

    @property
    def _num_regions(self) -> int:
        return self.num_blocks // self.region_blocks
