"""`prove` passes an allocator that keeps its promises, and names the step that breaks one."""

import pytest

from cortexlab import BadInput, Extent
from cortexlab.allocators import STRATEGIES, make_allocator
from cortexlab.allocators.contiguous import BestFit, FirstFit
from cortexlab.allocators.paged import Paged
from cortexlab.lab.conformance import Bitmap, has_enough, has_hole, prove


@pytest.mark.parametrize("strategy", [*STRATEGIES, "first_fit"])
def test_every_strategy_of_the_package_is_proved(strategy):
    done = prove(strategy, steps=1500, seed=3)
    assert done.total() == 1500 and all(
        done[what] > 20 for what in ("allocate", "refused", "free", "misuse")
    )
    assert prove(strategy, steps=1500, seed=3) == done, "equal seeds take equal steps"
    for num_blocks in (1, 2, 13):
        prove(strategy, num_blocks=num_blocks, steps=300)


def test_has_room_is_the_rule_of_what_must_not_be_refused():
    prove("paged", has_room=has_enough)
    for strategy in ("first_fit", "best_fit", "segregated"):
        prove(strategy, has_room=has_hole)
    with pytest.raises(AssertionError, match=r"step \d+, allocate \d+ .*refused, although"):
        prove("best_fit", has_room=has_enough)
    with pytest.raises(AssertionError, match="refused, although"):
        prove("cortexstream_buddy", has_room=has_hole)


class HandsOutTwice(BestFit):
    def allocate(self, n):
        extents = super().allocate(n)
        return extents and (Extent(max(0, extents[0].start - 1), n),)


class GivesAPart(FirstFit):
    def allocate(self, n):
        return super().allocate(n - 1 if n > 1 else n)


class MovesOnExtend(BestFit):
    def extend(self, extents, n):
        if n < 1 or extents not in self._live.values():
            raise ValueError("which extents?")
        grown = self.allocate(sum(extent.num_blocks for extent in extents) + n)
        if grown is not None:
            self.free(extents)
        return grown


class LosesOnRefusal(Paged):
    def allocate(self, n):
        extents = super().allocate(n)
        if extents is None:
            super().allocate(1)
        return extents


class WrongHoles(BestFit):
    def stats(self):
        return super().stats() | {"num_holes": 1}


class TakesAnything(Paged):
    def free(self, extents):
        try:
            super().free(extents)
        except BadInput:
            return


class HalfFrees(BestFit):
    """Frees the first extent of a tuple before it finds a wrong one behind."""

    def free(self, extents):
        for extent in extents:
            super().free((extent,))


class LeavesThePool(Paged):
    def extend(self, extents, n):
        return super().extend(extents, n) and (*extents, Extent(self.num_blocks, n))


class GivesAList(Paged):
    def allocate(self, n):
        extents = super().allocate(n)
        return extents and list(extents)


class BreaksDown(Paged):
    def allocate(self, n):
        return super().allocate(n) if n < 20 else {}[n]


class BadBooks(Paged):
    def check(self):
        raise AssertionError("the books are wrong")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (HandsOutTwice, "is not free"),
        (GivesAPart, "never a part"),
        (MovesOnExtend, "does not begin with the blocks of"),
        (LosesOnRefusal, "stats say free_blocks"),
        (WrongHoles, "stats say num_holes"),
        (TakesAnything, "must raise ValueError"),
        (HalfFrees, "stats say"),
        (LeavesThePool, "outside the pool"),
        (GivesAList, "no tuple of extents"),
        (BreaksDown, "KeyError"),
        (BadBooks, "the books are wrong"),
    ],
)
def test_a_broken_promise_is_named_with_its_step(broken, message):
    with pytest.raises(
        AssertionError, match=r"^step \d+, .*\(a pool of 64, seed 0\): .*" + message
    ):
        prove(broken)


# --- counts and extents that make no sense --------------------------------------------------------


class AllocatesNone(Paged):
    def allocate(self, n):
        return () if n == 0 else super().allocate(n)


class RefusesNone(Paged):
    """None means "not now", but no blocks can never be served."""

    def allocate(self, n):
        return None if n == 0 else super().allocate(n)


class AllocatesLess(Paged):
    def allocate(self, n):
        return () if n == -1 else super().allocate(n)


