"""An allocator of the user's own, with its free blocks counted beside it: its statistics
may take long, and a scheduler asks at every step.
"""

from collections.abc import Iterable

from .base import Allocator, Extent


class Counted:
    """``allocator`` and its free blocks; everything else is the allocator's own."""

    def __init__(self, allocator: Allocator):
        self._allocator = allocator
        self.free_blocks: int = allocator.stats()["free_blocks"]
        if hasattr(allocator, "release_front"):
            self.release_front = self._release_front

    def __getattr__(self, name: str):
        return getattr(self._allocator, name)

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        extents = self._allocator.allocate(num_blocks)
        if extents is not None:
            self.free_blocks -= _size(extents)
        return extents

    def extend(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...] | None:
        grown = self._allocator.extend(extents, num_blocks)
        if grown is not None:
            self.free_blocks -= _size(grown) - _size(extents)
        return grown

    def free(self, extents: Iterable[Extent]) -> None:
        extents = tuple(extents)
        self._allocator.free(extents)
        self.free_blocks += _size(extents)

    def _release_front(self, extents: tuple[Extent, ...], num_blocks: int) -> tuple[Extent, ...]:
        rest = self._allocator.release_front(extents, num_blocks)
        self.free_blocks += _size(extents) - _size(rest)
        return rest


def counted(allocator: Allocator) -> Allocator:
    """``allocator`` itself if it counts its free blocks, else `Counted`."""
    return allocator if hasattr(allocator, "free_blocks") else Counted(allocator)


def _size(extents: Iterable[Extent]) -> int:
    return sum(num_blocks for _, num_blocks in extents)
