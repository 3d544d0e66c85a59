"""Does an allocator keep the promises of `cortexlab.Allocator`? Random steps beside a bitmap, which
is too simple to be wrong.

    prove(Mine)
    # AssertionError: "step 7, allocate 3 (a pool of 64, seed 0): block 0 is not free"
    prove(Mine, has_room=has_hole)   # and must serve each request for which a hole is large enough

No placement rule is assumed unless you name one, so strategies of your own can be proved too.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable

from ..allocators import Allocator, Extent, make_allocator
from ..allocators.base import blocks_of, pool_stats
from ..errors import BadInput, at_least

STEPS_A_CHECK = 50
# shares of the steps; the rest allocates, so the pool is full most of the time
FREE_SHARE, EXTEND_SHARE, MISUSE_SHARE = 0.36, 0.15, 0.04


class Bitmap:
    """The naive model of a pool: one byte a block, 1 where it is used."""

    def __init__(self, num_blocks: int):
        self.used = bytearray(num_blocks)

    def mark(self, extents: Iterable[Extent], used: bool) -> None:
        for start, num_blocks in extents:
            self.used[start : start + num_blocks] = bytes([used]) * num_blocks

    @property
    def free_blocks(self) -> int:
        return self.used.count(0)

    @property
    def holes(self) -> list[int]:
        """Sizes of the free runs, from left to right."""
        return [len(run) for run in self.used.split(b"\1") if run]

    @property
    def stats(self) -> dict:
        return pool_stats(
            len(self.used), self.free_blocks, max(self.holes, default=0), len(self.holes)
        )


def has_hole(pool: Bitmap, wanted: int) -> bool:
    """The rule of a contiguous strategy: one hole is large enough."""
    return max(pool.holes, default=0) >= wanted


def has_enough(pool: Bitmap, wanted: int) -> bool:
    """The rule of a strategy that chains: enough blocks are free, wherever they lie."""
    return pool.free_blocks >= wanted


def prove(
    strategy: str | Callable[[int], Allocator],
    *,
    num_blocks: int = 64,
    steps: int = 2000,
    seed: int = 0,
    has_room: Callable[[Bitmap, int], bool] | None = None,
) -> Counter:
    """Drive an allocator of ``num_blocks`` blocks through ``steps`` seeded random steps, and count
    what was done.

    Blocks handed out must have been free, an extension must keep the blocks there were, statistics
    must be those of the bitmap after each step, and misuse (freeing twice, foreign extents) must
    raise `ValueError` and change nothing; in the end all blocks must come back. ``has_room``: which
    requests must not be refused. Any failure raises `AssertionError` that names the step.
    """
    num_blocks, steps = at_least("num_blocks", num_blocks, 1), at_least("steps", steps, 1)
    seed = at_least("seed", seed, 0)
    rng, step, doing = random.Random(seed), 0, "making it"
    done: Counter = Counter(allocate=0, refused=0, extend=0, stuck=0, free=0, misuse=0)
    try:
        pair = _Pair(make_allocator(strategy, num_blocks), has_room)
        pair.agree()
        for step in range(1, steps + 1):
            doing, act = pair.choose(rng)
            done[act()] += 1
            pair.agree()
            if step % STEPS_A_CHECK == 0:
                pair.allocator.check()
        doing = "freeing what is left"
        while pair.live:
            pair.free([len(pair.live) - 1])
        pair.agree()
        pair.allocator.check()
    except Exception as error:
        if step == 0 and isinstance(error, BadInput):  # no allocator at all: the caller's mistake
            raise
        raise _failure(step, doing, num_blocks, seed, error) from error
    return done


def _failure(step: int, doing: str, num_blocks: int, seed: int, error: Exception) -> AssertionError:
    what = (
        str(error)
        if isinstance(error, AssertionError) and str(error)
        else f"{type(error).__name__}: {error}"
    )
    return AssertionError(f"step {step}, {doing} (a pool of {num_blocks}, seed {seed}): {what}")


class _Pair:
    """The allocator and its bitmap, side by side."""

    def __init__(self, allocator: Allocator, has_room: Callable[[Bitmap, int], bool] | None):
        self.allocator, self.has_room = allocator, has_room
        self.pool = Bitmap(allocator.num_blocks)
        self.live: list[tuple[Extent, ...]] = []
        self.dead: tuple[Extent, ...] | None = None  # the last allocation freed

    def choose(self, rng: random.Random) -> tuple[str, Callable[[], str]]:
        """The next step: its name and its function."""
        choice, live, size = rng.random(), len(self.live), len(self.pool.used)
        wanted = rng.randint(1, max(1, size // rng.choice((2, 6, 16))))
        if live and choice < FREE_SHARE:
            numbers = rng.sample(range(live), min(live, rng.choice((1, 1, 1, 2, 3))))
            return f"free {len(numbers)} of {live}", lambda: self.free(numbers)
        if live and choice < FREE_SHARE + EXTEND_SHARE:
            number, more = rng.randrange(live), rng.randint(1, 4)
            return f"extend {self.live[number]} by {more}", lambda: self.extend(number, more)
        if choice > 1 - MISUSE_SHARE:
            return "misuse", lambda: self.misuse(rng)
        return f"allocate {wanted}", lambda: self.allocate(wanted)

    def allocate(self, wanted: int) -> str:
        must = self.has_room is not None and self.has_room(self.pool, wanted)
        extents = self.allocator.allocate(wanted)
        if extents is None:
            assert not must, (
                f"refused, although {self.pool.free_blocks} blocks are free in holes of "
                f"{self.pool.holes}"
            )
            return "refused"
        self.take(extents, wanted)
        return "allocate"

    def extend(self, number: int, more: int) -> str:
        old = self.live[number]
        before = blocks_of(old)
        new = self.allocator.extend(old, more)
        if new is None:
            return "stuck"
        assert blocks_of(new)[: len(before)] == before, (
            f"{new} does not begin with the blocks of {old}: its tokens would be lost"
        )
        self.drop(number)
        self.take(new, len(before) + more)
        return "extend"

    def free(self, numbers: list[int]) -> str:
        """Free several allocations as one tuple of all their extents."""
        allocations = [self.live[number] for number in numbers]
        self.allocator.free(sum(allocations, ()))
        for number in sorted(numbers, reverse=True):
            self.drop(number)
        self.dead = allocations[-1]
        return "free"

    def misuse(self, rng: random.Random) -> str:
        """Extents that are no live allocation, and counts below 1: each must raise `ValueError` and
        change nothing.
        """
        wrong = [(Extent(len(self.pool.used), 1),)]
        if self.dead and not all(self.pool.used[block] for block in blocks_of(self.dead)):
            wrong.append(self.dead)
        if self.live:
            one = rng.choice(self.live)
            wrong += [one + one, (*one[:-1], Extent(one[-1].start, one[-1].num_blocks + 1))]
        calls = [
            (name, extents, *more)
            for extents in wrong
            for name, *more in (("free",), ("extend", 1))
        ]
        calls += [("allocate", wanted) for wanted in (0, -1)] + (
            [("extend", one, wanted) for wanted in (0, -1)] if self.live else []
        )
        for name, *given in calls:
            try:
                getattr(self.allocator, name)(*given)
            except ValueError:
                self.agree()
                continue
            raise AssertionError(
                f"{name}({', '.join(map(str, given))}) was taken, although it makes no sense: it "
                "must raise ValueError"
            )
        return "misuse"

    def take(self, extents: tuple[Extent, ...], wanted: int) -> None:
        assert isinstance(extents, tuple) and all(
            isinstance(extent, Extent) for extent in extents
        ), f"{extents!r} is no tuple of extents"
        blocks = blocks_of(extents)
        assert len(blocks) >= wanted, f"{len(blocks)} blocks handed out, not {wanted}: never a part"
        for at, block in enumerate(blocks):
            assert 0 <= block < len(self.pool.used), f"block {block} lies outside the pool"
            assert not self.pool.used[block] and block not in blocks[:at], (
                f"block {block} is not free"
            )
        self.pool.mark(extents, True)
        self.live.append(extents)

    def drop(self, number: int) -> None:
        self.pool.mark(self.live.pop(number), False)

    def agree(self) -> None:
        stats, expected = self.allocator.stats(), self.pool.stats
        for name, value in expected.items():
            assert stats[name] == value, f"stats say {name} is {stats[name]}, and it is {value}"
