"""Extents, and what every block allocator promises. Integers only: nothing here knows of tensors.

blocks   0 1 2 3 4 5 6 7 8 9
         a a a . b b . . a .

a holds Extent(0, 3) and Extent(8, 1), b holds Extent(4, 2). Three holes, the largest of 2.
"""

import string
from collections.abc import Hashable, Iterable, Mapping
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

from ..errors import BadInput, at_least, shown

LETTERS = (string.ascii_lowercase + string.ascii_uppercase).encode()  # of a block map


class Extent(NamedTuple):
    """A run of neighbouring blocks: ``[start, start + num_blocks)``.

    A named tuple, since hot paths make millions: 0.2 us each, a frozen dataclass takes 0.7. It
    checks nothing: an allocator looks every extent from outside up in its table of live ones.
    """

    start: int
    num_blocks: int

    @property
    def end(self) -> int:
        return self.start + self.num_blocks


NEW = tuple.__new__  # NEW(Extent, (start, num_blocks)): half the time of Extent(start, num_blocks)


Moved = tuple[tuple[Extent, ...], tuple[Extent, ...], tuple[tuple[Extent, Extent], ...]]
"""One allocation that compaction moved: its extents before and after, and the copies ``(source,
target)`` in order.
"""


class Stats(dict):
    """A dict whose keys are also attributes, so that ``stats["free_blocks"]`` and
    ``stats.free_blocks`` both read well.
    """

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@runtime_checkable
class Allocator(Protocol):
    """Hands out blocks ``0 .. num_blocks - 1`` of a pool as extents.

    ``num_blocks`` and the five methods are all that is required. `OptionalParts` are the parts that
    an allocator may have besides.
    """

    num_blocks: int

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        """At least ``num_blocks`` blocks, or None when they cannot be had now: never a part.
        `ValueError` below one block, here and in `extend`.
        """

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """An allocation with at least ``num_blocks`` more blocks behind those it has, which keep
        their places; the old tuple is then void. None: unchanged.
        """

    def free(self, extents: Iterable[Extent]) -> None:
        """Take allocations back, one or several one behind the other. Twice, foreign or
        overlapping: `ValueError`, and nothing changes.
        """

    def stats(self) -> Stats:
        """``free_blocks, used_blocks, largest_free_run, num_holes, external_fragmentation``."""

    def check(self) -> None:
        """`AssertionError` unless every block is in exactly one place and the books agree."""


class OptionalParts(Protocol):
    """Parts that an `Allocator` may have. Callers look for each with ``getattr`` and do without it
    where it is missing.
    """

    free_blocks: int  # stats()["free_blocks"] at any time, in O(1); all allocators here have it

    def compact(self, num_blocks: int) -> list[Moved]:
        """Move used blocks so that an allocation of ``num_blocks``, asked for next, is scattered
        less.

        Returns the moves, perhaps none; the caller makes their copies, in order, before anything is
        written. An allocation keeps its first block and its size; its old tuple is then void.
        """

    def split(
        self, extents: tuple[Extent, ...], num_blocks: int
    ) -> tuple[list[tuple[Extent, ...]], tuple[Extent, ...]]:
        """Make the first ``num_blocks`` blocks of an allocation allocations of one block each, in
        place, so that a prefix cache can free them one by one.

        Returns the single blocks in order, and the rest, perhaps ``()``, as one allocation. The old
        tuple is then void. `ValueError` when the allocation has fewer blocks; nothing changes.
        """

    def release_front(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...]:
        """Take the first ``num_blocks`` blocks of an allocation back, or as many of them as the
        placement can; a sliding window has passed them.

        Returns the rest, perhaps ``()``; the old tuple is then void. `ValueError` when the
        allocation has fewer blocks; nothing changes.
        """


def pool_stats(num_blocks: int, free_blocks: int, largest_free_run: int, num_holes: int) -> Stats:
    """The statistics every allocator reports. External fragmentation = 1 - largest free run / free
    blocks, 0 when none is free.
    """
    return Stats(
        free_blocks=free_blocks,
        used_blocks=num_blocks - free_blocks,
        largest_free_run=largest_free_run,
        num_holes=num_holes,
        external_fragmentation=1 - largest_free_run / free_blocks if free_blocks else 0.0,
    )


