"""Prefix sharing: blocks of a prompt, found again by the hash of their tokens and of everything before them. Integers only.

A cached block is *held* while a live sequence has it in its table, and *idle* afterwards: its content stays until memory is wanted.
Then the one that was used the longest ago goes first (LRU), and within a prompt its last block before its first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from .allocators import Extent


@dataclass(eq=False, slots=True)
class CachedBlock:
    """One block with the K and V of a whole block of prompt tokens; ``extents`` is the allocation it is, all by itself."""

    prefix_id: int
    extents: tuple[Extent, ...]
    num_holders: int = 0


class PrefixCache:
    """Blocks by prefix id. It frees nothing by itself: `evict` says what to give back."""

    def __init__(self):
        self._blocks: dict[int, CachedBlock] = {}
        self._idle: OrderedDict[int, CachedBlock] = OrderedDict()  # the longest unused first
        self.num_shared = 0  # holders beyond the first, over all blocks: what sharing saves

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, prefix_id: int) -> bool:
        return prefix_id in self._blocks

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def match(self, prefix_ids: Sequence[int]) -> list[CachedBlock]:
        """The blocks of the longest cached prefix."""
        return [self._blocks[i] for i in takewhile(self._blocks.__contains__, prefix_ids)]

    def add(self, prefix_id: int, extents: tuple[Extent, ...]) -> CachedBlock:
        block = self._blocks[prefix_id] = CachedBlock(prefix_id, extents)
        self._idle[prefix_id] = block
        return block

    def hold(self, blocks: Iterable[CachedBlock]) -> int:
        """One more holder for each; how many of them were idle."""
        idle = 0
        for block in blocks:
            if block.num_holders:
                self.num_shared += 1
            else:
                del self._idle[block.prefix_id]
                idle += 1
            block.num_holders += 1
        return idle

    def release(self, blocks: Sequence[CachedBlock]) -> int:
        """One holder less for each, the last block first; how many are idle now."""
        idle = 0
        for block in reversed(blocks):
            block.num_holders -= 1
            if block.num_holders:
                self.num_shared -= 1
            else:
                self._idle[block.prefix_id] = block
                idle += 1
        return idle

    def touch(self, block: CachedBlock) -> None:
        """It was read, though not held."""
        if block.prefix_id in self._idle:
            self._idle.move_to_end(block.prefix_id)

    def evict(self) -> CachedBlock:
        """Forget the idle block that was used the longest ago; `KeyError` when none is idle."""
        prefix_id, block = self._idle.popitem(last=False)
        del self._blocks[prefix_id]
        return block

    def forget(self, blocks: Iterable[CachedBlock]) -> None:
        """Forget idle blocks whose content was never written."""
        for block in blocks:
            del self._idle[block.prefix_id], self._blocks[block.prefix_id]

    def check(self) -> None:
        assert all((block.num_holders == 0) == (i in self._idle) for i, block in self._blocks.items())
        assert self.num_shared == sum(max(0, block.num_holders - 1) for block in self._blocks.values())
