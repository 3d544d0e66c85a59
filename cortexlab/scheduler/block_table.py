"""Where a sequence's tokens lie: its extents in token order. Integers only.

extents    [4, +1] [0, +2]     [first block, +num_blocks]; a block is 2 slots
token       0  1    2 3 4 5
slot        8  9    0 1 2 3
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

from ..allocators import Extent, merged
from ..errors import MAX_COUNT

_num_blocks = itemgetter(1)  # of an extent


class Need(NamedTuple):
    """What a sequence asks of the pool. ``prefix_ids`` name the blocks of its prompt, a partial
    last one included; equal ids mean equal prefixes.
    """

    num_tokens: int  # tokens there are now
    max_slots: int  # slots it can ever fill
    prefix_ids: Sequence[Hashable] = ()
    prompt_tokens: int = 0  # prompt's length: tells whole blocks from a partial last one
    num_back: int = 0  # tokens that come back from the host's pool
    chunk: int = MAX_COUNT  # tokens of the first step


def slot_runs(
    extents: Sequence[Extent], block_size: int, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Slots of tokens ``start .. stop - 1`` as runs ``(first slot, slot after the last)``."""
    token = 0  # in the extent's first slot
    if start >= stop:
        return
    for extent in extents:
        if token >= stop:
            return
        size = extent.num_blocks * block_size
        if token + size > start:
            first = extent.start * block_size - token
            yield first + max(start, token), first + min(stop, token + size)
        token += size


@dataclass(eq=False, slots=True)
class CachedBlock:
    """One block with the K and V of a block of tokens; ``extents`` is allocated on its own."""

    prefix_id: Hashable
    extents: tuple[Extent, ...]
    num_holders: int = 0  # live sequences with the block in their tables


@dataclass(eq=False, slots=True)
class BlockTable:
    """A sequence's blocks: ``shared`` ones of a cached prefix, then ``extents``, its own."""

    extents: tuple[Extent, ...]
    block_size: int
    num_tokens: int = 0  # slots that hold a token, or will after the steps planned so far
    shared: tuple[CachedBlock, ...] = ()
    num_found: int = 0  # prefix ids found in the cache at allocation
    prompt_tokens: int = 0  # prompt's length, where blocks are shared
    is_old: bool = False  # not to be cached: from before all prefixes were forgotten
    skipped: int = 0  # tokens before its first, which a window has passed
    num_blocks: int = field(init=False)

    def __post_init__(self):
        self.num_blocks = sum(map(_num_blocks, self.extents)) + len(self.shared)

    def replace(self, extents: tuple[Extent, ...], num_kept: int = 0) -> int:
        """Take ``extents`` (the first ``num_kept`` are not recounted); return blocks gained."""
        before = map(_num_blocks, self.extents[num_kept:])
        more = sum(map(_num_blocks, extents[num_kept:])) - sum(before)
        self.extents = extents
        self.num_blocks += more
        return more

    @property
    def num_own(self) -> int:
        return self.num_blocks - len(self.shared)

    @property
    def capacity(self) -> int:
        """Slots held."""
        return self.num_blocks * self.block_size

    @property
    def all_extents(self) -> tuple[Extent, ...]:
        """Extents of shared and own blocks, neighbours joined."""
        if not self.shared:
            return self.extents
        return merged(chain(*(block.extents for block in self.shared), self.extents))

    @property
    def parts(self) -> tuple["BlockTable", ...]:
        """One table for each group of layers."""
        return (self,)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """`slot_runs` of all blocks."""
        return slot_runs(self.all_extents, self.block_size, start, stop)


class Way(StrEnum):
    """Pools that a `Move` goes between."""

    WITHIN = "within"
    OUT = "out"  # swapped out, to the host's pool
    BACK = "back"


@dataclass(frozen=True, slots=True)
class Move:
    """A copy owed before the next write: tokens ``skipped .. num_tokens - 1`` of ``source``, to the
    same positions of ``target``.
    """

    source: tuple[Extent, ...]
    target: tuple[Extent, ...]
    num_tokens: int
    skipped: int = 0
    way: Way = Way.WITHIN