class AllocatesOneForLess(Paged):
    def allocate(self, n):
        return super().allocate(max(1, n))


class ExtendsByNone(Paged):
    def extend(self, extents, n):
        return extents if n == 0 else super().extend(extents, n)


class ExtendsByLess(Paged):
    def extend(self, extents, n):
        return None if n == -1 else super().extend(extents, n)


class WrongError(Paged):
    def allocate(self, n):
        assert n > 0, "a count, please"
        return super().allocate(n)


class WrongErrorOnExtend(Paged):
    def extend(self, extents, n):
        if n < 1:
            raise RuntimeError("a count, please")
        return super().extend(extents, n)


class ExtendsAnything(Paged):
    """Refuses to extend foreign extents, as if they could not grow now."""

    def extend(self, extents, n):
        try:
            return super().extend(extents, n)
        except BadInput:
            if n < 1:
                raise
            return None


class ExtendsTheFreed(Paged):
    """Extents that were handed out once pass for live ones, even when freed."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.known = set()

    def allocate(self, n):
        extents = super().allocate(n)
        self.known.add(extents)
        return extents

    def extend(self, extents, n):
        live = {id(own): own for own in self._live.values()}
        if (
            n > 0
            and tuple(extents) in self.known
            and not any(tuple(extents) == own for own in live.values())
        ):
            return None
        grown = super().extend(extents, n)
        self.known.add(grown)
        return grown


class ExtendsTheFreedForGood(ExtendsTheFreed):
    """Chains new blocks behind freed extents."""

    def extend(self, extents, n):
        grown = super().extend(extents, n)
        if (
            grown is None
            and n > 0
            and not any(tuple(extents) == own for own in self._live.values())
            and (more := super().allocate(n))
        ):
            return (*extents, *more)
        return grown


@pytest.mark.parametrize(
    "broken",
    [
        AllocatesNone,
        RefusesNone,
        AllocatesLess,
        AllocatesOneForLess,
        ExtendsByNone,
        ExtendsByLess,
        WrongError,
        WrongErrorOnExtend,
        ExtendsAnything,
        ExtendsTheFreed,
        ExtendsTheFreedForGood,
    ],
    ids=lambda broken: broken.__name__,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_senseless_counts_and_extents_must_raise_value_error(broken, seed):
    with pytest.raises(AssertionError, match=rf"^step \d+, .*\(a pool of 64, seed {seed}\): .*"):
        prove(broken, seed=seed)


@pytest.mark.parametrize(
    "broken",
    [AllocatesNone, AllocatesLess, ExtendsByNone, ExtendsByLess, ExtendsAnything, ExtendsTheFreed],
)
def test_the_message_says_what_was_expected(broken):
    with pytest.raises(AssertionError, match=r"(allocate|extend)\(.*ValueError"):
        prove(broken)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "first_fit"])
def test_the_strategies_of_the_package_raise_value_error(strategy):
    allocator = make_allocator(strategy, 64)
    extents, gone = allocator.allocate(2), allocator.allocate(2)
    allocator.free(gone)
    before = allocator.stats()
    for call in (
        lambda: allocator.allocate(0),
        lambda: allocator.allocate(-1),
        lambda: allocator.extend(extents, 0),
        lambda: allocator.extend(extents, -1),
        lambda: allocator.extend(gone, 1),
        lambda: allocator.extend((Extent(60, 1),), 1),
        lambda: allocator.extend((Extent(64, 1),), 1),
    ):
        with pytest.raises(ValueError):
            call()
        assert allocator.stats() == before
    allocator.check()


def test_a_factory_of_no_allocator_is_bad_input():
    with pytest.raises(BadInput, match="lacks a part"):
        prove(lambda num_blocks: object())
    with pytest.raises(BadInput, match="nonsense"):
        prove("nonsense")


def test_the_bitmap_by_hand():
    pool = Bitmap(6)
    pool.mark((Extent(1, 2), Extent(4, 1)), True)
    assert pool.holes == [1, 1, 1] and pool.free_blocks == 3
    assert pool.stats == {
        "free_blocks": 3,
        "used_blocks": 3,
        "largest_free_run": 1,
        "num_holes": 3,
        "external_fragmentation": 1 - 1 / 3,
    }
