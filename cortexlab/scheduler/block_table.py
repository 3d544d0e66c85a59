"""Where a sequence's tokens lie: its extents in token order. Integers only.

extents    [4, +1] [0, +2]     blocks of 2 slots
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

_num_blocks = itemgetter(1)  # of an extent


class Need(NamedTuple):
    """What a sequence asks of the pool. ``prefix_ids`` name the blocks of its prompt, a partial
    last one included; equal ids mean equal prefixes.
    """

    num_tokens: int  # has now
    max_tokens: int  # can ever have in the cache
    prefix_ids: Sequence[Hashable] = ()
    prompt_tokens: int = 0


def slot_runs(
    extents: Sequence[Extent], block_size: int, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Slots of tokens ``start .. stop - 1`` as runs ``(first slot, slot behind the last)``."""
    token = 0  # of the extent's first slot
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
    """One block with the K and V of a block of tokens; ``extents`` is an allocation of its own."""

    prefix_id: Hashable
    extents: tuple[Extent, ...]
    num_holders: int = 0  # live sequences with the block in their tables


@dataclass(eq=False, slots=True)
class BlockTable:
    """A sequence's blocks. ``shared`` blocks of a cached prefix stand in front of the sequence's
    own allocation, ``extents``.
    """

    extents: tuple[Extent, ...]
    block_size: int
    num_tokens: int = 0  # slots that hold a token, or will when the step under way has run
    shared: tuple[CachedBlock, ...] = ()
    num_found: int = 0  # prefix ids that were in the cache when the table was made
    prompt_tokens: int = 0  # tokens that the shared blocks are for
    num_blocks: int = field(init=False)

    def __post_init__(self):
        self.num_blocks = sum(map(_num_blocks, self.extents)) + len(self.shared)

    def replace(self, extents: tuple[Extent, ...], num_kept: int = 0) -> int:
        """Take ``extents``, whose first ``num_kept`` are as before; return the blocks gained."""
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

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """As `slot_runs`."""
        return slot_runs(self.all_extents, self.block_size, start, stop)


class Way(StrEnum):
    """Between which pools tokens move."""

    WITHIN = "within"
    OUT = "out"  # swapped out, to the host's pool
    BACK = "back"


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens to copy before the next write: the first ``num_tokens`` in ``source``, without the
    first ``skipped``, go to their places in ``target``.
    """

    source: tuple[Extent, ...]
    target: tuple[Extent, ...]
    num_tokens: int
    skipped: int = 0
    way: Way = Way.WITHIN
