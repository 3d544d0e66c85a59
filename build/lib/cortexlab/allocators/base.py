"""Extents, and what every block allocator promises. Integers only: nothing here knows of tensors.

blocks   0 1 2 3 4 5 6 7 8 9
         a a a . b b . . a .      a holds Extent(0, 3), Extent(8, 1); b holds Extent(4, 2); three holes, the largest of 2
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..errors import BadInput


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A run of neighbouring blocks: ``[start, start + num_blocks)``."""

    start: int
    num_blocks: int

    def __post_init__(self):
        if self.start < 0 or self.num_blocks < 1:
            raise BadInput(f"an extent starts at 0 or later and holds at least one block, not {self.start}, {self.num_blocks}")

    @property
    def end(self) -> int:
        return self.start + self.num_blocks


class Stats(dict):
    """A dict whose keys are also attributes, so that ``stats["free_blocks"]`` and ``stats.free_blocks`` both read well."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@runtime_checkable
class Allocator(Protocol):
    """Hands out blocks ``0 .. num_blocks - 1`` of a pool as extents."""

    num_blocks: int

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        """At least ``num_blocks`` blocks, or None when they cannot be had now: never a part."""

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        """The same allocation with at least ``num_blocks`` more behind it, in place; the old tuple is then void. None: unchanged."""

    def free(self, extents: Iterable[Extent]) -> None:
        """Take an allocation back. Twice, foreign or overlapping: `ValueError`, and nothing changes."""

    def stats(self) -> Stats:
        """``free_blocks, used_blocks, largest_free_run, num_holes, external_fragmentation``."""

    def check(self) -> None:
        """`AssertionError` unless every block is in exactly one place and the books agree."""


def pool_stats(num_blocks: int, free_blocks: int, largest_free_run: int, num_holes: int) -> Stats:
    """The statistics every allocator reports. External fragmentation = 1 - largest free run / free blocks, 0 when none is free."""
    return Stats(
        free_blocks=free_blocks,
        used_blocks=num_blocks - free_blocks,
        largest_free_run=largest_free_run,
        num_holes=num_holes,
        external_fragmentation=1 - largest_free_run / free_blocks if free_blocks else 0.0,
    )


def merged(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The same blocks in the same order, with neighbours that follow each other joined."""
    joined: list[Extent] = []
    for extent in extents:
        if joined and joined[-1].end == extent.start:
            extent = Extent(joined[-1].start, joined.pop().num_blocks + extent.num_blocks)
        joined.append(extent)
    return tuple(joined)


def whole_extents(live: dict[int, int], extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """``extents``, each exactly one of ``live`` (first block -> size); `BadInput` for any other, for one given twice, for none."""
    extents = tuple(extents)
    for extent in extents:
        if live.get(extent.start) != extent.num_blocks:
            raise BadInput(f"{extent} is not an extent this allocator has handed out and not yet got back")
    if len(set(extents)) != len(extents) or not extents:
        raise BadInput(f"extents must be given, and each once, not {extents}")
    return extents
