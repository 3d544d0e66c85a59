"""Binary buddies (Knowlton 1965; Knuth, TAOCP 1, 2.5): blocks of 2^k, split in halves and joined
again with their buddies.

    pool of 13   |0 . . . . . . .|8 . . .|12|     largest aligned pieces: a pool of any size

Splitting and joining take O(log n) steps. Blocks handed out beyond the request are room to grow and
the scheme's internal waste: on average a quarter of all blocks handed out when sizes are spread
evenly.

Joining is *lazy* (the idea of Barkley and Lee, "A Lazy Buddy System Bounded by Two Coalescing
Delays per Class", SOSP 1989): the buddy freed last of every order stays *hot*, not joined, and
serves the next request of that order as it is. A buddy freed later takes its place, and the older
one is joined. Where no free buddy is large enough, all hot ones (at most one an order) are joined
and the search is made again, so a request fails only when no aligned run of its size is free.
"""

from collections.abc import Iterable

from ..errors import at_least
from .base import Extent, Live, Stats, allocation_in, allocations_in, assert_tiles
from .free_map import FREE, USED, FreeMap


class Buddy:
    """One extent of the next power of two. O(1) where a hot one serves, else O(log n)."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks = at_least("num_blocks", num_blocks, 1)
        self._live: Live = {}
        self._hot: Live = {}  # order k -> the extents, of 2^k blocks, freed last
        self._hot_blocks = 0  # blocks of all hot buddies
        self._map = FreeMap(num_blocks)  # hot buddies are marked as used
        # order k -> first blocks of the free buddies of 2^k blocks, without the hot one
        self._free_of: list[dict[int, None]] = [{} for _ in range(num_blocks.bit_length())]
        self._orders = 0  # bit k: `_free_of` has a buddy of order k
        start = 0
        for order in reversed(range(num_blocks.bit_length())):
            if num_blocks >> order & 1:
                self._put(start, order)
                start += 1 << order

    @property
    def free_blocks(self) -> int:
        """Blocks of the free buddies, hot or not."""
        return self._map.free_blocks + self._hot_blocks

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if num_blocks.__class__ is not int or num_blocks < 1:  # saves a call, a fifth of the time
            num_blocks = at_least("num_blocks", num_blocks, 1)
        order = (num_blocks - 1).bit_length()
        extents = self._hot.pop(order, None)
        if extents is None:
            return self._split(order)
        start, size = extents[0]
        self._hot_blocks -= size
        self._live[start] = extents
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Join with the buddy behind until ``num_blocks`` more fit, when each is free and whole."""
        (extent,) = allocation_in(self._live, extents)
        wanted = extent.num_blocks + at_least("num_blocks", num_blocks, 1)
        upper = self._upper_buddies(extent, wanted)
        if upper is None and self._hot:
            self._join_hot()
            upper = self._upper_buddies(extent, wanted)
        if upper is None:
            return None
        for start, order in upper:
            self._take(start, order)
        grown = (Extent(extent.start, extent.num_blocks << len(upper)),)
        self._map.mark(((extent.end, grown[0].num_blocks - extent.num_blocks),), USED)
        self._live[extent.start] = grown
        return grown

    def free(self, extents: Iterable[Extent]) -> None:
        hot = self._hot
        for whole in allocations_in(self._live, extents):
            start, num_blocks = whole[0]
            del self._live[start]
            order = num_blocks.bit_length() - 1
            if order in hot:
                self._join(order)
            hot[order] = whole
            self._hot_blocks += num_blocks

    def release_front(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...]:
        """As `OptionalParts.release_front`: halves, quarters ... that need not be cut."""
        ((start, size),) = allocation_in(self._live, extents)
        num_blocks = at_least("num_blocks", num_blocks, 1, size)
        del self._live[start]
        while num_blocks and num_blocks >= (piece := size // 2 or 1):
            self._live[start] = given = (Extent(start, piece),)
            self.free(given)
            start, size, num_blocks = start + piece, size - piece, num_blocks - piece
        if not size:
            return ()
        self._live[start] = rest = (Extent(start, size),)
        return rest

    def stats(self) -> Stats:
        """Hot buddies count as free. Asking joins nothing, so later placements stay as they are."""
        hot = [extent for (extent,) in self._hot.values()]
        self._map.mark(hot, FREE)
        stats = self._map.stats()
        self._map.mark(hot, USED)
        return stats

    def check(self) -> None:
        joined = [
            (start, 1 << order) for order, starts in enumerate(self._free_of) for start in starts
        ]
        hot = [extent for (extent,) in self._hot.values()]
        pieces = [*joined, *hot, *(extent for (extent,) in self._live.values())]
        assert_tiles(pieces, self.num_blocks)
        for start, size in pieces:
            assert start % size == 0 and size.bit_count() == 1, (
                f"{size} blocks at {start} are no buddy"
            )
        assert self._orders == sum(
            1 << order for order, starts in enumerate(self._free_of) if starts
        )
        assert all(extents[0].num_blocks == 1 << order for order, extents in self._hot.items())
        assert self._hot_blocks == sum(size for _, size in hot)
        assert not any(
            start ^ size in self._free_of[size.bit_length() - 1] for start, size in joined
        ), "two free buddies were not joined"
        self._map.check(joined)

    # --- buddies ----------------------------------------------------------------------------------

    def _split(self, order: int) -> tuple[Extent, ...] | None:
        """An extent of 2^order blocks, the lower part of the smallest free buddy that holds it."""
        if not self._orders >> order and self._hot:
            self._join_hot()
        orders = self._orders >> order
        if not orders:
            return None
        found = order + (orders & -orders).bit_length() - 1
        start, _ = self._free_of[found].popitem()
        if not self._free_of[found]:
            self._orders ^= 1 << found
        while found > order:  # hand the upper half back
            found -= 1
            self._put(start + (1 << found), found)
        self._live[start] = extents = (Extent(start, 1 << order),)
        self._map.mark(extents, USED)
        return extents

    def _upper_buddies(self, extent: Extent, wanted: int) -> list[tuple[int, int]] | None:
        """The buddies (first block, order) to join with ``extent``, in this order, until it holds
        ``wanted`` blocks; None where one is not free.
        """
        size, upper = extent.num_blocks, []
        while size < wanted:
            order = size.bit_length() - 1
            if extent.start & size or extent.start + size not in self._free_of[order]:
                return None
            upper.append((extent.start + size, order))
            size *= 2
        return upper

    def _join_hot(self) -> None:
        for order in list(self._hot):
            self._join(order)

    def _join(self, order: int) -> None:
        """Put the hot buddy of ``order`` back, joined with its own buddy, and the pair with the
        pair's, as long as they are free.
        """
        extents = self._hot.pop(order)
        self._hot_blocks -= 1 << order
        self._map.mark(extents, FREE)
        start = extents[0].start
        while (buddy := start ^ 1 << order) in self._free_of[order]:
            self._take(buddy, order)
            start, order = min(start, buddy), order + 1
        self._put(start, order)

    def _put(self, start: int, order: int) -> None:
        self._free_of[order][start] = None
        self._orders |= 1 << order

    def _take(self, start: int, order: int) -> None:
        del self._free_of[order][start]
        if not self._free_of[order]:
            self._orders ^= 1 << order
