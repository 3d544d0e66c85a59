"""Block allocators: stories on toy pools, then each strategy against a bitmap that cannot be wrong.

A new strategy is one more entry in `allocator_cases.CASES`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from allocator_cases import CASES, Pair, blocks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cortexlab import CortexLabError, Extent, make_allocator
from cortexlab.allocators import STRATEGIES, Allocator, block_map, merged, strategy_of
from cortexlab.allocators.free_map import FREE, USED, FreeMap
from cortexlab.allocators.holes import HoleAddresses

every_strategy = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_strategy_has_a_case():
    assert set(STRATEGIES) <= set(CASES), "add the new strategy to CASES"


# --- stories --------------------------------------------------------------------------------------


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


def test_paged_hands_out_the_extent_freed_last_from_its_front():
    pool = make_allocator("paged", 8)
    a, b = pool.allocate(2), pool.allocate(3)  # a a b b b . . .
    pool.free(a)
    pool.free(b)
    assert pool.allocate(4) == (Extent(2, 3), Extent(0, 1))
    assert pool.allocate(2) == (Extent(1, 1), Extent(5, 1))


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
        "free_blocks": 0,
        "used_blocks": 8,
        "largest_free_run": 0,
        "num_holes": 0,
        "external_fragmentation": 0.0,
    }
    pool.free(a)
    pool.free(c)  # . b b . . . d d
    assert pool.stats() == {
        "free_blocks": 4,
        "used_blocks": 4,
        "largest_free_run": 3,
        "num_holes": 2,
        "external_fragmentation": 1 - 3 / 4,
    }
    assert pool.stats().num_holes == 2  # a key is an attribute too


def test_merged_joins_only_extents_that_follow_each_other():
    assert merged([Extent(0, 1), Extent(1, 2), Extent(5, 1), Extent(4, 1)]) == (
        Extent(0, 3),
        Extent(5, 1),
        Extent(4, 1),
    )
    assert merged([]) == ()


def test_growth_overrides_a_strategys_own_and_a_factory_chains():
    assert strategy_of("cortexstream").growth == "reserve"
    assert strategy_of("cortexstream", "relocate").growth == "relocate"
    assert strategy_of(STRATEGIES["paged"].placement).growth == "chain"
    with pytest.raises(ValueError, match="'sideways'"):
        strategy_of("paged", "sideways")


# --- what every strategy promises -----------------------------------------------------------------


class AgainstABitmap(RuleBasedStateMachine):
    """The bitmap and the allocator always agree on the blocks of every allocation, on what can
    still be allocated, and on the statistics.
    """

    def __init__(self, case):
        super().__init__()
        self.case = case

    @initialize(num_blocks=st.integers(1, 40))
    def make(self, num_blocks):
        self.pair = Pair(self.case, num_blocks)

    @rule(wanted=st.integers(1, 8))
    def allocate(self, wanted):
        self.pair.allocate(wanted)

    @precondition(lambda self: self.pair.live)
    @rule(data=st.data(), wanted=st.integers(1, 4))
    def extend(self, data, wanted):
        self.pair.extend(self.pick(data), wanted)

    @precondition(lambda self: self.pair.live)
    @rule(data=st.data())
    def free(self, data):
        self.pair.free(self.pick(data))

    @precondition(lambda self: self.pair.live and hasattr(self.pair.pool, "release_front"))
    @rule(data=st.data(), asked=st.integers(1, 9))
    def release_front(self, data, asked):
        self.pair.release_front(self.pick(data), asked)

    @precondition(lambda self: len(self.pair.live) > 1)
    @rule(data=st.data())
    def free_two_at_once(self, data):
        self.pair.free(*data.draw(st.permutations(range(len(self.pair.live))))[:2])

    @rule(data=st.data(), start=st.integers(0, 42), size=st.integers(1, 5))
    def free_a_foreign_extent(self, data, start, size):
        """A foreign extent is refused, and a live allocation beside it too."""
        used = self.pair.model.used
        if all(used[start : start + size]) and start + size <= len(used):
            return
        good = data.draw(st.sampled_from([(), *self.pair.live]))
        self.refused([*good, Extent(start, size)])

    @precondition(lambda self: self.pair.live)
    @rule(data=st.data())
    def free_an_allocation_twice_in_one_call(self, data):
        extents = self.pair.live[self.pick(data)]
        self.refused([*extents, *extents])

    @precondition(lambda self: self.pair.live)
    @rule(data=st.data())
    def free_a_part(self, data):
        """An allocation without its last block, or with a block more, is refused."""
        *others, last = self.pair.live[self.pick(data)]
        size = last.num_blocks + data.draw(st.sampled_from([-1, 1]))
        self.refused([*others, Extent(last.start, size)] if size else others)

    @rule()
    def free_nothing(self):
        self.refused([])

    @invariant()
    def books_agree(self):
        self.pair.pool.check()
        self.pair.agree()

    def pick(self, data) -> int:
        return data.draw(st.integers(0, len(self.pair.live) - 1))

    def refused(self, extents) -> None:
        """`free` raises; that nothing changes is asserted by `books_agree`, which follows."""
        with pytest.raises(CortexLabError) as caught:
            self.pair.pool.free(extents)
        assert isinstance(caught.value, ValueError)


@every_strategy
@pytest.mark.parametrize(
    "stretch_blocks", [4, HoleAddresses.STRETCH_BLOCKS], ids=["many stretches", "one stretch"]
)
def test_an_allocator_never_disagrees_with_a_bitmap(case, stretch_blocks, monkeypatch):
    monkeypatch.setattr(HoleAddresses, "STRETCH_BLOCKS", stretch_blocks)
    run_state_machine_as_test(
        lambda: AgainstABitmap(case),
        settings=settings(max_examples=120, stateful_step_count=40, deadline=None),
    )


def test_the_soak_runs_every_strategy():
    soak = Path(__file__).with_name("soak_allocators.py")
    done = subprocess.run(
        [sys.executable, soak, "--steps", "12000"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()][: len(STRATEGIES)] == list(
        STRATEGIES
    )


@every_strategy
def test_all_blocks_can_be_allocated_again_after_they_were_freed(case):
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
        lambda live, gone: (*live, Extent(live[0].start, 1)),  # a part of a live allocation
        lambda live, gone: (*live, *gone),  # one live, one freed
        lambda live, gone: (Extent(live[0].start, live[-1].end - live[0].start + 1),),  # too long
        lambda live, gone: (),
    ],
    ids=[
        "twice",
        "never handed out",
        "outside",
        "far outside",
        "itself twice",
        "overlapping",
        "good and bad",
        "too long",
        "empty",
    ],
)
def test_extents_that_are_no_live_allocation_are_refused_and_nothing_changes(case, bad):
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
    pool.free(live)  # the allocation is still live
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


@every_strategy
@pytest.mark.parametrize(
    "odd",
    [
        None,
        5,
        [None],
        ["ab"],
        (1, 2),
        [(0, 1)],
        [Extent(-1, 1)],
        [Extent(0, 0)],
        [Extent([], 1)],
        [Extent("a", None)],
    ],
)
def test_values_that_are_no_extents_are_refused_like_foreign_extents(case, odd):
    pool = case.make(6)
    extents = pool.allocate(2)
    before = pool.stats()
    for attempt in (pool.free, lambda extents: pool.extend(extents, 1)):
        with pytest.raises(CortexLabError):
            attempt(odd)
    assert pool.stats() == before
    pool.free(list(extents))  # an equal sequence serves


def test_a_refusal_names_the_extent():
    pool = make_allocator("paged", 8)
    a, b = pool.allocate(2), pool.allocate(2)
    for wrong, named in [
        ((*a, Extent(6, 1)), r"Extent\(start=6, num_blocks=1\) is not an extent"),
        ((*a, *b, *a), r"Extent\(start=0, num_blocks=2\) is given twice"),
        ((Extent(2, 1),), r"Extent\(start=2, num_blocks=1\) is not an extent .* the whole of it"),
    ]:
        with pytest.raises(ValueError, match=named):
            pool.free(wrong)
    with pytest.raises(ValueError, match="not one allocation, but 2"):
        pool.extend((*a, *b), 1)
    assert pool.stats().free_blocks == 4


def test_an_unknown_placement_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match=r"'worst_fit'.*first_fit.*paged.*static"):
        make_allocator("worst_fit", 8)


# --- a placement of the user's own ----------------------------------------------------------------

PARTS = ("num_blocks", "allocate", "extend", "free", "stats", "check")


def test_a_users_factory_serves_like_a_name():
    pool = make_allocator(STRATEGIES["paged"].placement, 4)
    assert pool.allocate(4) == (Extent(0, 4),)


@pytest.mark.parametrize("missing", PARTS)
def test_a_users_factory_that_lacks_a_part_is_refused(missing):
    unfinished = type(
        "Unfinished", (), {part: (lambda *args: None) for part in PARTS if part != missing}
    )
    with pytest.raises(ValueError, match="Unfinished"):
        make_allocator(lambda num_blocks: unfinished(), 4)


def test_an_allocator_needs_none_of_the_optional_parts():
    bare = type("Bare", (), {part: (lambda *args: None) for part in PARTS})()
    assert isinstance(bare, Allocator) and make_allocator(lambda num_blocks: bare, 4) is bare


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
    assert (
        pool.allocate(1025)[0] == Extent(0, 1025)
        and pool.allocate(1024)[0].start == kept[4][0].start
    )
    pool.check()


def test_a_hundred_thousand_holes_of_one_size_are_used_up_in_linear_time():
    pool = make_allocator("best_fit", 200_000)
    singles = [pool.allocate(1) for _ in range(200_000)]
    for extents in singles[::2]:
        pool.free(extents)
    # a search for the first key of a dict would take seconds
    assert all(pool.allocate(1) for _ in range(100_000))
    assert pool.allocate(1) is None


def test_a_window_that_moves_on_gives_its_first_blocks_back():
    pool = make_allocator("paged", 6)
    extents = pool.release_front(pool.allocate(5), 2)
    assert extents == (Extent(2, 3),) and pool.stats().free_blocks == 3
    assert pool.extend(extents, 1) == (Extent(2, 3), Extent(0, 1))
    pool = make_allocator("buddy", 8)
    extents = pool.allocate(8)
    extents = pool.release_front(extents, 3)  # less than a half
    assert extents == (Extent(0, 8),)
    assert pool.release_front(extents, 7) == (Extent(7, 1),)  # 4, 2 and 1
    assert pool.release_front((Extent(7, 1),), 1) == () and pool.stats().largest_free_run == 8
    pool.check()


@pytest.mark.parametrize("name", ["paged", "runs", "best_fit", "buddy"])
@pytest.mark.parametrize("wrong", [0, 3, True, "1"])
def test_no_more_blocks_can_be_given_back_than_there_are(name, wrong):
    pool = make_allocator(name, 8)
    extents = pool.allocate(2)
    before = pool.stats()
    with pytest.raises(ValueError, match=f"not {wrong!r}"):
        pool.release_front(extents, wrong)
    assert pool.stats() == before
    pool.free(extents)


# --- buddies --------------------------------------------------------------------------------------


def test_a_buddy_freed_last_serves_next_and_is_joined_only_for_a_larger_request():
    pool = make_allocator("buddy", 8)
    a, b = pool.allocate(2), pool.allocate(2)  # a a b b . . . .
    pool.free(a)  # the hot buddy is a
    assert pool.stats().largest_free_run == 4 and pool.stats().num_holes == 2
    assert pool.allocate(2) == a
    pool.free(a)
    pool.free(b)  # the hot buddy is b, and a is put back
    assert pool.stats().largest_free_run == 8
    assert pool.allocate(8) == (Extent(0, 8),)  # all buddies were joined


def test_statistics_of_a_buddy_pool_never_change_later_placements():
    looked, left = make_allocator("buddy", 64), make_allocator("buddy", 64)
    for pool in (looked, left):
        live = []
        for step in range(400):
            if step % 3 < 2 and (extents := pool.allocate(1 + step * 7 % 9)) is not None:
                live.append(extents)
            elif live:
                pool.free(live.pop(step * 5 % len(live)))
            if pool is looked:
                pool.stats()
        pool.history = live
    assert looked.history == left.history


def test_every_block_of_a_buddy_pool_of_any_size_can_be_allocated():
    pool = make_allocator("buddy", 13)  # pieces of 8, 4 and 1
    assert [pool.allocate(n) for n in (8, 4, 1)] == [
        (Extent(0, 8),),
        (Extent(8, 4),),
        (Extent(12, 1),),
    ]
    assert pool.stats().free_blocks == 0


def test_cortexstreams_buddy_holds_7_requests_of_32_in_2048_blocks_where_64_would_fit():
    pool = make_allocator("cortexstream_buddy", 2048)
    sizes = []
    while (extents := pool.allocate(32)) is not None:
        sizes.append(extents[0].num_blocks)
    assert sizes == [1024, 512, 256, 128, 64, 32, 32]
    assert strategy_of("cortexstream_buddy").growth == "reserve"


def test_cortexstreams_buddy_joins_neighbours_that_are_no_buddies():
    pool = make_allocator("cortexstream_buddy", 8)
    a, b, c, d = (pool.allocate(1) for _ in range(4))
    assert (a, b, c, d) == ((Extent(0, 4),), (Extent(4, 2),), (Extent(6, 1),), (Extent(7, 1),))
    pool.free(a)
    e, f, g = (pool.allocate(1) for _ in range(3))  # e e f g b b c d
    assert (e, f, g) == ((Extent(0, 2),), (Extent(2, 1),), (Extent(3, 1),))
    pool.free(f)
    pool.free(g)
    pool.free(b)  # blocks 2 to 5: no buddy of 4 begins at 2
    assert pool.allocate(4) == (Extent(2, 4),)


def test_cortexstreams_buddy_counts_blocks_it_never_hands_out():
    pool = make_allocator("cortexstream_buddy", 13)
    assert pool.allocate(8) == (Extent(0, 8),) and pool.allocate(1) is None
    assert pool.stats().free_blocks == 5


# --- the map of free blocks -----------------------------------------------------------------------


@given(
    changes=st.lists(
        st.tuples(st.integers(0, 99), st.integers(1, 100), st.booleans()), max_size=30
    ),
    size=st.integers(1, 100),
)
@settings(max_examples=300)
def test_a_free_map_finds_the_holes_that_counting_finds(changes, size):
    free_map, used = FreeMap(size), bytearray(size)
    for start, num_blocks, look in changes:
        if start >= size:
            continue
        state = FREE if used[start] else USED
        end = start
        while end < min(start + num_blocks, size) and used[end] == used[start]:
            end += 1
        free_map.mark([(start, end - start)], state)
        used[start:end] = bytes([state]) * (end - start)
        if look:
            runs = [len(run) for run in used.split(b"\1") if run]
            assert free_map.holes().tolist() == runs
            assert free_map.stats() == {
                "free_blocks": used.count(0),
                "used_blocks": used.count(1),
                "largest_free_run": max(runs, default=0),
                "num_holes": len(runs),
                "external_fragmentation": 1 - max(runs) / sum(runs) if runs else 0.0,
            }


def test_a_free_map_of_a_million_blocks_finds_its_holes():
    size = 1_000_003
    free_map = FreeMap(size)
    free_map.mark([(1000, 900_000)], USED)
    assert free_map.holes().tolist() == [1000, size - 901_000]
    free_map.mark([(1001, 700_000)], FREE)
    assert free_map.holes().tolist() == [1000, 700_000, size - 901_000]
    free_map.check([(0, 1000), (1001, 700_000), (901_000, size - 901_000)])


# --- for the eye ----------------------------------------------------------------------------------


def test_a_block_map_shows_a_letter_a_sequence_in_rows_behind_their_first_block():
    pool = make_allocator("paged", 20)
    tables = {"first": pool.allocate(3), "gone": pool.allocate(2), "third": pool.allocate(4)}
    pool.free(tables.pop("gone"))
    tables["fourth"] = pool.allocate(4)
    assert block_map(tables, 20, width=8) == (
        " 0 aaaccbbb\n"
        " 8 bcc.....\n"
        "16 ...."
    )  # fmt: skip
    assert block_map({}, 3) == "0 ..."


def test_a_block_map_reuses_its_letters_and_marks_blocks_that_several_hold():
    assert block_map({number: [Extent(number, 1)] for number in range(54)}, 60).endswith(
        "xyzABCDEFGHIJKLMNOPQRSTUVWXYZab......"
    )
    assert (
        block_map({"a": [Extent(0, 4)], "b": [Extent(2, 4)], "c": [Extent(3, 1)]}, 8)
        == "0 aa++bb.."
    )


@pytest.mark.parametrize("outside", [Extent(6, 3), Extent(-1, 2), Extent(3, 0)])
def test_a_block_map_refuses_an_extent_outside_the_pool(outside):
    with pytest.raises(ValueError, match=str(outside.start)):
        block_map({"a": [outside]}, 8)
    with pytest.raises(ValueError, match="width"):
        block_map({}, 8, width=0)
