"""Block allocators: stories on toy pools, then each strategy against a bitmap that cannot be wrong.

A new strategy is one more entry in `CASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from cortexlab import CortexLabError, Extent, make_allocator
from cortexlab.allocators import STRATEGIES, Allocator, merged, strategy_of

REGION = 3  # blocks of a static region


def blocks_of(extents) -> list[int]:
    return [block for extent in extents for block in range(extent.start, extent.end)]


class Bitmap:
    """The naive model of a pool: one flag a block."""

    def __init__(self, num_blocks: int):
        self.used = [False] * num_blocks

    def mark(self, extents, used: bool) -> None:
        for block in blocks_of(extents):
            self.used[block] = used

    @property
    def free_blocks(self) -> int:
        return self.used.count(False)

    @property
    def holes(self) -> list[int]:
        return [len(list(run)) for used, run in groupby(self.used) if not used]

    def run_at(self, block: int) -> int:
        """Free blocks from ``block`` on."""
        end = block
        while end < len(self.used) and not self.used[end]:
            end += 1
        return end - block


@dataclass(frozen=True)
class Case:
    """A strategy's placement rule in the bitmap's words."""

    make: Callable[[int], Allocator]
    has_room: Callable[[Bitmap, int], bool]
    can_extend: Callable[[Bitmap, tuple[Extent, ...], int], bool]
    handed_out: Callable[[int, int], int] = lambda wanted, num_blocks: wanted  # blocks an allocation of so many really gets
    one_extent: bool = True


def has_hole(pool: Bitmap, wanted: int) -> bool:
    return max(pool.holes, default=0) >= wanted


def has_hole_behind(pool: Bitmap, extents: tuple[Extent, ...], wanted: int) -> bool:
    return pool.run_at(extents[-1].end) >= wanted


def has_free_region(pool: Bitmap, wanted: int) -> bool:
    size = min(REGION, len(pool.used))
    regions = (pool.used[start : start + size] for start in range(0, len(pool.used) - size + 1, size))
    return wanted <= size and any(not any(region) for region in regions)


def power_of_two(wanted: int) -> int:
    return 1 << (wanted - 1).bit_length()


def has_free_buddy(pool: Bitmap, wanted: int) -> bool:
    """An aligned run of the next power of two, anywhere in the pool."""
    size = power_of_two(wanted)
    return any(not any(pool.used[start : start + size]) for start in range(0, len(pool.used) - size + 1, size))


def has_free_buddy_behind(pool: Bitmap, extents: tuple[Extent, ...], wanted: int) -> bool:
    """Doubling in place: every time the extent must be the lower half, and the upper one free and inside the pool."""
    (extent,) = extents
    size = extent.num_blocks
    while size < extent.num_blocks + wanted:
        upper = extent.start + size
        if extent.start % (2 * size) or upper + size > len(pool.used) or any(pool.used[upper : upper + size]):
            return False
        size *= 2
    return True


CASES = {
    "static": Case(
        make=lambda num_blocks: make_allocator("static", num_blocks, region_blocks=REGION),
        has_room=has_free_region,
        can_extend=lambda pool, extents, wanted: False,
        handed_out=lambda wanted, num_blocks: min(REGION, num_blocks),
    ),
    "cortexstream": Case(
        make=lambda num_blocks: make_allocator("cortexstream", num_blocks),
        has_room=has_hole,
        can_extend=has_hole_behind,
    ),
    "first_fit": Case(
        make=lambda num_blocks: make_allocator("first_fit", num_blocks),
        has_room=has_hole,
        can_extend=has_hole_behind,
    ),
    "best_fit": Case(
        make=lambda num_blocks: make_allocator("best_fit", num_blocks),
        has_room=has_hole,
        can_extend=has_hole_behind,
    ),
    "segregated": Case(
        make=lambda num_blocks: make_allocator("segregated", num_blocks),
        has_room=has_hole,
        can_extend=has_hole_behind,
    ),
    "buddy": Case(
        make=lambda num_blocks: make_allocator("buddy", num_blocks),
        has_room=has_free_buddy,
        can_extend=has_free_buddy_behind,
        handed_out=lambda wanted, num_blocks: power_of_two(wanted),
    ),
    "paged": Case(
        make=lambda num_blocks: make_allocator("paged", num_blocks),
        has_room=lambda pool, wanted: pool.free_blocks >= wanted,
        can_extend=lambda pool, extents, wanted: pool.free_blocks >= wanted,
        one_extent=False,
    ),
}
every_strategy = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_strategy_has_a_case():
    assert set(STRATEGIES) <= set(CASES), "add the new strategy to CASES"


# --- stories ------------------------------------------------------------------------------------------------------------------


def test_first_fit_takes_the_lowest_hole_that_is_large_enough():
    pool = make_allocator("first_fit", 10)
    a, _, c, _ = (pool.allocate(n) for n in (1, 2, 3, 2))  # a b b c c c d d . .
    pool.free(a)
    pool.free(c)  # . b b . . . d d . .
    assert pool.allocate(2) == (Extent(3, 2),)  # the hole at 0 is too small, the one at 8 is higher
    assert pool.allocate(1) == (Extent(0, 1),)
    assert pool.allocate(2) == (Extent(8, 2),)
    assert pool.allocate(2) is None


def test_a_freed_extent_joins_the_holes_on_both_sides():
    pool = make_allocator("first_fit", 9)
    a, b, c = (pool.allocate(3) for _ in range(3))
    pool.free(a)
    pool.free(c)
    assert (pool.stats().num_holes, pool.stats().largest_free_run) == (2, 3)
    pool.free(b)
    assert (pool.stats().num_holes, pool.stats().largest_free_run) == (1, 9)
    assert pool.allocate(9) == (Extent(0, 9),)


def test_first_fit_extends_in_place_only_into_the_hole_right_behind():
    pool = make_allocator("first_fit", 6)
    a, b = pool.allocate(2), pool.allocate(1)  # a a b . . .
    assert pool.extend(a, 1) is None
    assert pool.stats().free_blocks == 3
    b = pool.extend(b, 2)
    assert b == (Extent(2, 3),)  # a a b b b .
    pool.free(b)
    assert pool.extend(a, 4) == (Extent(0, 6),)
    with pytest.raises(ValueError):
        pool.free(a)  # the old tuple is void
    pool.check()


def test_paged_never_refuses_while_blocks_are_free():
    pool = make_allocator("paged", 6)
    singles = [pool.allocate(1) for _ in range(6)]
    for extents in singles[::2]:
        pool.free(extents)  # . x . x . x
    assert pool.stats().largest_free_run == 1
    scattered = pool.allocate(3)
    assert sorted(blocks_of(scattered)) == [0, 2, 4]
    assert pool.allocate(1) is None


def test_paged_reports_neighbours_as_one_extent():
    pool = make_allocator("paged", 8)
    a = pool.allocate(3)
    assert a == (Extent(0, 3),)
    a = pool.extend(a, 1)
    assert a == (Extent(0, 4),)
    pool.allocate(1)
    assert pool.extend(a, 2) == (Extent(0, 4), Extent(5, 2))


def test_static_hands_out_whole_regions_and_never_the_tail():
    pool = make_allocator("static", 8, region_blocks=3)  # two regions and a tail of two blocks
    a, b = pool.allocate(1), pool.allocate(3)
    assert (a, b) == ((Extent(0, 3),), (Extent(3, 3),))
    assert pool.allocate(1) is None
    assert pool.stats().free_blocks == 2
    assert pool.extend(a, 1) is None
    pool.free(a)
    assert pool.allocate(4) is None  # larger than a region
    assert pool.allocate(2) == (Extent(0, 3),)


def test_static_takes_an_eighth_of_the_pool_by_default():
    assert make_allocator("static", 16).allocate(1) == (Extent(0, 2),)
    assert make_allocator("static", 5).allocate(1) == (Extent(0, 1),)


def test_external_fragmentation_is_what_the_largest_run_misses_of_the_free_blocks():
    pool = make_allocator("first_fit", 8)
    a, _, c, _ = (pool.allocate(n) for n in (1, 2, 3, 2))
    assert pool.stats() == {
        "free_blocks": 0, "used_blocks": 8, "largest_free_run": 0, "num_holes": 0, "external_fragmentation": 0.0,
    }  # fmt: skip
    pool.free(a)
    pool.free(c)  # . b b . . . d d
    assert pool.stats() == {
        "free_blocks": 4, "used_blocks": 4, "largest_free_run": 3, "num_holes": 2, "external_fragmentation": 1 - 3 / 4,
    }  # fmt: skip
    assert pool.stats().num_holes == 2  # a key is an attribute too


def test_merged_joins_only_extents_that_follow_each_other():
    assert merged([Extent(0, 1), Extent(1, 2), Extent(5, 1), Extent(4, 1)]) == (Extent(0, 3), Extent(5, 1), Extent(4, 1))
    assert merged([]) == ()


def test_growth_overrides_a_strategys_own_and_a_factory_chains():
    assert strategy_of("cortexstream").growth == "reserve"
    assert strategy_of("cortexstream", "relocate").growth == "relocate"
    assert strategy_of(STRATEGIES["paged"].placement).growth == "chain"
    with pytest.raises(ValueError, match="'sideways'"):
        strategy_of("paged", "sideways")


# --- what every strategy promises ---------------------------------------------------------------------------------------------


class AgainstABitmap(RuleBasedStateMachine):
    """The bitmap and the allocator always agree on who holds what and on what can still be had."""

    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        self.live: list[tuple[Extent, ...]] = []

    @initialize(num_blocks=st.integers(1, 20))
    def make(self, num_blocks):
        self.pool, self.model = self.case.make(num_blocks), Bitmap(num_blocks)

    @rule(wanted=st.integers(1, 8))
    def allocate(self, wanted):
        extents = self.pool.allocate(wanted)
        assert (extents is not None) == self.case.has_room(self.model, wanted)
        if extents is not None:
            self.take(extents, self.case.handed_out(wanted, len(self.model.used)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), wanted=st.integers(1, 4))
    def extend(self, data, wanted):
        old = self.pick(data)
        before = len(blocks_of(old))
        possible = self.case.can_extend(self.model, old, wanted)
        new = self.pool.extend(old, wanted)
        assert (new is not None) == possible
        if new is not None:
            assert blocks_of(new)[:before] == blocks_of(old), "tokens keep their places"
            self.give_up(old)
            self.take(new, self.case.handed_out(before + wanted, len(self.model.used)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        extents = self.pick(data)
        self.pool.free(extents)
        self.give_up(extents)

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def free_two_at_once(self, data):
        both = [self.live.pop(data.draw(st.integers(0, len(self.live) - 1))) for _ in range(2)]
        self.pool.free(extent for extents in both for extent in extents)
        for extents in both:
            self.model.mark(extents, False)

    @rule(data=st.data(), start=st.integers(0, 22), size=st.integers(1, 5))
    def free_what_nobody_holds(self, data, start, size):
        """A foreign extent is refused, and so is a good one beside it."""
        if all(self.model.used[start : start + size]) and start + size <= len(self.model.used):
            return
        good = data.draw(st.sampled_from([(), *self.live]))
        self.refused([*good, Extent(start, size)])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_the_same_twice_in_one_call(self, data):
        extents = self.pick(data)
        self.refused([*extents, *extents])

    @rule()
    def free_nothing(self):
        self.refused([])

    @invariant()
    def books_agree(self):
        self.pool.check()
        stats, holes, free = self.pool.stats(), self.model.holes, self.model.free_blocks
        assert (stats.free_blocks, stats.used_blocks) == (free, len(self.model.used) - free)
        assert (stats.largest_free_run, stats.num_holes) == (max(holes, default=0), len(holes))
        assert stats.external_fragmentation == pytest.approx(1 - max(holes) / free if free else 0)

    # helpers

    def pick(self, data) -> tuple[Extent, ...]:
        return data.draw(st.sampled_from(self.live))

    def take(self, extents, num_blocks: int) -> None:
        blocks = blocks_of(extents)
        assert len(set(blocks)) == len(blocks) == num_blocks
        assert not any(self.model.used[block] for block in blocks), "a block was handed out twice"
        assert merged(extents) == tuple(extents), "neighbours are one extent"
        assert len(extents) == 1 or not self.case.one_extent
        self.model.mark(extents, True)
        self.live.append(extents)

    def give_up(self, extents) -> None:
        self.live.remove(extents)
        self.model.mark(extents, False)

    def refused(self, extents) -> None:
        before = self.pool.stats()
        with pytest.raises(CortexLabError) as caught:
            self.pool.free(extents)
        assert isinstance(caught.value, ValueError)
        assert self.pool.stats() == before


@every_strategy
def test_an_allocator_never_disagrees_with_a_bitmap(case):
    run_state_machine_as_test(lambda: AgainstABitmap(case), settings=settings(max_examples=60, stateful_step_count=40, deadline=None))


@every_strategy
def test_what_was_taken_can_all_be_had_again(case):
    pool = case.make(12)
    first = []
    while (extents := pool.allocate(1)) is not None:
        first.append(extents)
    for extents in first[::-1]:
        pool.free(extents)
    again = []
    while (extents := pool.allocate(1)) is not None:
        again.append(extents)
    assert len(again) == len(first) > 0


@every_strategy
@pytest.mark.parametrize(
    "bad",
    [
        lambda live, gone: gone,  # twice
        lambda live, gone: (Extent(11, 1),),  # never handed out
        lambda live, gone: (Extent(12, 1),),  # not of this pool
        lambda live, gone: (Extent(1_000_000, 3),),
        lambda live, gone: (*live, *live),  # overlapping itself
        lambda live, gone: (*live, Extent(live[0].start, 1)),  # a part of another
        lambda live, gone: (*live, *gone),  # one good, one not
        lambda live, gone: (Extent(live[0].start, live[-1].end - live[0].start + 1),),  # too long
        lambda live, gone: (),
    ],
    ids=["twice", "never handed out", "outside", "far outside", "itself twice", "overlapping", "good and bad", "too long", "empty"],
)
def test_what_cannot_be_freed_or_extended_is_refused_and_changes_nothing(case, bad):
    pool = case.make(12)
    live, gone = pool.allocate(3), pool.allocate(2)
    pool.free(gone)
    before = pool.stats()
    for attempt in (pool.free, lambda extents: pool.extend(extents, 1)):
        with pytest.raises(CortexLabError) as caught:
            attempt(bad(live, gone))
        assert isinstance(caught.value, ValueError)
        assert pool.stats() == before
        pool.check()
    pool.free(live)  # still held, so it can be given back
    assert pool.stats().free_blocks == 12


def test_a_contiguous_allocation_is_one_extent_so_two_cannot_be_extended():
    pool = make_allocator("first_fit", 8)
    a, b = pool.allocate(2), pool.allocate(2)
    before = pool.stats()
    with pytest.raises(CortexLabError):
        pool.extend((*a, *b), 1)
    assert pool.stats() == before


@every_strategy
@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2", None])
def test_a_size_below_one_block_is_refused_by_its_value(case, size):
    pool = case.make(6)
    extents = pool.allocate(1)
    before = pool.stats()
    for attempt in (pool.allocate, lambda n: pool.extend(extents, n), case.make):
        with pytest.raises(ValueError) as caught:
            attempt(size)
        assert isinstance(caught.value, CortexLabError)
        assert repr(size) in str(caught.value)
    assert pool.stats() == before


@pytest.mark.parametrize("region", [0, -2])
def test_a_static_region_below_one_block_is_refused_by_its_value(region):
    with pytest.raises(ValueError, match=str(region)):
        make_allocator("static", 8, region_blocks=region)


@pytest.mark.parametrize(("start", "num_blocks"), [(-1, 1), (0, 0), (3, -2)])
def test_an_extent_is_never_empty_nor_negative(start, num_blocks):
    with pytest.raises(ValueError, match=f"{start}, {num_blocks}"):
        Extent(start, num_blocks)


def test_an_unknown_placement_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match=r"'worst_fit'.*first_fit.*paged.*static"):
        make_allocator("worst_fit", 8)


# --- a placement of the user's own --------------------------------------------------------------------------------------------

PARTS = ("num_blocks", "allocate", "extend", "free", "stats", "check")


def test_a_users_factory_serves_like_a_name():
    pool = make_allocator(STRATEGIES["paged"].placement, 4)
    assert pool.allocate(4) == (Extent(0, 4),)


@pytest.mark.parametrize("missing", PARTS)
def test_a_users_factory_that_lacks_a_part_is_refused(missing):
    unfinished = type("Unfinished", (), {part: (lambda *args: None) for part in PARTS if part != missing})
    with pytest.raises(ValueError, match="Unfinished"):
        make_allocator(lambda num_blocks: unfinished(), 4)


def test_buddy_holds_64_requests_of_32_in_2048_blocks():
    pool = make_allocator("buddy", 2048)
    assert all(pool.allocate(32) for _ in range(64)) and pool.allocate(1) is None


def test_best_fit_takes_the_smallest_hole_and_segregated_one_of_its_class():
    for name in ("best_fit", "segregated"):
        pool = make_allocator(name, 1000)
        a, _, c, _ = (pool.allocate(n) for n in (100, 1, 60, 1))
        pool.free(a)
        pool.free(c)  # holes of 100 and 60, and a long one
        assert pool.allocate(70)[0].start == 0


def test_sizes_of_a_million_blocks_are_found_exactly():
    pool = make_allocator("best_fit", 1 << 20)
    kept = [pool.allocate(n) for n in (5000, 1, 700_000, 1, 1024, 1)]
    for extents in kept[::2]:
        pool.free(extents)
    assert pool.stats().largest_free_run == 700_000
    assert pool.allocate(1025)[0] == Extent(0, 1025) and pool.allocate(1024)[0].start == kept[4][0].start
    pool.check()
