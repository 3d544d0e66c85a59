"""Prefix sharing: blocks of a prompt, found again by the hash of their tokens and of all before.
Integers only.

    tokens     | system prompt ...  | question A ...
    ids        h0 --- h1 --- h2 --- h3
                              `---- h3'

The ids are a chain: a block's id is the hash of its tokens and of the id before it, so equal ids
mean equal prefixes. Where two prompts part inside a block, its first tokens are copied.

A cached block is *held* while a live sequence has it in its table, and *idle* afterwards, until
memory is wanted. Then the block unused the longest goes first (LRU), and of one prompt the last.
"""

import hashlib
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, takewhile
from operator import eq, itemgetter
from typing import TYPE_CHECKING

from ..allocators import Extent
from ..errors import BadInput
from .block_table import BlockTable, CachedBlock, Move, Need

if TYPE_CHECKING:
    from .block_manager import BlockManager
    from .request import Request

COPIED_FROM = 2  # tokens: fewer, at the start of a block unlike any cached one, are computed again

Allocation = tuple[Extent, ...]


class BlockHash(bytes):
    """Id of a block of tokens: SHA-256 of the id ``before`` and of its ``tokens``."""

    before: bytes
    tokens: tuple[int, ...]


def block_hashes(
    tokens: Sequence[int], block_size: int, before: bytes = b""
) -> Iterator[BlockHash]:
    """One id for each block of ``tokens``, a partial last one included, after the id ``before``."""
    for start in range(0, len(tokens), block_size):
        block = tuple(tokens[start : start + block_size])
        found = BlockHash(hashlib.sha256(before + array("q", block).tobytes()).digest())
        found.before, found.tokens = before, block
        yield found
        before = bytes(found)


