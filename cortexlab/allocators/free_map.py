"""Which blocks are free, and how the free ones lie, for allocators that do not know their holes.

    blocks   . . . x  x . . .  . . . .  x x . .        leaves of 4 blocks (512 in earnest), `x` used
    leaf      3 3 0    0 3 3    4 4 4    0 2 2    left, longest, right free run
    node          3 3 3              4 4 2        of two leaves; the root: 3, 7, 2 and 3 holes

Used or free is one byte a block, so a run is marked by one slice assignment. The runs are summed up
in a segment tree (Bentley 1977) whose nodes form a monoid: a pair is summed without looking at its
blocks. The tree is *lazy*: marking only notes which leaves changed, and asking sums those anew, by
searches in C, and their ancestors. So a mark costs O(blocks) at memset's speed, an answer O(changed
leaves x log leaves), each leaf's blocks and one byte a leaf searched at memchr's; where nobody asks
nothing is summed. (A long run counts as two leaves: what lies inside is known.)
"""

from collections.abc import Iterable

from .base import Extent, Stats, pool_stats

FREE, USED = 0, 1
BYTE = (b"\0", b"\1")  # of a FREE and of a USED block
CHUNK = 1 << 16
NOTHING = (0, 0, 0, 0, 0)  # the sum of no blocks
Sum = tuple[
    int, int, int, int, int
]  # blocks, free run at the left end, longest free run, free run at the right end, holes


class FreeMap:
    """All blocks are free at first. Nobody checks that what is marked used was free: the allocator
    has.
    """

    LEAF_BLOCKS = 512  # a power of two; the tests take fewer
    MANY_LEAVES = 8  # a run over more is summed at once

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks
        num_leaves = -(-num_blocks // self.LEAF_BLOCKS)
        self._shift = self.LEAF_BLOCKS.bit_length() - 1  # block >> shift = its leaf
        self._blocks = bytearray(num_blocks)
        self._changed = bytearray(BYTE[USED] * num_leaves)  # 1: this leaf is to be summed anew
        self._first_leaf = 1 << (num_leaves - 1).bit_length()
        self._sums: list[Sum] = [NOTHING] * (
            2 * self._first_leaf
        )  # a heap: node i has the children 2i and 2i + 1

    def mark(self, extents: Iterable[Extent], state: int) -> None:
        """Make the blocks of ``extents``, which were not, ``FREE`` or ``USED``."""
        blocks, changed, shift, byte = self._blocks, self._changed, self._shift, BYTE[state]
        marked = 0
        for start, num_blocks in extents:
            marked += num_blocks
            if num_blocks == 1:  # most of what paging marks: a third of the time of the general way
                blocks[start] = state
                changed[start >> shift] = 1
                continue
            first, last = start >> shift, (start + num_blocks - 1) >> shift
            if last - first >= self.MANY_LEAVES:
                self._mark_many(start, start + num_blocks, state)
                continue
            blocks[start : start + num_blocks] = byte * num_blocks
            if first == last:
                changed[first] = 1
            else:
                changed[first : last + 1] = BYTE[1] * (last + 1 - first)
        self.free_blocks += marked if state == FREE else -marked

    def mark_one(self, block: int, state: int) -> None:
        """`mark` of a single block."""
        self._blocks[block] = state
        self._changed[block >> self._shift] = 1
        self.free_blocks += 1 if state == FREE else -1

    def sum(self) -> Sum:
        """Blocks, free run at the left end, longest free run, free run at the right end, holes: of
        the whole pool.
        """
        self._refresh()
        return self._sums[1]

    def stats(self) -> Stats:
        _, _, longest, _, holes = self.sum()
        return pool_stats(self.num_blocks, self.free_blocks, longest, holes)

    def check(self, free: Iterable[tuple[int, int]]) -> None:
        """`AssertionError` unless exactly the runs ``free`` (first block, blocks) are free, and the
        sums are those of the blocks.
        """
        expected = bytearray(BYTE[USED]) * self.num_blocks
        for start, num_blocks in free:
            expected[start : start + num_blocks] = bytes(num_blocks)
        assert self._blocks == expected, "the map of free blocks is wrong"
        runs = [len(run) for run in bytes(expected).split(BYTE[USED]) if run]
        assert (
            self.sum()[2] == max(runs, default=0)
            and self.sum()[4] == len(runs)
            and self.free_blocks == sum(runs)
        )

    # --- the tree ---------------------------------------------------------------------------------

    def _refresh(self) -> None:
        leaf = self._changed.find(1)
        if leaf < 0:
            return
        sums, nodes = self._sums, set()
        while leaf >= 0:
            node = self._first_leaf + leaf
            sums[node] = self._sum_of_leaf(leaf)
            nodes.add(node >> 1)
            leaf = self._changed.find(1, leaf + 1)
        self._changed = bytearray(len(self._changed))
        while 0 not in nodes:  # level by level; the root's parent would be 0
            for node in nodes:
                sums[node] = joined(sums[2 * node], sums[2 * node + 1])
            nodes = {node >> 1 for node in nodes}

    def _mark_many(self, start: int, end: int, state: int) -> None:
        """Sum a run of many leaves at once: a node all of whose blocks are alike is known. One
        slice a level.
        """
        for at in range(start, end, CHUNK):  # a longer temporary would be mapped anew every time
            stop = min(at + CHUNK, end)
            self._blocks[at:stop] = BYTE[state] * (stop - at)
        size, shift, changed = self.LEAF_BLOCKS, self._shift, self._changed
        whole, behind = (start + size - 1) >> shift, end >> shift  # the leaves that the run covers
        changed[whole:behind] = bytes(behind - whole)
        changed[start >> shift] = changed[(end - 1) >> shift] = (
            1  # every node of which the run covers a part lies above one of the two
        )
        low, high = self._first_leaf + whole, self._first_leaf + behind
        while low < high:
            self._sums[low:high] = [
                (size, size, size, size, 1) if state == FREE else (size, 0, 0, 0, 0)
            ] * (high - low)
            low, high, size = (low + 1) >> 1, high >> 1, 2 * size

    def _sum_of_leaf(self, leaf: int) -> Sum:
        run = bytes(self._blocks[leaf << self._shift : (leaf + 1) << self._shift])
        size = len(run)
        left = run.find(USED)
        if left < 0:
            return (size, size, size, size, 1)
        if run.find(FREE) < 0:
            return (size, 0, 0, 0, 0)
        longest = len(max(run.split(BYTE[USED])))  # all zeros, so the largest is the longest
        return (
            size,
            left,
            longest,
            size - 1 - run.rfind(USED),
            run.count(BYTE[USED] + BYTE[FREE]) + (left > 0),
        )


def joined(a: Sum, b: Sum) -> Sum:
    """The sum of ``a`` and of ``b`` right behind it."""
    a_size, a_left, a_longest, a_right, a_holes = a
    b_size, b_left, b_longest, b_right, b_holes = b
    across = a_right + b_left
    longest = a_longest if a_longest > b_longest else b_longest
    return (
        a_size + b_size,
        a_left if a_left < a_size else a_size + b_left,
        longest if longest > across else across,
        b_right if b_right < b_size else b_size + a_right,
        a_holes + b_holes - (1 if a_right and b_left else 0),
    )
