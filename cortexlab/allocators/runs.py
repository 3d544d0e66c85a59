"""Runs: long runs for prompts, growth in place where it can, dust for the rest. Paged's memory at
contiguous's speed.

    blocks   A A A A . . B B B B b . . C C c a . . c
                     hole          gap of B    gap of A

Capitals are blocks of prompts, small letters blocks that sequences grew into. C has no gap behind
it, so its next block starts elsewhere.

A *hole* is a maximal run of free blocks. It is a *gap* when the block before it is the last of an
allocation, which can then grow in place. Any n free blocks serve a request of n, in the few extents
that these rules find:

- A prompt takes the smallest hole that leaves *room* to grow behind it and, in a gap, before it;
  else the smallest hole that holds it; where none does, the longest holes.
- Growth takes the block behind. Where that block is used, growth starts elsewhere, with room too,
  and without such a place in the *smallest* hole: growth eats the dust, so that long runs are left
  to prompts.
- The room is an even share of the blocks that admissions leave free: a minimum that decays. Room
  that the next prompt takes away again is worse than none, since it has cut up a run; where prompts
  take the last block there is no room at all.
- `compact`, which a block manager calls before it allocates: where no hole is large enough, few
  used blocks between two holes make way, to behind the rest of their own sequence or else into
  dust. The blocks it may copy are a share of the blocks allocated.

`Holes` and `HoleSizes` find holes by both ends and by exact size: a call is O(extents handed out or
taken back), however large the pool.
"""

from collections.abc import Container, Iterable
from itertools import islice

from ..errors import a_number, at_least
from .base import (
    NEW,
    Extent,
    FrontBySplit,
    Live,
    Moved,
    Stats,
    allocation_in,
    allocations_in,
    merged,
    pool_stats,
    split_off,
)
from .holes import Holes, HoleSizes

Place = tuple[int, int, int]  # a hole, the block to start at, how many blocks
Step = tuple[int, int, int]  # an allocation's first block, index of an extent, hole to move it to

MAX_COPIES = 16  # blocks that one `compact` copies at most
MAX_BRIDGE = 2  # used blocks between two holes that `compact` moves at most to join them
PATIENCE = 1 / 32  # decay of the minimum of free blocks after an admission: half in 22 admissions
HOLES_LOOKED_AT = 16  # holes that `compact` looks at for one move, the youngest first


