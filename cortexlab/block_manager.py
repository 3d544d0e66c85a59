"""Which blocks a sequence holds, and what happens when it outgrows them. Integers only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, takewhile
from operator import itemgetter

from .allocators import Extent, Moved, Stats, Strategy, make_allocator, merged
from .errors import BadInput, at_least
from .prefix import CachedBlock, PrefixCache

_num_blocks = itemgetter(1)  # of an extent


@dataclass(eq=False, slots=True)
class BlockTable:
    """A sequence's extents in token order. Token ``t`` lies in the ``t``-th slot of them taken one behind the other.

    ``shared`` blocks of a cached prefix stand in front of the sequence's own allocation, ``extents``.
    """

    extents: tuple[Extent, ...]
    block_size: int
    num_tokens: int = 0  # slots that hold a token; after the sequence has ended, as many as ever did
    shared: tuple[CachedBlock, ...] = ()
    num_found: int = 0  # prefix ids that were in the cache when it was made
    prompt_tokens: int = 0  # that the shared blocks are for
    num_blocks: int = field(init=False)

    def __post_init__(self):
        self.num_blocks = sum(map(_num_blocks, self.extents)) + len(self.shared)

    def replace(self, extents: tuple[Extent, ...]) -> int:
        """Take another allocation in place of the sequence's own; by how many blocks the table has grown."""
        more = sum(map(_num_blocks, extents)) - sum(map(_num_blocks, self.extents))
        self.extents = extents
        self.num_blocks += more
        return more

    def extended(self, extents: tuple[Extent, ...]) -> int:
        """The same for what `Allocator.extend` returned: nothing but the last extent and those behind it can differ."""
        before = self.extents
        if 0 < len(before) == len(extents) - 1 and extents[-2] is before[-1]:  # what `paged` does most
            more = extents[-1][1]
        elif len(extents) >= len(before) > 0:
            more = sum(map(_num_blocks, extents[len(before) - 1 :])) - before[-1][1]
        else:  # an allocator of the user's own that joins them anew
            return self.replace(extents)
        self.extents = extents
        self.num_blocks += more
        return more

    @property
    def capacity(self) -> int:
        """Slots held."""
        return self.num_blocks * self.block_size

    @property
    def all_extents(self) -> tuple[Extent, ...]:
        """Of shared and own blocks, neighbours joined."""
        return merged(chain(*(block.extents for block in self.shared), self.extents)) if self.shared else self.extents

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The slots of tokens ``start .. stop - 1`` as runs ``(first slot, slot behind the last)``, in token order."""
        token = 0  # of the extent's first slot
        if start >= stop:
            return
        for extent in self.all_extents:
            if token >= stop:
                return
            size = extent.num_blocks * self.block_size
            if token + size > start:
                first = extent.start * self.block_size - token
                yield first + max(start, token), first + min(stop, token + size)
            token += size


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens to be copied from one table's slots to another's before the next write: the price of relocation and compaction."""

    source: tuple[Extent, ...]
    target: tuple[Extent, ...]
    num_tokens: int


