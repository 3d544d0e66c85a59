"""Two ways to find a hole: by its exact size (`HoleSizes`), and the lowest one that is large enough (`HoleAddresses`)."""


class HoleSizes:
    """Holes by exact size, and a bitmap in two levels of the sizes there are: 1,024 words of 1,024 bits hold a million sizes."""

    __slots__ = ("_holes", "_sizes", "_words")

    def __init__(self, largest: int):
        self._sizes = [0] * ((largest >> 10) + 1)  # word w, bit b: a hole of 1024 w + b blocks exists
        self._words = 0  # bit w: word w is not zero
        self._holes: dict[int, dict[int, None]] = {}  # size -> first blocks, in the order they became holes

    def add(self, start: int, size: int) -> None:
        holes = self._holes.get(size)
        if holes is not None:
            holes[start] = None
            return
        self._holes[size] = {start: None}
        self._sizes[size >> 10] |= 1 << (size & 1023)
        self._words |= 1 << (size >> 10)

    def remove(self, start: int, size: int) -> None:
        holes = self._holes[size]
        del holes[start]
        if not holes:
            del self._holes[size]
            self._sizes[size >> 10] ^= 1 << (size & 1023)
            if not self._sizes[size >> 10]:
                self._words ^= 1 << (size >> 10)

    def largest(self) -> int:
        word = self._words.bit_length() - 1
        return (word << 10) + self._sizes[word].bit_length() - 1 if self._words else 0

    def smallest_from(self, size: int) -> int | None:
        """The smallest size of a hole that is at least ``size``."""
        word = size >> 10
        if word >= len(self._sizes):
            return None
        found = self._sizes[word] >> (size & 1023)
        if found:
            return size + _lowest_bit(found)
        words = self._words >> (word + 1)
        if not words:
            return None
        word += 1 + _lowest_bit(words)
        return (word << 10) + _lowest_bit(self._sizes[word])

    def one_of(self, size: int) -> int:
        """First block of the hole of exactly ``size`` that became one last. O(1): a dict finds its last key at once, its first does not."""
        holes = self._holes[size]
        start, _ = holes.popitem()
        holes[start] = None
        return start


class HoleAddresses:
    """The lowest hole of at least a size, in O(log n): a tournament tree over stretches of the pool.

    Every stretch of `STRETCH_BLOCKS` knows the holes that begin in it, and the largest of them; every node of the tree the largest
    below it. A change climbs only as far as it makes a difference.
    """

    __slots__ = ("_first_leaf", "_holes", "_largest")

    STRETCH_BLOCKS = 256

    def __init__(self, num_blocks: int):
        num_stretches = -(-num_blocks // self.STRETCH_BLOCKS)
        self._first_leaf = 1 << (num_stretches - 1).bit_length()
        self._largest = [0] * (2 * self._first_leaf)  # a heap: node i has the children 2i and 2i + 1
        self._holes: list[dict[int, int]] = [{} for _ in range(num_stretches)]  # first block -> size, in any order

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
        return min(start for start, found in self._holes[node - self._first_leaf].items() if found >= size)

    def check(self, holes: dict[int, int]) -> None:
        """`AssertionError` unless exactly ``holes`` (first block -> size) are known, and every node says the largest below it."""
        assert {start: size for found in self._holes for start, size in found.items()} == holes
        for stretch, found in enumerate(self._holes):
            assert self._largest[self._first_leaf + stretch] == max(found.values(), default=0)
        for node in range(1, self._first_leaf):
            assert self._largest[node] == max(self._largest[2 * node], self._largest[2 * node + 1])


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