class Runs(FrontBySplit):
    """``gap_blocks``: the most blocks of room left behind a sequence. ``copy_share``: blocks that
    `compact` may copy, in the long run, for each block of the allocations it is called for.
    """

    def __init__(self, num_blocks: int, *, gap_blocks: int = 8, copy_share: float = 0.02):
        self.num_blocks = num_blocks = at_least("num_blocks", num_blocks, 1)
        self.gap_blocks = at_least("gap_blocks", gap_blocks, 0)
        self.copy_share = a_number("copy_share", copy_share, 0, 1)
        self._credit = 0.0  # blocks that may be copied
        self._left_over: float = num_blocks  # decaying minimum of the blocks free after admissions
        self._gaps = HoleSizes(num_blocks)  # holes that begin where an allocation ends
        self._sizes = HoleSizes(num_blocks)  # holes that are no gaps
        self._holes = Holes(num_blocks, self._sizes, self._gaps)
        self._live: Live = {}
        self._fixed: set[int] = set()  # single blocks that were split off and do not grow
        # first block of an extent, unless an allocation's first -> the allocation, index in it
        self._chained: dict[int, tuple[int, int]] = {}

    @property
    def free_blocks(self) -> int:
        return self._holes.free_blocks

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if num_blocks.__class__ is not int or num_blocks < 1:  # saves a call, a tenth of the time
            num_blocks = at_least("num_blocks", num_blocks, 1)
        if num_blocks > self._holes.free_blocks:
            return None
        hole, start, size = self._place(num_blocks)
        self._holes.take(hole, start, size, size == num_blocks)
        if size == num_blocks:
            self._live[start] = extents = (NEW(Extent, (start, size)),)
        else:
            extents = self._scatter(Extent(start, size), num_blocks - size)
        free, left_over = self._holes.free_blocks, self._left_over
        self._left_over = free if free < left_over else left_over + (free - left_over) * PATIENCE
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Grow in place; where the block behind is used, add an extent elsewhere."""
        whole = allocation_in(self._live, extents)
        if (num_blocks := at_least("num_blocks", num_blocks, 1)) > self._holes.free_blocks:
            return None
        *rest, (start, size) = whole
        first = whole[0].start
        if first in self._fixed:
            self._fixed.remove(first)
            self._holes.set_end(start + size, True)
        while num_blocks:
            end = start + size
            if more := min(num_blocks, self._holes.at.get(end, 0)):
                self._holes.drop(end)
                self._holes.take(end, end, more, ends=True)
                size += more
            else:
                hole, at, more = self._place(num_blocks, growth=True)
                self._holes.take(hole, at, more, ends=True)
                rest.append(Extent(start, size))
                self._chained[at] = first, len(rest)
                start, size = at, more
            self._holes.ends.remove(end)
            num_blocks -= more
        self._live[first] = grown = (*rest, Extent(start, size))
        return grown

    def free(self, extents: Iterable[Extent]) -> None:
        for whole in allocations_in(self._live, extents):
            del self._live[whole[0].start]
            for start, size in whole[:-1]:
                self._holes.give(start, size)
            self._unchain(whole)
            start, size = whole[-1]
            self._holes.give(start, size, ended=start not in self._fixed)
            self._fixed.discard(start)

    def split(
        self, extents: tuple[Extent, ...], num_blocks: int
    ) -> tuple[list[tuple[Extent, ...]], tuple[Extent, ...]]:
        """As `OptionalParts.split`. Single blocks do not grow, so no room is left behind them."""
        whole = allocation_in(self._live, extents)
        grows = whole[0].start not in self._fixed
        singles, rest = split_off(self._live, whole, num_blocks)
        self._unchain(whole)
        self._chain(rest)
        self._fixed.update(one[0].start for one in singles)
        if grows and not rest:
            self._holes.set_end(whole[-1].end, False)
        return singles, rest

    def stats(self) -> Stats:
        return pool_stats(
            self.num_blocks, self._holes.free_blocks, self._largest(), len(self._holes.at)
        )

    def check(self) -> None:
        self._holes.check(
            (extent for whole in self._live.values() for extent in whole), self.num_blocks
        )
        assert self._holes.ends == {
            whole[-1].end for first, whole in self._live.items() if first not in self._fixed
        }
        assert all(sum(size for _, size in self._live[first]) == 1 for first in self._fixed)
        chained = {
            extent.start: (first, index)
            for first, whole in self._live.items()
            for index, extent in enumerate(whole)
            if index
        }
        assert self._chained == chained
        assert all(
            merged(whole) == whole and whole[0].start == first
            for first, whole in self._live.items()
        )

    # --- where to ---------------------------------------------------------------------------------

    def _place(self, num_blocks: int, growth: bool = False) -> Place:
        """A place for ``num_blocks``, or for fewer where no hole holds so many. Its hole is out of
        the index, for `Holes.take`.
        """
        free, left_over, gap_blocks = self._holes.free_blocks, self._left_over, self.gap_blocks
        room = int(
            (free if free < left_over else left_over) / (len(self._live) - len(self._fixed) + 1)
        )
        place = (
            self._fit(num_blocks, room if room < gap_blocks else gap_blocks)
            if room or not growth
            else None
        )
        if place is None and room and not growth:
            place = self._fit(num_blocks, 0)
        return place or self._part(num_blocks, growth)

    def _fit(self, num_blocks: int, room: int) -> Place | None:
        """A place in the smallest hole that has ``room`` behind it and, in a gap, before it."""
        size = self._sizes.smallest_from(num_blocks + room)
        gap_size = self._gaps.smallest_from(num_blocks + 2 * room)
        if size is not None and (gap_size is None or size <= gap_size):
            hole = self._sizes.pop(size)
            return hole, hole, num_blocks
        if gap_size is None:
            return None
        hole = self._gaps.pop(gap_size)
        return hole, hole + (room or gap_size - num_blocks), num_blocks

    def _part(self, num_blocks: int, growth: bool) -> Place:
        """A place where no hole fits: the longest hole for prompts, the smallest for growth, the
        far half of a gap where all holes are gaps.
        """
        sizes, gaps = self._sizes, self._gaps
        size, gap_size = sizes.smallest_from(1) if growth else sizes.largest(), gaps.largest()
        if size and (growth or size >= gap_size):
            hole = sizes.pop(size)
            return hole, hole, min(num_blocks, size)
        hole, size = gaps.pop(gap_size), min(num_blocks, gap_size)
        return hole, hole + (gap_size - size + 1) // 2, size

    def _scatter(self, extent: Extent, num_blocks: int) -> tuple[Extent, ...]:
        """A new allocation of ``extent`` and of ``num_blocks`` more in other places, the longest
        first.
        """
        extents = [extent]
        while num_blocks:
            hole, start, size = self._place(num_blocks)
            self._holes.take(hole, start, size, size == num_blocks)
            extents.append(Extent(start, size))
            num_blocks -= size
        self._live[extent.start] = whole = merged(extents)
        self._chain(whole)
        return whole

    def _largest(self) -> int:
        return max(self._sizes.largest(), self._gaps.largest())

    def _chain(self, whole: tuple[Extent, ...]) -> None:
        for index, (start, _) in enumerate(whole[1:], 1):
            self._chained[start] = whole[0].start, index

    def _unchain(self, whole: tuple[Extent, ...]) -> None:
        for start, _ in whole[1:]:
            del self._chained[start]

    # --- compaction -------------------------------------------------------------------------------

    def compact(self, num_blocks: int) -> list[Moved]:
        """Make room for an allocation of ``num_blocks`` that would be scattered otherwise. Returns
        the moves in the order of their copies, of at most `MAX_COPIES` blocks.

        An allocation moves at most once a call, and its first extent never.
        """
        moved: dict[int, Moved] = {}  # by the allocation's first block
        if num_blocks > self._holes.free_blocks:
            return []
        self._credit = min(MAX_COPIES, self._credit + num_blocks * self.copy_share)
        while self._credit >= 1 and self._largest() < num_blocks:
            steps = self._bridge(min(int(self._credit), MAX_BRIDGE), moved)
            if steps is None:
                break
            for first, index, target in steps:
                self._credit -= self._live[first][index].num_blocks
                moved[first] = self._move(first, index, target)
        return list(moved.values())

    def _bridge(self, most: int, skip: Container[int]) -> list[Step] | None:
        """Steps that join two holes by moving at most ``most`` blocks. The best pair has the
        longest shorter hole for each block copied.
        """
        best, best_gain = None, 0.0
        for start in islice(reversed(self._holes.at), HOLES_LOOKED_AT):
            end = start + self._holes.at[start]
            used = self._used_behind(end, most, skip)
            if not used:
                continue
            blocks = sum(extent.num_blocks for extent in used.values())
            behind = self._holes.at[end + blocks]
            gain = min(end - start, behind) / blocks
            if gain > best_gain and (
                steps := self._steps(used, {start, end + blocks}, end - start + blocks + behind)
            ):
                best, best_gain = steps, gain
        return best

    def _used_behind(self, block: int, most: int, skip: Container[int]) -> dict[int, Extent] | None:
        """The extents from ``block`` to the next hole, by allocation; None where they have more
        than ``most`` blocks or may not move.
        """
        used: dict[int, Extent] = {}
        while block not in self._holes.at:
            first, index = self._chained.get(block, (None, 0))
            if first is None or first in skip or first in used:
                return None
            used[first] = extent = self._live[first][index]
            most -= extent.num_blocks
            if most < 0:
                return None
            block = extent.end
        return used

    def _steps(self, used: dict[int, Extent], taken: set[int], joined: int) -> list[Step] | None:
        """A step for each extent: to behind the rest of its sequence, else into the smallest hole
        outside ``taken``. None where that hole is larger than the ``joined`` blocks to be won.
        """
        steps = []
        for first, extent in used.items():
            index = self._chained[extent.start][1]
            own = self._live[first][index - 1].end
            in_place = own not in taken and self._holes.at.get(own, 0) >= extent.num_blocks
            target = own if in_place else self._dust(extent.num_blocks, taken)
            if target is None or (not in_place and self._holes.at[target] > joined):
                return None
            taken.add(target)
            steps.append((first, index, target))
        return steps

    def _dust(self, num_blocks: int, taken: Container[int]) -> int | None:
        for sizes in (self._sizes, self._gaps):
            size = sizes.smallest_from(num_blocks)
            while size is not None:
                if (start := sizes.one_of(size)) not in taken:
                    return start
                size = sizes.smallest_from(size + 1)
        return None

    def _move(self, first: int, index: int, target: int) -> Moved:
        """Copy one extent to the start of the hole at ``target``."""
        whole = self._live[first]
        source = whole[index]
        copy = Extent(target, source.num_blocks)
        after = merged((*whole[:index], copy, *whole[index + 1 :]))
        last = index == len(whole) - 1
        self._holes.drop(target)
        self._holes.take(target, target, copy.num_blocks, ends=last)
        self._holes.give(*source, ended=last)
        self._unchain(whole)
        self._chain(after)
        self._live[first] = after
        return whole, after, ((source, copy),)
