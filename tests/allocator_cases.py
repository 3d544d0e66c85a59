"""The promises of every strategy, tested beside a bitmap that cannot be wrong. A new strategy is
one more entry in `CASES`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from cortexlab import Extent, make_allocator
from cortexlab.allocators import Allocator, merged
from cortexlab.lab import conformance as proving
from cortexlab.lab.conformance import has_enough, has_hole

REGION = 3  # blocks of a static region


def blocks_of(extents) -> list[int]:
    return [block for extent in extents for block in range(extent.start, extent.end)]


class Bitmap(proving.Bitmap):
    """The naive model of a pool, with the question that placement rules ask."""

    def run_at(self, block: int) -> int:
        """Free blocks from ``block`` on."""
        end = self.used.find(1, block)
        return (len(self.used) if end < 0 else end) - block


@dataclass(frozen=True)
class Case:
    """A strategy's placement rule on the bitmap, asked before the allocator is."""

    make: Callable[[int], Allocator]
    has_room: Callable[[Bitmap, int], bool]
    can_extend: Callable[[Bitmap, tuple[Extent, ...], int], bool]
    # blocks that a request really gets
    handed_out: Callable[[Bitmap, int], int] = lambda pool, wanted: wanted
    # asked before the extents are marked
    well_placed: Callable[[Bitmap, tuple[Extent, ...], int], bool] = lambda *_: True
    one_extent: bool = True
    # blocks at the front, of as many held, that come back where some are given back
    given_back: Callable[[int, int], int] = lambda held, asked: asked
    model: Callable[[int], Bitmap] = Bitmap


# --- contiguous, static, buddy --------------------------------------------------------------------


def has_hole_behind(pool: Bitmap, extents: tuple[Extent, ...], wanted: int) -> bool:
    return pool.run_at(extents[-1].end) >= wanted


def never(pool: Bitmap, extents: tuple[Extent, ...], wanted: int) -> bool:
    return False


def has_aligned_run(pool: Bitmap, size: int) -> bool:
    free = bytes(size)
    return any(
        pool.used[start : start + size] == free
        for start in range(0, len(pool.used) - size + 1, size)
    )


def has_free_region(pool: Bitmap, wanted: int) -> bool:
    size = min(REGION, len(pool.used))
    return wanted <= size and has_aligned_run(pool, size)


def power_of_two(wanted: int) -> int:
    return 1 << (wanted - 1).bit_length()


def has_free_buddy_behind(pool: Bitmap, extents: tuple[Extent, ...], wanted: int) -> bool:
    """Doubling in place: every time the extent must be the lower half, and the upper one free and
    inside the pool.
    """
    (extent,) = extents
    size = extent.num_blocks
    while size < extent.num_blocks + wanted:
        upper = extent.start + size
        if (
            extent.start % (2 * size)
            or upper + size > len(pool.used)
            or any(pool.used[upper : upper + size])
        ):
            return False
        size *= 2
    return True


def whole_halves(held: int, asked: int) -> int:
    """The most blocks, at most those asked, that leave a power of two, or nothing."""
    rests = [0, *(1 << order for order in range(held.bit_length()))]
    return max(held - rest for rest in rests if held - rest <= asked)


# --- CortexStream's buddy: its room depends on the history of its pieces --------------------------


class PublishedBuddy(Bitmap):
    """The steps of the published code, in its order: sorted lists by size, one split, neighbours
    joined.
    """

    def __init__(self, num_blocks: int):
        super().__init__(num_blocks)
        self.lists = {1 << order: [] for order in range(num_blocks.bit_length())}
        self.lists[max(self.lists)].append(0)

    def next_extent(self, wanted: int) -> Extent | None:
        size = power_of_two(wanted)
        if self.lists.get(size):
            return Extent(self.lists[size][0], size)
        while 2 * size <= len(self.used):
            if self.lists[2 * size]:
                return Extent(self.lists[2 * size][0], size)
            size *= 2
        return None

    def mark(self, extents, used: bool) -> None:
        super().mark(extents, used)
        for start, size in extents:
            if not used:
                self.lists[size].append(start)
                self.coalesce(size)
            elif start in self.lists[size]:
                self.lists[size].remove(start)
            else:
                self.lists[2 * size].remove(start)
                self.lists[size].append(start + size)

    def coalesce(self, size: int) -> None:
        pieces = self.lists[size]
        pieces.sort()
        for first, second in pairwise(pieces):
            if second == first + size:
                pieces.remove(first)
                pieces.remove(second)
                self.lists[2 * size].append(first)
                return self.coalesce(2 * size)


# --- the table ------------------------------------------------------------------------------------


def in_the_lowest_hole(pool: Bitmap, extents: tuple[Extent, ...], wanted: int) -> bool:
    return extents[0].start == pool.used.find(bytes(wanted))


def in_the_smallest_hole(pool: Bitmap, extents: tuple[Extent, ...], wanted: int) -> bool:
    start = extents[0].start
    return (start == 0 or pool.used[start - 1]) and pool.run_at(start) == min(
        hole for hole in pool.holes if hole >= wanted
    )


def contiguous(name: str, **more) -> Case:
    return Case(
        lambda num_blocks: make_allocator(name, num_blocks), has_hole, has_hole_behind, **more
    )


