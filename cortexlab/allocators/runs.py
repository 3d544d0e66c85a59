"""Runs: long runs for prompts, growth in place where it can, dust for the rest. Paged's memory at
contiguous's speed.

    blocks   A A A A . . B B B B b . . C C c a . . c
                     hole          gap of B    gap of A

Capitals are blocks of prompts, small letters blocks that sequences grew into. C has no gap behind
it, so its next block starts elsewhere.

A *hole* is a maximal run of free blocks, and a *gap* when the block before it is the last of an
allocation, which can then grow in place. Whatever n blocks are free serve n, in the few extents
that these rules find:

- A prompt takes the smallest hole that leaves *room* to grow behind it and, in a gap, before it;
  else the smallest that holds it; where none does, the longest holes.
- Growth takes the block behind. Where that is used it starts elsewhere, with room too; and where
  there is no such place in the *smallest* hole: growth eats the dust, so that long runs are left to
  prompts.
- The room is an even share of what admissions have left over lately: a minimum of the free blocks
  that decays. Room that the next prompt takes away again is worse than none, since it has cut up a
  run; where prompts take the last block there is no room at all.
- `compact`, which a block manager calls before it allocates: where no hole is large enough, few
  used blocks between two holes make way, to behind the rest of their own sequence or else into
  dust. What it may copy is a share of what is allocated.

Holes are known by both ends and by exact size, as ``holes`` keeps them: whatever the pool, a call
is O(extents it hands out or takes).
"""

from collections.abc import Container, Iterable
from itertools import islice

from ..errors import BadInput, at_least, shown
from .base import (
    NEW,
    Extent,
    Live,
    Moved,
    Stats,
    allocation_in,
    allocations_in,
    merged,
    pool_stats,
    split_off,
)
from .holes import HoleSizes

Place = tuple[int, int, int]  # a hole, the block to start at, how many blocks
Step = tuple[
    int, int, int
]  # an allocation's first block, which of its extents moves, the hole it moves to

MAX_COPIES = 16  # blocks that one `compact` copies at most
MAX_BRIDGE = 2  # used blocks between two holes that are worth moving
PATIENCE = 1 / 32  # how fast what is left over is trusted again: by half in 22 admissions
HOLES_LOOKED_AT = 16  # by `compact` for one move, the youngest first