def filled_blocks(request: "Request", block_size: int) -> Sequence[BlockHash]:
    """Ids of the blocks that prompt and output of a request fill, as far as they are computed."""
    prompt = len(request.prompt)
    whole = min(request.num_computed, prompt + len(request.output_tokens)) // block_size
    ids = request.prefix_ids[: min(whole, prompt // block_size)]
    rest = request.tokens(len(ids) * block_size, whole * block_size)
    return (*ids, *block_hashes(rest, block_size, ids[-1] if ids else b""))


class PrefixCache:
    """Blocks by prefix id. It frees nothing by itself: `evict` says what to give back."""

    def __init__(self):
        self._blocks: dict[Hashable, CachedBlock] = {}
        self._idle: OrderedDict[Hashable, CachedBlock] = OrderedDict()  # the longest unused first
        # Blocks by the id before them and their first token.
        self._behind: dict[tuple[bytes, int], dict[CachedBlock, None]] = defaultdict(dict)
        self._unknown: set[CachedBlock] = set()  # held, but forgotten
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
        """The block after that prefix that begins with most of the tokens of ``prefix_id``, and
        how many. An id that does not say its tokens is found whole (0 tokens) or not at all.
        """
        if not isinstance(prefix_id, BlockHash):
            return (self._blocks[prefix_id], 0) if prefix_id in self._blocks else None
        blocks = self._behind.get(_place(prefix_id), ())
        found = [(block, _num_common(block.prefix_id.tokens, prefix_id.tokens)) for block in blocks]
        return max(found, key=itemgetter(1), default=None)

    def add(self, prefix_id: Hashable, extents: Allocation) -> CachedBlock:
        block = self._blocks[prefix_id] = CachedBlock(prefix_id, extents)
        self._idle[prefix_id] = block
        if isinstance(prefix_id, BlockHash):
            self._behind[_place(prefix_id)][block] = None
        return block

    def hold(self, blocks: Iterable[CachedBlock]) -> None:
        """One more holder for each."""
        for block in blocks:
            if block.num_holders:
                self.num_shared += 1
            else:
                del self._idle[block.prefix_id]
            block.num_holders += 1

    def release(self, blocks: Sequence[CachedBlock]) -> list[CachedBlock]:
        """One holder less for each, the last block first. Returns the forgotten ones that nobody
        holds now.
        """
        gone = []
        for block in reversed(blocks):
            block.num_holders -= 1
            if block.num_holders:
                self.num_shared -= 1
            elif block in self._unknown:
                self._unknown.remove(block)
                gone.append(block)
            else:
                self._idle[block.prefix_id] = block
        return gone

    def touch(self, block: CachedBlock) -> None:
        """Count a read of a block, held or not, as its last use."""
        if block.prefix_id in self._idle:
            self._idle.move_to_end(block.prefix_id)

    def evict(self) -> CachedBlock:
        """Forget the idle block unused the longest; `KeyError` when none is idle."""
        _, block = self._idle.popitem(last=False)
        self._forget(block)
        return block

    def forget(self, blocks: Iterable[CachedBlock]) -> None:
        """Let no later prompt find these blocks; held ones keep their content until released."""
        for block in blocks:
            if block.num_holders:
                self._unknown.add(block)
            else:
                del self._idle[block.prefix_id]
            self._forget(block)

    def _forget(self, block: CachedBlock) -> None:
        prefix_id = block.prefix_id
        del self._blocks[prefix_id]
        if isinstance(prefix_id, BlockHash):
            behind = self._behind[_place(prefix_id)]
            del behind[block]
            if not behind:
                del self._behind[_place(prefix_id)]

    def check(self) -> None:
        """`AssertionError` unless idle blocks, holders and the index agree."""
        assert all(
            (block.num_holders == 0) == (i in self._idle) for i, block in self._blocks.items()
        )
        assert all(block.num_holders for block in self._unknown)
        every = (*self._blocks.values(), *self._unknown)
        beyond = (max(0, block.num_holders - 1) for block in every)
        assert self.num_shared == sum(beyond)
        assert all(self._behind.values())
        known = {block.prefix_id for blocks in self._behind.values() for block in blocks}
        assert known == {i for i in self._blocks if isinstance(i, BlockHash)}


class PrefixSharing(PrefixCache):
    """Prefix caching of a `BlockManager`: sequences that begin alike hold the same whole blocks.

    Each cached block is an allocation of its own, so that it can be evicted alone. Where an
    allocator can ``split`` allocations, a prompt's blocks lie side by side all the same, and a
    sequence's own whole blocks are cached too when it leaves.
    """

    def __init__(self, blocks: "BlockManager"):
        super().__init__()
        self._pool = blocks
        self._split = getattr(blocks.allocator, "split", None)
        one = blocks.new_allocator().allocate(1)
        if one is not None and sum(size for _, size in one) > 1:
            raise BadInput(
                f"prefix_caching shares single blocks, and strategy {blocks.strategy.name!r} hands "
                "out more than one at a time"
            )

    def found(self, need: Need) -> list[CachedBlock]:
        """The cached blocks of a prompt, whole ones only."""
        return self.match(need.prefix_ids[: need.prompt_tokens // self._pool.block_size])

    def allocate(self, need: Need, wanted: int) -> BlockTable | None:
        """A table of ``wanted`` blocks whose whole prompt blocks are cached ones: blocks found, and
        new ones under the ids not found. None, and nothing taken, without room.

        Where the prompt parts from all cached ones inside a block, the tokens before that are
        copied from the closest. Under ids that do not say their tokens, a partial last block is
        cached too; its owner goes on writing after it, so it is copied where it is found.
        """
        pool, num_whole = self._pool, need.prompt_tokens // self._pool.block_size
        shared = self.found(need)
        source, num_copied, num_found = self._partly_found(need, shared, num_whole)
        idle = sum(not block.num_holders for block in shared)
        if wanted - len(shared) > pool.free_blocks - idle:
            return None
        self.hold(shared)
        hashed = num_whole and isinstance(need.prefix_ids[0], BlockHash)
        new: dict[Hashable, None] = {}
        for prefix_id in need.prefix_ids[num_found : num_whole if hashed else None]:
            if prefix_id in self or prefix_id in new:  # ids that contradict each other
                break
            new[prefix_id] = None
        taken = self.take_apart(wanted - len(shared), len(new))
        if taken is None:
            self.give_up(shared, num_written=len(shared))
            return None
        singles, extents = taken
        fresh = [self.add(prefix_id, one) for prefix_id, one in zip(new, singles, strict=True)]
        self.hold(fresh)
        computed = len(shared) * pool.block_size + num_copied
        computed = min(computed, need.prompt_tokens, need.num_tokens - 1)
        if num_copied:
            self.touch(source)
            target = fresh[0].extents if fresh else extents
            pool.moves.append(Move(source.extents, (Extent(target[0].start, 1),), num_copied))
        return BlockTable(
            extents, pool.block_size, computed, (*shared, *fresh), num_found, need.prompt_tokens
        )

    def leave_behind(self, table: BlockTable, prefix_ids: Sequence[Hashable]) -> None:
        """Cache a leaving sequence's own whole blocks under ids not known yet."""
        size = self._pool.block_size
        first, last = len(table.shared), min(table.num_tokens // size, len(prefix_ids))
        if first >= last or not table.extents or not self._split or table.is_old:
            return
        singles, rest = self._split(table.extents, last - first)
        own = list(zip(prefix_ids[first:last], singles, strict=True))
        for prefix_id, one in reversed(own):  # the last is evicted first
            if prefix_id in self:
                self._pool.allocator.free(one)
            else:
                self.add(prefix_id, one)
        table.replace(rest)

    def release_of(self, table: BlockTable) -> None:
        """Give back a table's shared blocks, and forget what its sequence did not write."""
        whole = max(table.num_tokens // self._pool.block_size, table.num_found)
        done = table.num_tokens >= table.prompt_tokens
        self.give_up(table.shared, len(table.shared) if done else whole)

    def forget_all(self) -> None:
        """Let no later prompt find what the pool holds now: give back idle blocks, and forget those
        that live sequences hold or fill.
        """
        while self.num_idle:
            self._pool.allocator.free(self.evict().extents)
        self.forget(list(self._blocks.values()))
        for table in self._pool.tables:
            table.is_old = True
        self._pool.num_releases += 1

    def _partly_found(
        self, need: Need, shared: list[CachedBlock], num_whole: int
    ) -> tuple[CachedBlock | None, int, int]:
        """After the ``shared`` blocks: the block to copy from, how many tokens, and ids found."""
        num_found = len(shared)
        ids = need.prefix_ids
        found = self.closest(ids[num_found]) if num_found < len(ids) else None
        if found is None:
            return None, 0, num_found
        source, num_tokens = found
        if not num_tokens:  # a prompt's partial last block, by an id that does not say its tokens
            if num_found < num_whole:  # the id of a partial block, which this whole one cannot be
                return None, 0, num_found
            num_tokens = need.prompt_tokens - num_whole * self._pool.block_size
            num_found += 1
        elif num_tokens < COPIED_FROM:
            return None, 0, num_found
        return source, num_tokens if self._is_written(source) else 0, num_found

    def take_apart(
        self, num_blocks: int, num_singles: int
    ) -> tuple[list[Allocation], Allocation] | None:
        """``num_blocks`` blocks, the first ``num_singles`` each an allocation; None: no room."""
        take = self._pool.take
        if self._split or not num_singles:
            extents = take(num_blocks) if num_blocks else ()
            if extents is None or not num_singles:
                return None if extents is None else ([], extents)
            return self._split(extents, num_singles)
        taken: list[Allocation] = []
        for size in [1] * num_singles + [num_blocks - num_singles]:
            extents = take(size) if size else ()
            if extents is None:
                for one in taken:
                    self._pool.allocator.free(one)
                return None
            taken.append(extents)
        return taken[:-1], taken[-1]

    def _is_written(self, block: CachedBlock) -> bool:
        """Whether an earlier step has computed a cached block, so that a copy holds something: no
        holder is yet to compute it (others count it as computed from admission on).
        """
        for table in self._pool.tables:
            if block in table.shared:
                end = (table.shared.index(block) + 1) * self._pool.block_size
                if table.num_tokens < min(end, table.prompt_tokens):
                    return False
        return True

    def give_up(self, shared: Sequence[CachedBlock], num_written: int) -> None:
        """Release cached blocks; idle ones after the first ``num_written`` are freed."""
        gone = self.release(shared)
        unwritten = [b for b in shared[num_written:] if not b.num_holders and b not in gone]
        self.forget(unwritten)
        if gone := [*gone, *unwritten]:
            self._pool.allocator.free(chain(*(block.extents for block in gone)))


def _place(prefix_id: BlockHash) -> tuple[bytes, int]:
    return prefix_id.before, prefix_id.tokens[0]


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two blocks begin with alike."""
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))