def merged(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The blocks of ``extents`` in their order, with extents that follow each other joined."""
    joined: list[Extent] = []
    for extent in extents:
        if joined and joined[-1].end == extent.start:
            extent = Extent(joined[-1].start, joined.pop().num_blocks + extent.num_blocks)
        joined.append(extent)
    return tuple(joined)


def blocks_of(extents: Iterable[Extent]) -> list[int]:
    """The blocks of ``extents``, one by one, in their order."""
    return [block for start, size in extents for block in range(start, start + size)]


def assert_tiles(pieces: Iterable[tuple[int, int]], num_blocks: int) -> None:
    """`AssertionError` unless each of ``num_blocks`` blocks is in exactly one of ``pieces`` (first
    block, blocks).
    """
    at = 0
    for start, size in sorted(pieces):
        assert start == at, f"block {min(start, at)} is lost or held twice"
        at += size
    assert at == num_blocks, f"blocks behind {at} are lost"


# --- what an allocator has handed out -------------------------------------------------------------

Live = dict[int, tuple[Extent, ...]]  # first block of an allocation -> its extents


def allocations_in(live: Live, extents: Iterable[Extent]) -> list[tuple[Extent, ...]]:
    """The allocations of ``live`` that ``extents`` names: one, or several one behind the other,
    each whole and as it was handed out.

    `BadInput` names the first extent that is foreign, part of an allocation or given twice, or says
    that there is none. O(1) for the very tuple that was handed out, else O(extents).
    """
    try:
        if live.get(extents[0][0]) is extents:
            return [extents]
    except (TypeError, LookupError, ValueError):  # no sequence of extents: told below
        pass
    given = _as_tuple(extents)
    found: Live = {}
    at = 0
    while at < len(given):
        whole = _live_at(live, given[at])
        parts = given[at : at + len(whole)]
        if not whole or parts != whole:
            wrong = next(
                (part for part, own in zip(parts, whole, strict=False) if part != own), given[at]
            )
            raise BadInput(
                f"{shown(wrong)} is not an extent this allocator has handed out and not yet got "
                "back, or not the whole of it"
            )
        if whole[0].start in found:
            raise BadInput(f"{given[at]} is given twice")
        found[whole[0].start] = whole
        at += len(whole)
    if not found:
        raise BadInput("extents must be given, not none")
    return list(found.values())


def allocation_in(live: Live, extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The one allocation that ``extents`` names; `BadInput` otherwise, as `allocations_in`."""
    try:
        if live.get(extents[0][0]) is extents:
            return extents
    except (TypeError, LookupError, ValueError):
        pass
    found = allocations_in(live, extents)
    if len(found) > 1:
        raise BadInput(
            f"{shown(found[0] + found[1])} is not one allocation, but {len(found)}: extend one at "
            "a time"
        )
    return found[0]


def split_off(
    live: Live, extents: Iterable[Extent], num_blocks: int
) -> tuple[list[tuple[Extent, ...]], tuple[Extent, ...]]:
    """`OptionalParts.split` of an allocation in ``live``."""
    whole = allocation_in(live, extents)
    blocks = sum(size for _, size in whole)
    num_blocks = at_least("num_blocks", num_blocks, 1, blocks)
    singles, rest = [], []
    for start, size in whole:
        taken = min(size, num_blocks - len(singles))
        singles += [(NEW(Extent, (block, 1)),) for block in range(start, start + taken)]
        if taken < size:
            rest.append(NEW(Extent, (start + taken, size - taken)))
    del live[whole[0][0]]
    live.update((one[0][0], one) for one in singles)
    if rest:
        live[rest[0][0]] = tuple(rest)
    return singles, tuple(rest)


class FrontBySplit:
    """`OptionalParts.release_front` of an allocator that can `split`: all that is asked."""

    def release_front(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...]:
        """As `OptionalParts.release_front`."""
        singles, rest = self.split(extents, num_blocks)
        self.free(chain.from_iterable(singles))
        return rest


def _as_tuple(extents: object) -> tuple:
    try:
        return tuple(extents)
    except TypeError:
        raise BadInput(f"extents must be given, not {shown(extents)}") from None


def _live_at(live: Live, extent: object) -> tuple[Extent, ...]:
    try:
        return live.get(extent.start, ())
    except (AttributeError, TypeError):  # no extent, or its start is no number
        return ()


# --- for the eye ----------------------------------------------------------------------------------


def block_map(owners: Mapping[Hashable, Iterable[Extent]], num_blocks: int, width: int = 64) -> str:
    """The pool as text: `.` a free block, a letter a sequence in the order of ``owners``, `+` a
    block that several sequences hold.

    Rows of ``width`` blocks, each behind the number of its first block; the 53rd sequence is `a`
    again. `BadInput` for an extent outside the pool.

        0 aaa.bb..
        8 a.
    """
    num_blocks, width = at_least("num_blocks", num_blocks, 1), at_least("width", width, 1)
    blocks = bytearray(b".") * num_blocks
    for number, extents in enumerate(owners.values()):
        mark = bytearray(b"+") * 256  # old byte of the map -> new byte
        mark[ord(".")] = LETTERS[number % len(LETTERS)]
        for extent in extents:
            if not 0 <= extent.start < extent.end <= num_blocks:
                raise BadInput(f"{extent} does not lie in a pool of {num_blocks} blocks")
            blocks[extent.start : extent.end] = blocks[extent.start : extent.end].translate(mark)
    starts = range(0, num_blocks, width)
    digits = len(str(starts[-1]))
    return "\n".join(
        f"{start:{digits}} {blocks[start : start + width].decode()}" for start in starts
    )


def never_extended(live: Live, extents: Iterable[Extent], num_blocks: int) -> None:
    """`Allocator.extend` of an allocator that never grows an allocation: checks its arguments,
    returns None.
    """
    allocation_in(live, extents)
    at_least("num_blocks", num_blocks, 1)