CASES = {
    "static": Case(
        make=lambda num_blocks: make_allocator("static", num_blocks, region_blocks=REGION),
        has_room=has_free_region,
        can_extend=never,
        handed_out=lambda pool, wanted: min(REGION, len(pool.used)),
    ),
    "first_fit": contiguous("first_fit", well_placed=in_the_lowest_hole),
    "cortexstream": contiguous("cortexstream", well_placed=in_the_lowest_hole),
    "best_fit": contiguous("best_fit", well_placed=in_the_smallest_hole),
    "segregated": contiguous("segregated"),
    "buddy": Case(
        make=lambda num_blocks: make_allocator("buddy", num_blocks),
        has_room=lambda pool, wanted: has_aligned_run(pool, power_of_two(wanted)),
        can_extend=has_free_buddy_behind,
        handed_out=lambda pool, wanted: power_of_two(wanted),
        given_back=whole_halves,
    ),
    "cortexstream_buddy": Case(
        make=lambda num_blocks: make_allocator("cortexstream_buddy", num_blocks),
        has_room=lambda pool, wanted: pool.next_extent(wanted) is not None,
        can_extend=never,
        handed_out=lambda pool, wanted: pool.next_extent(wanted).num_blocks,
        well_placed=lambda pool, extents, wanted: extents == (pool.next_extent(wanted),),
        model=PublishedBuddy,
    ),
    "paged": Case(
        make=lambda num_blocks: make_allocator("paged", num_blocks),
        has_room=has_enough,
        can_extend=lambda pool, extents, wanted: has_enough(pool, wanted),
        one_extent=False,
    ),
    "runs": Case(
        make=lambda num_blocks: make_allocator("runs", num_blocks),
        has_room=has_enough,
        can_extend=lambda pool, extents, wanted: has_enough(pool, wanted),
        one_extent=False,
    ),
}


# --- an allocator and its bitmap, side by side ----------------------------------------------------


class Pair:
    """Does every step to both, and asserts that they agree on the blocks of every allocation, on
    what can still be allocated, and on the statistics.
    """

    def __init__(self, case: Case, num_blocks: int):
        self.case, self.pool, self.model = case, case.make(num_blocks), case.model(num_blocks)
        self.live: list[tuple[Extent, ...]] = []

    def allocate(self, wanted: int) -> None:
        size = (
            self.case.handed_out(self.model, wanted)
            if self.case.has_room(self.model, wanted)
            else None
        )
        extents = self.pool.allocate(wanted)
        assert (extents is None) == (size is None), (
            f"{wanted} blocks: {extents}, but {size} can be had"
        )
        if extents is not None:
            assert self.case.well_placed(self.model, extents, wanted), (
                f"{wanted} blocks: {extents} is not well placed"
            )
            self.take(extents, size)

    def extend(self, number: int, wanted: int) -> None:
        old = self.live[number]
        before = sum(extent.num_blocks for extent in old)
        possible = self.case.can_extend(self.model, old, wanted)
        new = self.pool.extend(old, wanted)
        assert (new is not None) == possible, f"{old} + {wanted} blocks: {new}"
        if new is not None:
            assert blocks_of(new)[:before] == blocks_of(old), "tokens keep their places"
            size = self.case.handed_out(self.model, before + wanted)
            self.give_up(number)
            self.take(new, size)

    def free(self, *numbers: int) -> None:
        """Several allocations are freed as one tuple, one behind the other."""
        allocations = [self.live[number] for number in numbers]
        self.pool.free(allocations[0] if len(numbers) == 1 else sum(allocations, ()))
        for allocation in allocations:
            self.give_up(self.live.index(allocation))

    def release_front(self, number: int, asked: int) -> None:
        old = self.live[number]
        asked = min(asked, len(blocks_of(old)))
        new = self.pool.release_front(old, asked)
        given = self.case.given_back(len(blocks_of(old)), asked)
        assert blocks_of(new) == blocks_of(old)[given:]
        self.give_up(number)
        if new:
            self.take(new, len(blocks_of(old)) - given)

    def agree(self) -> None:
        assert self.pool.free_blocks == self.model.free_blocks, (
            "free_blocks before stats() is asked"
        )
        stats, holes, free = self.pool.stats(), self.model.holes, self.model.free_blocks
        longest = max(holes, default=0)
        assert stats == {
            "free_blocks": free,
            "used_blocks": len(self.model.used) - free,
            "largest_free_run": longest,
            "num_holes": len(holes),
            "external_fragmentation": 1 - longest / free if free else 0.0,
        }

    def take(self, extents: tuple[Extent, ...], num_blocks: int) -> None:
        blocks = blocks_of(extents)
        assert len(set(blocks)) == len(blocks) == num_blocks
        assert not any(self.model.used[block] for block in blocks), "a block was handed out twice"
        assert merged(extents) == extents, "neighbours are one extent"
        assert len(extents) == 1 or not self.case.one_extent
        self.model.mark(extents, True)
        self.live.append(extents)

    def give_up(self, number: int) -> None:
        self.model.mark(self.live.pop(number), False)


def random_step(pair: Pair, rng: random.Random, largest: int) -> None:
    """Allocate, extend or free. About half the steps free, so that the pool is sometimes full and
    sometimes empty.
    """
    choice = rng.random()
    if not pair.live or choice < 0.45:
        pair.allocate(rng.randint(1, largest))
    elif choice < 0.6:
        pair.extend(rng.randrange(len(pair.live)), rng.randint(1, 4))
    elif choice < 0.7 and hasattr(pair.pool, "release_front"):
        pair.release_front(rng.randrange(len(pair.live)), rng.randint(1, largest))
    elif choice < 0.75 and len(pair.live) > 1:
        pair.free(*rng.sample(range(len(pair.live)), 2))
    else:
        pair.free(rng.randrange(len(pair.live)))
