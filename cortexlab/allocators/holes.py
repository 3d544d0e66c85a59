"""Two ways to find a hole: by its exact size (`HoleSizes`), and the lowest one that is large enough
(`HoleAddresses`).
"""


class HoleSizes:
    """Holes by exact size, and a bitmap in two levels of the sizes there are: 1,024 words of 1,024
    bits hold a million sizes.

    A size whose last hole has gone keeps its bit until a search comes across it: a hole that is cut
    and joined again, again and again, then changes no bits. Every bit is cleared at most as often
    as it was set, so all is O(1), amortised, up to some million blocks; from there on the upper
    word grows by a bit for every 1,024.
    """

    __slots__ = ("_holes", "_sizes", "_words")

    def __init__(self, largest: int):
        self._sizes = [0] * (
            (largest >> 10) + 1
        )  # word w, bit b: size 1024 w + b is a key of `_holes`
        self._words = 0  # bit w: word w is not zero
        self._holes: dict[
            int, dict[int, None]
        ] = {}  # size -> first blocks, in the order they became holes; may be empty

    def add(self, start: int, size: int) -> None:
        try:
            self._holes[size][start] = None
        except KeyError:
            self._holes[size] = {start: None}
            self._sizes[size >> 10] |= 1 << (size & 1023)
            self._words |= 1 << (size >> 10)

    def remove(self, start: int, size: int) -> None:
        del self._holes[size][start]

    def pop(self, size: int) -> int:
        """`one_of`, removed."""
        return self._holes[size].popitem()[0]

    def largest(self) -> int:
        while self._words:
            word = self._words.bit_length() - 1
            size = (word << 10) + self._sizes[word].bit_length() - 1
            if self._holes[size]:
                return size
            self._forget(size)
        return 0

    def smallest_from(self, size: int) -> int | None:
        """The smallest size of a hole that is at least ``size``."""
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

    def one_of(self, size: int) -> int:
        """First block of the hole of exactly ``size`` that became one last. O(1): a dict finds its
        last key at once, its first does not.
        """
        holes = self._holes[size]
        start, _ = holes.popitem()
        holes[start] = None
        return start

    def _forget(self, size: int) -> None:
        """A size without a hole."""
        del self._holes[size]
        self._sizes[size >> 10] ^= 1 << (size & 1023)
        if not self._sizes[size >> 10]:
            self._words ^= 1 << (size >> 10)


class HoleAddresses:
    """The lowest hole of at least a size, in O(log n): a tournament tree over stretches of the
    pool.

    Every stretch of `STRETCH_BLOCKS` knows the holes that begin in it, and the largest of them;
    every node of the tree the largest below it. A change climbs only as far as it makes a
    difference.
    """

    __slots__ = ("_first_leaf", "_holes", "_largest")

    STRETCH_BLOCKS = 256

    def __init__(self, num_blocks: int):
        num_stretches = -(-num_blocks // self.STRETCH_BLOCKS)
        self._first_leaf = 1 << (num_stretches - 1).bit_length()
        self._largest = [0] * (
            2 * self._first_leaf
        )  # a heap: node i has the children 2i and 2i + 1
        self._holes: list[dict[int, int]] = [
            {} for _ in range(num_stretches)
        ]  # first block -> size, in any order

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

    def lowest_from(self, size: int) -> int | None:
        """First block of the lowest hole of at least ``size``."""
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
        says the largest below it.
        """
        assert {start: size for found in self._holes for start, size in found.items()} == holes
        for stretch, found in enumerate(self._holes):
            assert self._largest[self._first_leaf + stretch] == max(found.values(), default=0)
        for node in range(1, self._first_leaf):
            assert self._largest[node] == max(self._largest[2 * node], self._largest[2 * node + 1])