class Runs:
    """``gap_blocks``: the most room that a sequence is left to grow. ``copy_share``: blocks that
    `compact` may copy, in the long run, for each block of the allocations it is called for.
    """

    def __init__(self, num_blocks: int, *, gap_blocks: int = 8, copy_share: float = 0.02):
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self.gap_blocks = at_least("gap_blocks", gap_blocks, 0)
        if not (isinstance(copy_share, int | float) and 0 <= copy_share <= 1):
            raise BadInput(f"copy_share must be a number from 0 to 1, not {shown(copy_share)}")
        self.copy_share = copy_share
        self._credit = 0.0  # blocks that may be copied
        self._free_blocks = num_blocks
        self._left_over: float = num_blocks  # by the admissions of late
        self._hole_at: dict[int, int] = {}  # first block of a hole -> its size
        self._hole_ending: dict[int, int] = {}  # block behind a hole -> its first block
        self._gaps = HoleSizes(num_blocks)  # the holes that start where an allocation ends
        self._holes = HoleSizes(num_blocks)  # the others
        self._live: Live = {}
        self._ends: set[int] = set()  # the block behind each allocation that may grow
        self._fixed: set[int] = set()  # first blocks of the others: single ones that were split off
        self._chained: dict[
            int, tuple[int, int]
        ] = {}  # first block of an extent but the first -> its allocation's, its place there
        self._hole_at[0], self._hole_ending[num_blocks] = num_blocks, 0
        self._holes.add(0, num_blocks)

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        if (
            num_blocks.__class__ is not int or num_blocks < 1
        ):  # in here, since the call takes a tenth of the whole
            at_least("num_blocks", num_blocks, 1)
        if num_blocks > self._free_blocks:
            return None
        hole, start, size = self._place(num_blocks)
        self._take(hole, start, size, size == num_blocks)
        if size == num_blocks:
            self._live[start] = extents = (NEW(Extent, (start, size)),)
        else:
            extents = self._scatter(Extent(start, size), num_blocks - size)
        free, left_over = self._free_blocks, self._left_over
        self._left_over = free if free < left_over else left_over + (free - left_over) * PATIENCE
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """Grow in place, and where something stands behind, add an extent elsewhere."""
        whole = allocation_in(self._live, extents)
        if at_least("num_blocks", num_blocks, 1) > self._free_blocks:
            return None
        *rest, (start, size) = whole
        first = whole[0].start
        if first in self._fixed:
            self._fixed.remove(first)
            self._end_at(start + size)
        while num_blocks:
            end = start + size
            if more := min(num_blocks, self._hole_at.get(end, 0)):
                self._take(end, end, more, ends=True)
                size += more
            else:
                hole, at, more = self._place(num_blocks, growth=True)
                self._take(hole, at, more, ends=True)
                rest.append(Extent(start, size))
                self._chained[at] = first, len(rest)
                start, size = at, more
            self._ends.remove(end)
            num_blocks -= more
        self._live[first] = grown = (*rest, Extent(start, size))
        return grown

    def free(self, extents: Iterable[Extent]) -> None:
        for whole in allocations_in(self._live, extents):
            del self._live[whole[0].start]
            if len(whole) > 1:
                for start, size in whole[:-1]:
                    self._give(start, size)
                for start, _ in whole[1:]:
                    del self._chained[start]
            start, size = whole[-1]
            self._give(start, size, ended=start not in self._fixed)
            self._fixed.discard(start)

    def split(
        self, extents: tuple[Extent, ...], num_blocks: int
    ) -> tuple[list[tuple[Extent, ...]], tuple[Extent, ...]]:
        """As `split_off`. Single blocks do not grow, so no room is left behind them."""
        whole = allocation_in(self._live, extents)
        grows = whole[0].start not in self._fixed
        singles, rest = split_off(self._live, whole, num_blocks)
        for start, _ in whole[1:]:
            del self._chained[start]
        self._chain(rest)
        self._fixed.update(one[0].start for one in singles)
        if grows and not rest:
            self._end_at(whole[-1].end, ends=False)
        return singles, rest

    def stats(self) -> Stats:
        return pool_stats(self.num_blocks, self._free_blocks, self._largest(), len(self._hole_at))

    def check(self) -> None:
        at = 0
        for start, size in sorted(
            [*self._hole_at.items(), *(extent for whole in self._live.values() for extent in whole)]
        ):
            assert start == at, f"block {at} is lost or held twice"
            at += size
        assert at == self.num_blocks, f"blocks behind {at} are lost"
        assert self._free_blocks == sum(self._hole_at.values())
        assert self._hole_ending == {start + size: start for start, size in self._hole_at.items()}
        assert not any(start in self._hole_ending for start in self._hole_at), (
            "two neighbouring holes were not joined"
        )
        assert self._ends == {
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
        for holes, are_gaps in ((self._gaps, True), (self._holes, False)):
            assert holes.largest() == max(
                (
                    size
                    for start, size in self._hole_at.items()
                    if (start in self._ends) == are_gaps
                ),
                default=0,
            )

    # --- where to ---------------------------------------------------------------------------------

    def _place(self, num_blocks: int, growth: bool = False) -> Place:
        """A place for ``num_blocks``, or for as many of them as the hole it has to be holds."""
        free, left_over, gap_blocks = self._free_blocks, self._left_over, self.gap_blocks
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
        """In the smallest hole that has ``room`` behind them and, when it is a gap, before them."""
        size, gap_size = (
            self._holes.smallest_from(num_blocks + room),
            self._gaps.smallest_from(num_blocks + 2 * room),
        )
        if size is not None and (gap_size is None or size <= gap_size):
            hole = self._holes.one_of(size)
            return hole, hole, num_blocks
        if gap_size is None:
            return None
        hole = self._gaps.one_of(gap_size)
        return hole, hole + (room or gap_size - num_blocks), num_blocks

    def _part(self, num_blocks: int, growth: bool = False) -> Place:
        """Where nothing fits: prompts take the longest hole, growth the smallest, and the half of a
        gap when there are but gaps.
        """
        holes, gaps = self._holes, self._gaps
        size, gap_size = holes.smallest_from(1) if growth else holes.largest(), gaps.largest()
        if size and (growth or size >= gap_size):
            hole = holes.one_of(size)
            return hole, hole, min(num_blocks, size)
        hole, size = gaps.one_of(gap_size), min(num_blocks, gap_size)
        return hole, hole + (gap_size - size + 1) // 2, size

    def _scatter(self, extent: Extent, num_blocks: int) -> tuple[Extent, ...]:
        """A new allocation of ``extent`` and as many places more as ``num_blocks`` take, the
        longest first.
        """
        extents = [extent]
        while num_blocks:
            hole, start, size = (
                self._place(num_blocks) if num_blocks <= self._largest() else self._part(num_blocks)
            )
            self._take(hole, start, size, size == num_blocks)
            extents.append(Extent(start, size))
            num_blocks -= size
        self._live[extent.start] = whole = merged(extents)
        self._chain(whole)
        return whole

    def _chain(self, whole: tuple[Extent, ...]) -> None:
        for index, (start, _) in enumerate(whole[1:], 1):
            self._chained[start] = whole[0].start, index

    # --- compaction -------------------------------------------------------------------------------

    def compact(self, num_blocks: int) -> list[Moved]:
        """Make room for an allocation of ``num_blocks`` that would be scattered otherwise; what has
        moved, in the order of the copies.

        An allocation moves at most once a call, and never its first extent. At most MAX_COPIES
        blocks.
        """
        moved: dict[int, Moved] = {}  # by the allocation's first block
        if num_blocks > self._free_blocks:
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
        """What to move, at most ``most`` blocks, to join two holes: the longest shorter one for a
        block copied.
        """
        best, best_gain = None, 0.0
        for start in islice(reversed(self._hole_at), HOLES_LOOKED_AT):
            end = start + self._hole_at[start]
            used = self._used_behind(end, most, skip)
            if not used:
                continue
            blocks = sum(extent.num_blocks for extent in used.values())
            behind = self._hole_at[end + blocks]
            gain = min(end - start, behind) / blocks
            if gain > best_gain and (
                steps := self._steps(used, {start, end + blocks}, end - start + blocks + behind)
            ):
                best, best_gain = steps, gain
        return best

    def _used_behind(self, block: int, most: int, skip: Container[int]) -> dict[int, Extent] | None:
        """The extents from ``block`` to the next hole, by allocation; None if they are too many
        blocks or may not move.
        """
        used: dict[int, Extent] = {}
        while block not in self._hole_at:
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
        """Where each extent goes: behind the rest of its sequence, else into the smallest hole, if
        that is no larger than the one of ``joined`` blocks to be won; not into the holes ``taken``.
        """
        steps = []
        for first, extent in used.items():
            index = self._chained[extent.start][1]
            own = self._live[first][index - 1].end
            in_place = own not in taken and self._hole_at.get(own, 0) >= extent.num_blocks
            target = own if in_place else self._dust(extent.num_blocks, taken)
            if target is None or (not in_place and self._hole_at[target] > joined):
                return None
            taken.add(target)
            steps.append((first, index, target))
        return steps

    def _dust(self, num_blocks: int, taken: Container[int]) -> int | None:
        for holes in (self._holes, self._gaps):
            size = holes.smallest_from(num_blocks)
            while size is not None:
                if (start := holes.one_of(size)) not in taken:
                    return start
                size = holes.smallest_from(size + 1)
        return None

    def _move(self, first: int, index: int, target: int) -> Moved:
        """Copy one extent to the start of the hole at ``target``."""
        whole = self._live[first]
        source = whole[index]
        copy = Extent(target, source.num_blocks)
        after = merged((*whole[:index], copy, *whole[index + 1 :]))
        last = index == len(whole) - 1
        self._take(target, target, copy.num_blocks, ends=last)
        self._give(*source, ended=last)
        for start, _ in whole[1:]:
            del self._chained[start]
        self._chain(after)
        self._live[first] = after
        return whole, after, ((source, copy),)

    # --- holes ------------------------------------------------------------------------------------

    def _largest(self) -> int:
        return max(self._holes.largest(), self._gaps.largest())

    def _end_at(self, block: int, ends: bool = True) -> None:
        """An allocation that may grow ends before ``block``, or does no more: a hole there becomes
        a gap, or is one no more.
        """
        size = self._hole_at.get(block)
        if size:
            self._kind(block).remove(block, size)
        (self._ends.add if ends else self._ends.remove)(block)
        if size:
            self._kind(block).add(block, size)

    def _kind(self, start: int) -> HoleSizes:
        """Where the hole at ``start`` is kept."""
        return self._gaps if start in self._ends else self._holes

    def _take(self, hole: int, start: int, num_blocks: int, ends: bool = False) -> None:
        """Take blocks out of a hole; ``ends``: an allocation ends with them."""
        hole_at, all_ends = self._hole_at, self._ends
        kind = (
            self._gaps if hole in all_ends else self._holes
        )  # `_kind`, three times: the calls would take a quarter of it all
        size = hole_at.pop(hole)
        kind.remove(hole, size)
        self._free_blocks -= num_blocks
        end, hole_end = start + num_blocks, hole + size
        if ends:
            all_ends.add(end)
        if start > hole:
            hole_at[hole] = start - hole
            self._hole_ending[start] = hole
            kind.add(hole, start - hole)
        if end < hole_end:
            hole_at[end] = hole_end - end
            self._hole_ending[hole_end] = end
            (self._gaps if end in all_ends else self._holes).add(end, hole_end - end)
        else:
            del self._hole_ending[hole_end]

    def _give(self, start: int, num_blocks: int, ended: bool = False) -> None:
        """Make blocks free, joined with the holes beside them; ``ended``: their allocation ended
        with them.
        """
        hole_at, all_ends = self._hole_at, self._ends
        self._free_blocks += num_blocks
        end = hole_end = start + num_blocks
        if (behind := hole_at.pop(end, None)) is not None:
            (self._gaps if end in all_ends else self._holes).remove(end, behind)
            hole_end += behind
        if ended:
            all_ends.remove(end)
        if (before := self._hole_ending.pop(start, None)) is not None:
            self._kind(before).remove(before, start - before)
            start = before
        hole_at[start] = hole_end - start
        self._hole_ending[hole_end] = start
        (self._gaps if start in all_ends else self._holes).add(start, hole_end - start)
