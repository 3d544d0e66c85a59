"""Holes by their two ends (`Holes`), and two ways to find one: by its exact size (`HoleSizes`), and
the lowest one that is large enough (`HoleAddresses`).
"""

from collections.abc import Iterable

from .base import assert_tiles


class Holes:
    """The maximal runs of free blocks, each known by both ends (Knuth's boundary tags, TAOCP 1,
    2.5), so that freed blocks find the holes beside them in O(1).

    Every hole is also in an index, where a placement searches: a hole that begins at one of
    ``ends``, the blocks behind allocations that are to grow, is a gap and in ``gaps``, any other in
    ``index``.
    """

    __slots__ = ("at", "ending", "ends", "free_blocks", "gaps", "index")

    def __init__(
        self,
        num_blocks: int,
        index: "HoleSizes | HoleAddresses",
        gaps: "HoleSizes | None" = None,
    ):
        self.free_blocks = num_blocks
        self.at: dict[int, int] = {0: num_blocks}  # first block of a hole -> its size
        self.ending: dict[int, int] = {num_blocks: 0}  # block behind a hole -> its first block
        self.ends: set[int] = set()
        self.index, self.gaps = index, gaps
        index.add(0, num_blocks)

    def drop(self, hole: int) -> None:
        """Remove the hole at ``hole`` from its index, before `take`."""
        (self.gaps if hole in self.ends else self.index).remove(hole, self.at[hole])

    def take(self, hole: int, start: int, num_blocks: int, ends: bool = False) -> None:
        """Take blocks from ``start`` on out of the hole at ``hole``, which is in no index any more.
        ``ends``: an allocation that is to grow ends with them.
        """
        at, all_ends = self.at, self.ends
        self.free_blocks -= num_blocks
        hole_end, end = hole + at.pop(hole), start + num_blocks
        if ends:
            all_ends.add(end)
        if start > hole:
            at[hole] = start - hole
            self.ending[start] = hole
            (self.gaps if hole in all_ends else self.index).add(hole, start - hole)
        if end < hole_end:
            at[end] = hole_end - end
            self.ending[hole_end] = end
            (self.gaps if end in all_ends else self.index).add(end, hole_end - end)
        else:
            del self.ending[hole_end]

    def give(self, start: int, num_blocks: int, ended: bool = False) -> None:
        """Make blocks free, joined with the holes beside them. ``ended``: an allocation that was to
        grow ended with them.
        """
        at, all_ends = self.at, self.ends
        self.free_blocks += num_blocks
        end = hole_end = start + num_blocks
        if (behind := at.pop(end, None)) is not None:
            (self.gaps if end in all_ends else self.index).remove(end, behind)
            hole_end += behind
        if ended:
            all_ends.remove(end)
        if (before := self.ending.pop(start, None)) is not None:
            (self.gaps if before in all_ends else self.index).remove(before, start - before)
            start = before
        at[start] = hole_end - start
        self.ending[hole_end] = start
        (self.gaps if start in all_ends else self.index).add(start, hole_end - start)

    def set_end(self, block: int, ends: bool) -> None:
        """Add ``block`` to ``ends``, or remove it; a hole there changes its index."""
        size = self.at.get(block)
        if size:
            (self.index if ends else self.gaps).remove(block, size)
            (self.gaps if ends else self.index).add(block, size)
        (self.ends.add if ends else self.ends.remove)(block)

    def check(self, held: Iterable[tuple[int, int]], num_blocks: int) -> None:
        """`AssertionError` unless the holes and ``held`` (first block, blocks) fill the pool, and
        both ends and the indexes agree.
        """
        assert_tiles([*self.at.items(), *held], num_blocks)
        assert self.free_blocks == sum(self.at.values())
        assert self.ending == {start + size: start for start, size in self.at.items()}
        assert not any(start in self.ending for start in self.at), (
            "two neighbouring holes were not joined"
        )
        for index, are_gaps in ((self.gaps, True), (self.index, False)):
            kept = {at: size for at, size in self.at.items() if (at in self.ends) == are_gaps}
            if index is not None:
                index.check(kept)
            else:
                assert not kept