class BlockManager:
    """Block tables of the live sequences over one allocator.

    ``reserve`` takes room for a sequence's last token at once and never grows. ``chain`` takes what its tokens need and lets the
    allocator extend it. ``relocate`` extends in place, else moves the sequence to a larger place; the copies it owes stand in
    ``moves``, in order, until somebody makes them. With ``prefix_caching``, whole blocks of a prompt are found by their prefix
    ids and shared; each is an allocation by itself, so that it can be evicted by itself.
    """

    def __init__(self, strategy: Strategy, num_blocks: int, block_size: int, max_seq_len: int | None = None, prefix_caching: bool = False):
        self.strategy = strategy
        self.growth = strategy.growth
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self.block_size = at_least("block_size", block_size, 1)
        region = self.blocks_for(at_least("max_seq_len", max_seq_len, 1)) if max_seq_len is not None else None
        self.allocator = make_allocator(strategy.placement, num_blocks, region_blocks=region)
        self._empty = make_allocator(strategy.placement, num_blocks, region_blocks=region)  # asked what could ever fit
        self._compact = getattr(self.allocator, "compact", None)
        self.tables: dict[str, BlockTable] = {}
        self.moves: list[Move] = []
        self.prefix = PrefixCache() if prefix_caching else None
        if prefix_caching and (one := self._empty.allocate(1)) is not None:
            if sum(map(_num_blocks, one)) > 1:
                raise BadInput(f"prefix caching shares single blocks, and strategy {strategy.name!r} hands out more than one at a time")
            self._empty.free(one)
        self.num_held = 0  # blocks of live sequences, a shared one counted once
        self.num_releases = 0  # times that blocks came back: who was refused may ask again when it has moved

    @property
    def free_blocks(self) -> int:
        """Blocks that no live sequence holds; cached ones that nobody holds are free."""
        return self.num_blocks - self.num_held

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def could_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of ``num_tokens`` fits the pool when nothing else is in it."""
        extents = self._empty.allocate(self.blocks_for(num_tokens))
        if extents is None:
            return False
        self._empty.free(extents)
        return True

    def blocks_wanted(self, num_tokens: int, max_tokens: int, prefix_ids: Sequence[int] = (), prompt_tokens: int = 0) -> int:
        """Free blocks that admitting a sequence takes now: for its last token under ``reserve``, else for those it has.

        Cached blocks of its prefix that live sequences hold are not free, and not wanted.
        """
        wanted = self.blocks_for(max_tokens if self.growth == "reserve" else num_tokens)
        if self.prefix is not None and prefix_ids:
            wanted -= sum(block.num_holders > 0 for block in self.prefix.match(prefix_ids[: prompt_tokens // self.block_size]))
        return wanted

    def allocate(self, sequence: str, num_tokens: int, max_tokens: int, prefix_ids: Sequence[int] = (), prompt_tokens: int = 0) -> bool:
        """Room for ``num_tokens`` (under ``reserve``, for ``max_tokens``) in a new table. False, and nothing taken, without room.

        ``prefix_ids`` name the blocks of the first ``prompt_tokens`` tokens. The table's ``num_tokens`` are those already
        computed: of the cached prefix, but never all.
        """
        if sequence in self.tables:
            raise BadInput(f"sequence {sequence!r} already holds blocks: free it first")
        wanted = self.blocks_wanted(num_tokens, max_tokens)
        sharing = self.prefix is not None and prefix_ids
        table = self._allocate_shared(wanted, num_tokens, prefix_ids, prompt_tokens) if sharing else None
        if table is None and not (sharing and self.num_held):  # in a pool of its own, what it would share may lie in its way
            extents = self._take(wanted)
            table = None if extents is None else BlockTable(extents, self.block_size)
            if table and table.num_blocks < wanted:
                raise BadInput(f"strategy {self.strategy.name!r} handed out {table.num_blocks} blocks where {wanted} were asked for")
            self.num_held += table.num_blocks if table else 0
        if table is None:
            return False
        self.tables[sequence] = table
        return True

    def grow(self, sequence: str, num_tokens: int) -> bool:
        """Make the table hold ``num_tokens``. False, and nothing changed, when it cannot."""
        table = self.tables[sequence]
        missing = -(-num_tokens // self.block_size) - table.num_blocks
        if missing <= 0:
            return True
        if self.growth == "reserve":
            return False
        while True:
            extents = self.allocator.extend(table.extents, missing) if self.prefix is None else self._extend(table, missing)
            if extents is not None:
                self.num_held += (more := table.extended(extents))
                if more < missing:
                    raise BadInput(f"strategy {self.strategy.name!r} extended by {more} blocks where {missing} were asked for")
                return True
            if self.growth == "relocate" and (extents := self._relocate(table, missing)) is not None:
                self.num_held += table.replace(extents)
                return True
            if not self._evict(missing):
                return False

    def free(self, sequence: str) -> None:
        """Give the sequence's blocks back; its table keeps the tokens it ended with."""
        table = self.tables.pop(sequence)
        own = table.num_blocks - len(table.shared)
        if own:
            self.allocator.free(table.extents)
        self.num_held -= own
        if table.shared:
            whole = max(table.num_tokens // self.block_size, table.num_found)
            self.num_held -= self._release(table.shared, len(table.shared) if table.num_tokens >= table.prompt_tokens else whole)
        self.num_releases += 1

    def stats(self) -> Stats:
        """The allocator's; one of the user's own may report a plain dict."""
        return Stats(self.allocator.stats())

    def check(self) -> None:
        self.allocator.check()
        held = sorted(extent for table in self.tables.values() for extent in table.extents)
        cached = {block: None for table in self.tables.values() for block in table.shared}
        held = sorted(chain(held, *(block.extents for block in cached)))
        assert not held or (held[0].start >= 0 and held[-1].end <= self.num_blocks), "a block lies outside the pool"
        assert all(a.end <= b.start for a, b in pairwise(held)), "two sequences hold the same block"
        assert sum(extent.num_blocks for extent in held) == self.num_held
        idle = 0
        if self.prefix is not None:
            self.prefix.check()
            idle = self.prefix.num_idle
        assert self.num_held + idle == self.stats().used_blocks, "a block is lost"

    # --- taking blocks --------------------------------------------------------------------------------------------------------

    def _take(self, num_blocks: int) -> tuple[Extent, ...] | None:
        """Blocks of the allocator; idle cached blocks are evicted for them while that can help."""
        if self._compact:
            self._follow(self._compact(num_blocks))
        extents = self.allocator.allocate(num_blocks)
        while extents is None and self._evict(num_blocks):
            extents = self.allocator.allocate(num_blocks)
        return extents

    def _extend(self, table: BlockTable, missing: int) -> tuple[Extent, ...] | None:
        if not table.extents:  # all its blocks are shared ones so far
            return self._take(missing)
        return self.allocator.extend(table.extents, missing)

    def _evict(self, wanted: int) -> bool:
        """Evict one idle block; False when there is none, or when evicting all could not make ``wanted`` blocks free."""
        if self.prefix is None or not self.prefix.num_idle or self.free_blocks < wanted:
            return False
        self.allocator.free(self.prefix.evict().extents)
        return True

    def _allocate_shared(self, wanted: int, num_tokens: int, prefix_ids: Sequence[int], prompt_tokens: int) -> BlockTable | None:
        """A table whose prompt blocks are cached ones: those found, and new ones under the ids not found.

        A prompt's partial last block is cached too, but its owner goes on writing behind it: who finds it copies it.
        """
        whole = prefix_ids[: prompt_tokens // self.block_size]
        found = self.prefix.match(prefix_ids)
        shared = found[: len(whole)]
        written = all(map(self._is_written, found[len(whole) :]))  # before what evicts it
        if wanted - len(shared) > self.free_blocks - sum(not block.num_holders for block in shared):
            return None
        num_idle = self.prefix.hold(shared)
        new: list[CachedBlock] = []
        extents: tuple[Extent, ...] | None = ()
        for prefix_id in takewhile(lambda i: i not in self.prefix, prefix_ids[len(found) :]):  # all, but for ids that contradict
            if (extents := self._take(1)) is None:
                break
            new.append(self.prefix.add(prefix_id, extents))
            self.prefix.hold(new[-1:])
        else:
            own = wanted - len(shared) - len(new)
            extents = self._take(own) if own else ()
        if extents is None:
            self._release([*shared, *new], num_written=len(shared))
            return None
        table = BlockTable(extents, self.block_size, 0, (*shared, *new), len(found), prompt_tokens)
        partial = [block for block in found[len(whole) :] if written]
        table.num_tokens = min((len(found[: len(whole)]) + len(partial)) * self.block_size, prompt_tokens, num_tokens - 1)
        for block in partial:
            self.prefix.touch(block)
            target = Extent(extents[0].start, 1)
            self.moves.append(Move(block.extents, (target,), prompt_tokens - len(whole) * self.block_size))
        self.num_held += table.num_blocks - len(shared) + num_idle
        return table

    def _is_written(self, block: CachedBlock) -> bool:
        """Whether a step before the coming one has computed a prompt's partial last block; if not, a copy would hold nothing."""
        owners = (table for table in self.tables.values() if table.shared[-1:] == (block,))
        return not block.num_holders or any(table.num_tokens >= table.prompt_tokens for table in owners)

    def _release(self, shared: Sequence[CachedBlock], num_written: int) -> int:
        """One holder less for each cached block; those behind the first ``num_written`` are forgotten. How many are now free."""
        idle = self.prefix.release(shared)
        if unwritten := [block for block in shared[num_written:] if not block.num_holders]:
            self.prefix.forget(unwritten)
            self.allocator.free(extent for block in unwritten for extent in block.extents)
        return idle

    def _relocate(self, table: BlockTable, missing: int) -> tuple[Extent, ...] | None:
        extents = self.allocator.allocate(table.num_blocks - len(table.shared) + missing)
        if extents is not None:
            own_tokens = max(0, table.num_tokens - len(table.shared) * self.block_size)
            self.moves.append(Move(merged(table.extents), extents, own_tokens))
            self.allocator.free(table.extents)
            self.num_releases += 1
        return extents

    def _follow(self, moved: Sequence[Moved]) -> None:
        """Compaction: an allocation became another one by copies of blocks; its table follows."""
        if not moved:
            return
        owner = {table.extents[0].start: table for table in self.tables.values() if table.extents}
        for before, after, copies in moved:
            owner[before[0].start].extents = after
            for source, target in copies:
                self.moves.append(Move((source,), (target,), source.num_blocks * self.block_size))
