"""Binary buddies (Knowlton 1965; Knuth, TAOCP 1, 2.5): blocks of 2^k, split in halves and joined again with their buddies.

    pool of 13   |0 . . . . . . .|8 . . .|12|     its largest aligned pieces: any size of pool, and every block can be reached

Splitting and joining take O(log n) steps. What is handed out beyond the request is the sequence's own to grow into, and is the
scheme's internal waste: on average a quarter of what is handed out when sizes are spread evenly.
"""

from collections.abc import Iterable

from ..errors import BadInput, at_least
from .base import Extent, Stats, merged, pool_stats, whole_extents


class Buddy:
    """One extent of the next power of two. Statistics look at the pool as it lies, so they take O(free buddies)."""

    def __init__(self, num_blocks: int):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self._live: dict[int, int] = {}  # first block of an extent handed out -> its size
        self._order_at: dict[int, int] = {}  # first block of a free buddy -> k
        self._free_of: list[dict[int, None]] = [{} for _ in range(num_blocks.bit_length())]  # k -> first blocks
        self._orders = 0  # bit k: a free buddy of 2^k exists
        start = 0
        for order in reversed(range(num_blocks.bit_length())):
            if num_blocks >> order & 1:
                self._put(start, order)
                start += 1 << order

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        order = (at_least("num_blocks", num_blocks, 1) - 1).bit_length()
        orders = self._orders >> order
        if not orders:
            return None
        found = order + (orders & -orders).bit_length() - 1
        start = next(iter(self._free_of[found]))
        self._take(start)
        while found > order:  # hand the upper half back
            found -= 1
            self._put(start + (1 << found), found)
        self._live[start] = 1 << order
        return (Extent(start, 1 << order),)

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Join with the buddy behind, as often as it takes, when each is free and whole."""
        extent, *others = whole_extents(self._live, extents)
        if others:
            raise BadInput(f"a buddy allocation is one extent, not {len(others) + 1}")
        size, wanted, joined = extent.num_blocks, extent.num_blocks + at_least("num_blocks", num_blocks, 1), []
        while size < wanted:
            buddy = extent.start + size
            if extent.start & size or self._order_at.get(buddy) != size.bit_length() - 1:
                return None
            joined.append(buddy)
            size *= 2
        for buddy in joined:
            self._take(buddy)
        self._live[extent.start] = size
        return (Extent(extent.start, size),)

    def free(self, extents: Iterable[Extent]) -> None:
        for extent in whole_extents(self._live, extents):
            del self._live[extent.start]
            start, order = extent.start, extent.num_blocks.bit_length() - 1
            while self._order_at.get(buddy := start ^ 1 << order) == order:
                self._take(buddy)
                start, order = min(start, buddy), order + 1
            self._put(start, order)

    def stats(self) -> Stats:
        runs = merged(Extent(start, 1 << order) for start, order in sorted(self._order_at.items()))
        sizes = [run.num_blocks for run in runs]
        return pool_stats(self.num_blocks, sum(sizes), max(sizes, default=0), len(sizes))

    def check(self) -> None:
        pieces = sorted([*((start, 1 << order) for start, order in self._order_at.items()), *self._live.items()])
        at = 0
        for start, size in pieces:
            assert start == at, f"block {at} is lost or held twice"
            at += size
        assert at == self.num_blocks, f"blocks behind {at} are lost"
        for start, order in self._order_at.items():
            assert start % (1 << order) == 0 and start in self._free_of[order] and self._orders >> order & 1
            assert self._order_at.get(start ^ 1 << order) != order, "two free buddies were not joined"

    def _put(self, start: int, order: int) -> None:
        self._order_at[start] = order
        self._free_of[order][start] = None
        self._orders |= 1 << order

    def _take(self, start: int) -> None:
        order = self._order_at.pop(start)
        del self._free_of[order][start]
        if not self._free_of[order]:
            self._orders ^= 1 << order