class HoleSizes:
    """Holes by exact size, and a bitmap of the sizes in two levels: 1,024 words of 1,024 bits hold
    a million sizes.

    A size without holes keeps its bit until a search meets it, so a hole that is cut and joined
    again and again changes no bits. Every bit is cleared at most as often as it was set, so each
    call is O(1), amortised, up to some million blocks; beyond, the upper word grows by a bit for
    every 1,024 blocks.
    """

    __slots__ = ("_holes", "_sizes", "_words")

    def __init__(self, largest: int):
        # word w, bit b: size 1024 w + b is a key of `_holes`
        self._sizes = [0] * ((largest >> 10) + 1)
        self._words = 0  # bit w: word w of `_sizes` is not zero
        # size -> first blocks, in the order in which they became holes; may be empty
        self._holes: dict[int, dict[int, None]] = {}

    def add(self, start: int, size: int) -> None:
        try:
            self._holes[size][start] = None
        except KeyError:
            self._holes[size] = {start: None}
            self._sizes[size >> 10] |= 1 << (size & 1023)
            self._words |= 1 << (size >> 10)

    def remove(self, start: int, size: int) -> None:
        del self._holes[size][start]

    def largest(self) -> int:
        while self._words:
            word = self._words.bit_length() - 1
            size = (word << 10) + self._sizes[word].bit_length() - 1
            if self._holes[size]:
                return size
            self._forget(size)
        return 0

    def smallest_from(self, size: int) -> int | None:
        """The smallest size of a hole that is at least ``size``; None where all are smaller."""
        if self._holes.get(size):
            return size
        word = size >> 10
        if word >= len(self._sizes):
            return None
        while found := self._sizes[word] >> (size & 1023):
            least = size + (found & -found).bit_length() - 1
            if self._holes[least]:
                return least
            self._forget(least)
        while words := self._words >> (word + 1):
            next_word = word + (words & -words).bit_length()
            found = self._sizes[next_word]
            least = (next_word << 10) + (found & -found).bit_length() - 1
            if self._holes[least]:
                return least
            self._forget(least)
        return None

    def pop(self, size: int) -> int:
        """Remove the hole that `one_of` finds; its first block."""
        return self._holes[size].popitem()[0]

    def one_of(self, size: int) -> int:
        """First block of the youngest hole of exactly ``size``. O(1), since a dict finds its last
        key at once; its first key would take a search.
        """
        holes = self._holes[size]
        start, _ = holes.popitem()
        holes[start] = None
        return start

    def check(self, holes: dict[int, int]) -> None:
        """`AssertionError` unless exactly ``holes`` (first block -> size) are known."""
        assert {start: size for size, starts in self._holes.items() for start in starts} == holes
        assert self.largest() == max(holes.values(), default=0)

    def _forget(self, size: int) -> None:
        """Clear the bit of a size without holes."""
        del self._holes[size]
        self._sizes[size >> 10] ^= 1 << (size & 1023)
        if not self._sizes[size >> 10]:
            self._words ^= 1 << (size >> 10)


class HoleAddresses:
    """The lowest hole of at least a size, in O(log n): a tournament tree over stretches of the
    pool.

    Every stretch of `STRETCH_BLOCKS` blocks knows the holes that begin in it and the largest of
    them; every node of the tree knows the largest hole below it. A change climbs no
    farther than it matters.
    """

    __slots__ = ("_first_leaf", "_holes", "_largest")

    STRETCH_BLOCKS = 256

    def __init__(self, num_blocks: int):
        num_stretches = -(-num_blocks // self.STRETCH_BLOCKS)
        self._first_leaf = 1 << (num_stretches - 1).bit_length()
        self._largest = [0] * (2 * self._first_leaf)  # a heap: node i has children 2i and 2i + 1
        # stretch -> first block of a hole -> its size
        self._holes: list[dict[int, int]] = [{} for _ in range(num_stretches)]

    def add(self, start: int, size: int) -> None:
        stretch = start // self.STRETCH_BLOCKS
        self._holes[stretch][start] = size
        node, largest = self._first_leaf + stretch, self._largest
        while node and largest[node] < size:
            largest[node] = size
            node >>= 1

    def remove(self, start: int, size: int) -> None:
        stretch = start // self.STRETCH_BLOCKS
        holes = self._holes[stretch]
        del holes[start]
        node, largest = self._first_leaf + stretch, self._largest
        if largest[node] > size:
            return
        left = max(holes.values(), default=0)
        while largest[node] != left:
            largest[node] = left
            if node == 1:
                return
            left = max(left, largest[node ^ 1])
            node >>= 1

    def largest(self) -> int:
        return self._largest[1]

    def lowest_from(self, size: int) -> int | None:
        """First block of the lowest hole of at least ``size``; None where all are smaller."""
        node, largest = 1, self._largest
        if largest[1] < size:
            return None
        while node < self._first_leaf:
            node *= 2
            if largest[node] < size:
                node += 1
        return min(
            start for start, found in self._holes[node - self._first_leaf].items() if found >= size
        )

    def check(self, holes: dict[int, int]) -> None:
        """`AssertionError` unless exactly ``holes`` (first block -> size) are known, and every node
        knows the largest hole below it.
        """
        assert {start: size for found in self._holes for start, size in found.items()} == holes
        for stretch, found in enumerate(self._holes):
            assert self._largest[self._first_leaf + stretch] == max(found.values(), default=0)
        for node in range(1, self._first_leaf):
            assert self._largest[node] == max(self._largest[2 * node], self._largest[2 * node + 1])
