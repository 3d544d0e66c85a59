"""Prefix sharing: blocks of a prompt, found again by the hash of their tokens and of everything
before them. Integers only.

    tokens     | system prompt ...  | question A ...
    ids        h0 --- h1 --- h2 --- h3
                              `---- h3'

The ids are a chain: a block's id is the hash of its tokens and of the id before it, so equal ids
mean equal prefixes. Where two prompts part inside a block, its first tokens are copied.

A cached block is *held* while a live sequence has it in its table, and *idle* afterwards: its
content stays until memory is wanted. Then the one that was used the longest ago goes first (LRU),
and within a prompt its last block before its first.
"""

import hashlib
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq, itemgetter

from ..allocators import Extent


class BlockHash(bytes):
    """The id of one block of tokens: SHA-256 of the id ``before`` and of its ``tokens``, which it
    remembers.
    """

    before: bytes
    tokens: tuple[int, ...]


def block_hashes(tokens: Sequence[int], block_size: int) -> Iterator[BlockHash]:
    """One id for each block of ``tokens``, a partial last one included. SHA-256: nobody finds two
    prefixes with one id.
    """
    before = b""
    for start in range(0, len(tokens), block_size):
        block = tuple(tokens[start : start + block_size])
        found = BlockHash(hashlib.sha256(before + array("q", block).tobytes()).digest())
        found.before, found.tokens = before, block
        yield found
        before = bytes(found)


@dataclass(eq=False, slots=True)
class CachedBlock:
    """One block with the K and V of a block of tokens; ``extents`` is the allocation it is, all by
    itself.
    """

    prefix_id: Hashable
    extents: tuple[Extent, ...]
    num_holders: int = 0


class PrefixCache:
    """Blocks by prefix id. It frees nothing by itself: `evict` says what to give back."""

    def __init__(self):
        self._blocks: dict[Hashable, CachedBlock] = {}
        self._idle: OrderedDict[Hashable, CachedBlock] = OrderedDict()  # the longest unused first
        self._behind: dict[tuple[bytes, int], dict[CachedBlock, None]] = defaultdict(
            dict
        )  # (id before, first token) -> blocks
        self.num_asked = 0  # ids of prompts that were looked up when they were admitted
        self.num_found = 0  # of them in the cache
        self.num_shared = 0  # holders beyond the first, over all blocks: what sharing saves

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, prefix_id: Hashable) -> bool:
        return prefix_id in self._blocks

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def match(self, prefix_ids: Sequence[Hashable]) -> list[CachedBlock]:
        """The blocks of the longest cached prefix."""
        return [self._blocks[i] for i in takewhile(self._blocks.__contains__, prefix_ids)]

    def closest(self, prefix_id: Hashable) -> tuple[CachedBlock, int] | None:
        """Behind the same prefix, the block that begins with most of the tokens of ``prefix_id``,
        and how many; None without any.

        An id that does not say its tokens is found whole or not at all.
        """
        if not isinstance(prefix_id, BlockHash):
            return (self._blocks[prefix_id], 0) if prefix_id in self._blocks else None
        blocks = self._behind.get((prefix_id.before, prefix_id.tokens[0]), ())
        found = [(block, _num_common(block.prefix_id.tokens, prefix_id.tokens)) for block in blocks]
        return max(found, key=itemgetter(1), default=None)

    def add(self, prefix_id: Hashable, extents: tuple[Extent, ...]) -> CachedBlock:
        block = self._blocks[prefix_id] = CachedBlock(prefix_id, extents)
        self._idle[prefix_id] = block
        if isinstance(prefix_id, BlockHash):
            self._behind[prefix_id.before, prefix_id.tokens[0]][block] = None
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
        _, block = self._idle.popitem(last=False)
        self._forget(block)
        return block

    def forget(self, blocks: Iterable[CachedBlock]) -> None:
        """Forget idle blocks whose content was never written."""
        for block in blocks:
            del self._idle[block.prefix_id]
            self._forget(block)

    def _forget(self, block: CachedBlock) -> None:
        prefix_id = block.prefix_id
        del self._blocks[prefix_id]
        if isinstance(prefix_id, BlockHash):
            behind = prefix_id.before, prefix_id.tokens[0]
            del self._behind[behind][block]
            if not self._behind[behind]:
                del self._behind[behind]

    def check(self) -> None:
        assert all(
            (block.num_holders == 0) == (i in self._idle) for i, block in self._blocks.items()
        )
        assert self.num_shared == sum(
            max(0, block.num_holders - 1) for block in self._blocks.values()
        )
        assert all(blocks for blocks in self._behind.values())
        known = {block.prefix_id for blocks in self._behind.values() for block in blocks}
        assert known == {
            prefix_id for prefix_id in self._blocks if isinstance(prefix_id, BlockHash)
        }


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two blocks begin with alike."""
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))
