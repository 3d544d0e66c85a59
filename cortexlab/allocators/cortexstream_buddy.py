"""A replica of the buddy allocator that CortexStream published, kept to show what its one missing
loop costs. Not for use.

Source: github.com/pythongiant/CortexStream at 3ca8007, ``src/cache/kv_cache.cpp``:
``initBuddySystem``, ``buddyAllocate``, ``buddyCoalesce``. (At f8c8b1f, whose API this package
follows, a buddy is announced in ``docs/KV_CACHE_DESIGN.md``, "Phase 1", and the code is a linear
first fit.) What it does, read there and written anew:

- the pool is one piece, the largest power of two that fits; what lies behind it is counted as free
  and never handed out;
- a request is rounded up to a power of two. A free piece of that size serves, the lowest first,
  since every list is sorted when something is freed. Otherwise the smallest larger one is split
  **once**: its upper half goes back, and its lower half, however large, is handed out whole. (A
  buddy system goes on splitting.) So requests of 32 out of 2,048 blocks get 1024, 512, 256, 128,
  64, 32 and 32 blocks, and the eighth gets none;
- a freed piece is joined with a free neighbour of its size, the lower one first, and the two again
  with theirs. It never asks whether the two are buddies, so pieces come to lie at any multiple of a
  smaller size. (The published code removes the pair through an iterator that its first removal made
  void, so what a build of it does there is undefined; joined is what it means to join. With that
  line made sound, the compiled C++ and this class agreed in 60,000 random steps.)
"""

from collections.abc import Iterable
from heapq import heappop, heappush

from ..errors import at_least
from .base import Extent, Live, Stats, allocations_in, assert_tiles, never_extended
from .free_map import FREE, USED, FreeMap


class CortexStreamBuddy:
    """One extent of at least the next power of two. O(log n); the original sorts a list at every
    `free`.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks = at_least("num_blocks", num_blocks, 1)
        # order k -> the free pieces of 2^k blocks
        self._pieces = [Pieces() for _ in range(num_blocks.bit_length())]
        self._pieces[-1].add(0)
        self._live: Live = {}
        self._map = FreeMap(num_blocks)

    @property
    def free_blocks(self) -> int:
        return self._map.free_blocks

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        order = (at_least("num_blocks", num_blocks, 1) - 1).bit_length()
        found = next((k for k in range(order, len(self._pieces)) if self._pieces[k].starts), None)
        if found is None:
            return None
        start = self._pieces[found].take_lowest()
        if found > order:
            found -= 1  # split once, however small the request
            self._pieces[found].add(start + (1 << found))
        self._live[start] = extents = (Extent(start, 1 << found),)
        self._map.mark(extents, USED)
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Never: CortexStream has no such operation."""
        return never_extended(self._live, extents, num_blocks)

    def free(self, extents: Iterable[Extent]) -> None:
        for whole in allocations_in(self._live, extents):
            start, size = whole[0]
            del self._live[start]
            self._map.mark(whole, FREE)
            order = size.bit_length() - 1
            while (neighbour := self._neighbour(start, order)) is not None:
                self._pieces[order].starts.remove(neighbour)
                start, order = min(start, neighbour), order + 1
            self._pieces[order].add(start)

    def stats(self) -> Stats:
        return self._map.stats()

    def check(self) -> None:
        free = [
            (start, 1 << order)
            for order, pieces in enumerate(self._pieces)
            for start in pieces.starts
        ]
        end = 1 << self.num_blocks.bit_length() - 1
        assert_tiles([*free, *(extent for (extent,) in self._live.values())], end)
        for order, pieces in enumerate(self._pieces):
            assert pieces.starts <= set(pieces.heap), "a free piece cannot be found"
            assert not any(start + (1 << order) in pieces.starts for start in pieces.starts), (
                "two free neighbours were not joined"
            )
        self._map.check([*free, (end, self.num_blocks - end)])

    def _neighbour(self, start: int, order: int) -> int | None:
        starts, size = self._pieces[order].starts, 1 << order
        return next((at for at in (start - size, start + size) if at in starts), None)


class Pieces:
    """First blocks of free pieces of one size: a set, and a heap that finds the lowest. A joined
    piece leaves the heap late.
    """

    __slots__ = ("heap", "starts")

    def __init__(self):
        self.starts: set[int] = set()
        self.heap: list[int] = []  # all of `starts`, some twice, and starts of joined pieces

    def add(self, start: int) -> None:
        self.starts.add(start)
        if len(self.heap) > 2 * len(self.starts) + 16:
            self.heap = sorted(self.starts)
        else:
            heappush(self.heap, start)

    def take_lowest(self) -> int:
        while (start := heappop(self.heap)) not in self.starts:
            pass
        self.starts.remove(start)
        return start
