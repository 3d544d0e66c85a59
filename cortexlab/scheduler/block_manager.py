"""Which blocks a sequence holds, and what happens when it outgrows them. Integers only."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain, pairwise
from operator import itemgetter

from ..allocators import Extent, Moved, Stats, Strategy, make_allocator, merged
from ..errors import BadInput, at_least
from .prefix_cache import BlockHash, CachedBlock, PrefixCache

# tokens: fewer than that, at the start of a block that parts from a cached one, are computed again
COPIED_FROM = 2

_num_blocks = itemgetter(1)  # of an extent


def slot_runs(
    extents: Sequence[Extent], block_size: int, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """The slots of tokens ``start .. stop - 1`` as runs ``(first slot, slot behind the last)``, in
    token order.
    """
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
class BlockTable:
    """A sequence's extents in token order. Token ``t`` lies in the ``t``-th slot of them taken one
    behind the other.

    ``shared`` blocks of a cached prefix stand in front of the sequence's own allocation,
    ``extents``.
    """

    extents: tuple[Extent, ...]
    block_size: int
    num_tokens: int = (
        0  # slots that hold a token; after the sequence has ended, as many as ever did
    )
    shared: tuple[CachedBlock, ...] = ()
    num_found: int = 0  # prefix ids that were in the cache when it was made
    prompt_tokens: int = 0  # that the shared blocks are for
    num_blocks: int = field(init=False)

    def __post_init__(self):
        self.num_blocks = sum(map(_num_blocks, self.extents)) + len(self.shared)

    def replace(self, extents: tuple[Extent, ...]) -> int:
        """Take another allocation in place of the sequence's own; by how many blocks the table has
        grown.
        """
        more = sum(map(_num_blocks, extents)) - sum(map(_num_blocks, self.extents))
        self.extents = extents
        self.num_blocks += more
        return more

    def extended(self, extents: tuple[Extent, ...]) -> int:
        """The same for what `Allocator.extend` returned: nothing but the last extent and those
        behind it can differ.
        """
        before = self.extents
        if (
            0 < len(before) == len(extents) - 1 and extents[-2] is before[-1]
        ):  # what `paged` does most
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
        return (
            merged(chain(*(block.extents for block in self.shared), self.extents))
            if self.shared
            else self.extents
        )

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The slots of tokens ``start .. stop - 1`` as runs ``(first slot, slot behind the last)``,
        in token order.
        """
        return slot_runs(self.all_extents, self.block_size, start, stop)


class Way(StrEnum):
    """Between which pools tokens move."""

    WITHIN = "within"
    OUT = "out"  # swapped out, to the host's pool
    BACK = "back"


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens to be copied from one table's slots to another's before the next write: relocation,
    compaction, copy on write, swap.

    The first ``num_tokens`` tokens that lie in ``source``, without the first ``skipped``, to the
    same places in ``target``.
    """

    source: tuple[Extent, ...]
    target: tuple[Extent, ...]
    num_tokens: int
    skipped: int = 0
    way: Way = Way.WITHIN


class BlockManager:
    """Block tables of the live sequences over one allocator.

    ``reserve`` takes room for a sequence's last token at once and never grows. ``chain`` takes what
    its tokens need and lets the allocator extend it. ``relocate`` extends in place, else moves the
    sequence to a larger place; the copies it owes stand in ``moves``, in order, until somebody
    makes them. With ``prefix_caching``, whole blocks of a prompt are found by their prefix ids and
    shared; each is an allocation by itself, so that it can be evicted by itself. Where an allocator
    can ``split`` what it handed out, they lie side by side all the same, and a sequence's own whole
    blocks are cached too when it leaves.

    ``max_moved_tokens``: once as many are owed, nobody else is relocated, and nothing compacted,
    before the copies are made: a step is held up by so many at most, or by one sequence.
    `is_deferred` says that somebody waits for that.
    """

    def __init__(
        self,
        strategy: Strategy,
        num_blocks: int,
        block_size: int,
        max_seq_len: int | None = None,
        prefix_caching: bool = False,
        max_moved_tokens: int | None = None,
    ):
        self.strategy = strategy
        self.growth = strategy.growth
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self.block_size = at_least("block_size", block_size, 1)
        region = (
            self.blocks_for(at_least("max_seq_len", max_seq_len, 1))
            if max_seq_len is not None
            else None
        )
        self.allocator = make_allocator(strategy.placement, num_blocks, region_blocks=region)
        self._empty = make_allocator(
            strategy.placement, num_blocks, region_blocks=region
        )  # asked what could ever fit
        self._compact = getattr(self.allocator, "compact", None)
        self._split = getattr(self.allocator, "split", None)
        self.tables: dict[str, BlockTable] = {}
        self.moves: list[Move] = []
        self.max_moved_tokens = max_moved_tokens
        self.is_deferred = False
        self.prefix = PrefixCache() if prefix_caching else None
        if prefix_caching and (one := self._empty.allocate(1)) is not None:
            if sum(map(_num_blocks, one)) > 1:
                raise BadInput(
                    f"prefix caching shares single blocks, and strategy {strategy.name!r} hands "
                    "out more than one at a time"
                )
            self._empty.free(one)
        self.num_held = 0  # blocks of live sequences, a shared one counted once
        self.num_releases = (
            0  # times that blocks came back: who was refused may ask again when it has moved
        )

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

    def blocks_wanted(
        self,
        num_tokens: int,
        max_tokens: int,
        prefix_ids: Sequence[Hashable] = (),
        prompt_tokens: int = 0,
    ) -> int:
        """Free blocks that admitting a sequence takes now: for its last token under ``reserve``,
        else for those it has.

        Cached blocks of its prefix that live sequences hold are not free, and not wanted.
        """
        wanted = self.blocks_for(max_tokens if self.growth == "reserve" else num_tokens)
        if self.prefix is not None and prefix_ids:
            wanted -= sum(
                block.num_holders > 0
                for block in self.prefix.match(prefix_ids[: prompt_tokens // self.block_size])
            )
        return wanted

    def allocate(
        self,
        sequence: str,
        num_tokens: int,
        max_tokens: int,
        prefix_ids: Sequence[Hashable] = (),
        prompt_tokens: int = 0,
    ) -> bool:
        """Room for ``num_tokens`` (under ``reserve``, for ``max_tokens``) in a new table. False,
        and nothing taken, without room.

        ``prefix_ids`` name the blocks of the first ``prompt_tokens`` tokens. The table's
        ``num_tokens`` are those already computed: of the cached prefix, but never all.
        """
        if sequence in self.tables:
            raise BadInput(f"sequence {sequence!r} already holds blocks: free it first")
        wanted = self.blocks_wanted(num_tokens, max_tokens)
        sharing = self.prefix is not None and prefix_ids
        table = (
            self._allocate_shared(wanted, num_tokens, prefix_ids, prompt_tokens)
            if sharing
            else None
        )
        if table is None and not (
            sharing and self.num_held
        ):  # in a pool of its own, what it would share may lie in its way
            extents = self._take(wanted)
            table = None if extents is None else BlockTable(extents, self.block_size)
            if table and table.num_blocks < wanted:
                raise BadInput(
                    f"strategy {self.strategy.name!r} handed out {table.num_blocks} blocks where "
                    f"{wanted} were asked for"
                )
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
            extents = (
                self.allocator.extend(table.extents, missing)
                if self.prefix is None
                else self._extend(table, missing)
            )
            if extents is not None:
                self.num_held += (more := table.extended(extents))
                if more < missing:
                    raise BadInput(
                        f"strategy {self.strategy.name!r} extended by {more} blocks where "
                        f"{missing} were asked for"
                    )
                return True
            if (
                self.growth == "relocate"
                and (extents := self._relocate(table, missing)) is not None
            ):
                self.num_held += table.replace(extents)
                return True
            if self.is_deferred or not self._evict(missing):
                return False

    def free(self, sequence: str, prefix_ids: Sequence[Hashable] = ()) -> None:
        """Give the sequence's blocks back; its table keeps the tokens it ended with.

        ``prefix_ids`` name the whole blocks of all its tokens: those in its own allocation stay
        behind as cached ones.
        """
        table = self.tables.pop(sequence)
        if prefix_ids and self.prefix is not None:
            self._leave_behind(table, prefix_ids)
        own = table.num_blocks - len(table.shared)
        if own:
            self.allocator.free(table.extents)
        self.num_held -= own
        if table.shared:
            whole = max(table.num_tokens // self.block_size, table.num_found)
            self.num_held -= self._release(
                table.shared,
                len(table.shared) if table.num_tokens >= table.prompt_tokens else whole,
            )
        self.num_releases += 1

    def forget_prefixes(self) -> None:
        """Give back every cached block that nobody holds: what they hold is not to be trusted any
        more.
        """
        while self.prefix is not None and self.prefix.num_idle:
            self.allocator.free(self.prefix.evict().extents)

    def moves_made(self) -> None:
        """The copies owed have been made."""
        self.moves.clear()
        if self.is_deferred:  # who was put off may ask again
            self.is_deferred = False
            self.num_releases += 1

    def stats(self) -> Stats:
        """The allocator's; one of the user's own may report a plain dict."""
        return Stats(self.allocator.stats())

    def check(self) -> None:
        self.allocator.check()
        held = sorted(extent for table in self.tables.values() for extent in table.extents)
        cached = {block: None for table in self.tables.values() for block in table.shared}
        held = sorted(chain(held, *(block.extents for block in cached)))
        assert not held or (held[0].start >= 0 and held[-1].end <= self.num_blocks), (
            "a block lies outside the pool"
        )
        assert all(a.end <= b.start for a, b in pairwise(held)), "two sequences hold the same block"
        assert sum(extent.num_blocks for extent in held) == self.num_held
        idle = 0
        if self.prefix is not None:
            self.prefix.check()
            idle = self.prefix.num_idle
        assert self.num_held + idle == self.stats().used_blocks, "a block is lost"

    # --- taking blocks ----------------------------------------------------------------------------

    def _take(self, num_blocks: int) -> tuple[Extent, ...] | None:
        """Blocks of the allocator; idle cached blocks are evicted for them while that can help."""
        if self._compact and not self._owes_enough():
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
        """Evict one idle block; False when there is none, or when evicting all could not make
        ``wanted`` blocks free.
        """
        if self.prefix is None or not self.prefix.num_idle or self.free_blocks < wanted:
            return False
        self.allocator.free(self.prefix.evict().extents)
        return True

    def _allocate_shared(
        self, wanted: int, num_tokens: int, prefix_ids: Sequence[Hashable], prompt_tokens: int
    ) -> BlockTable | None:
        """A table whose whole prompt blocks are cached ones: those found, and new ones under the
        ids not found.

        Where the prompt parts from every cached one inside a block, the tokens before that are
        copied from the closest. Of ids that do not say their tokens, a prompt's partial last one is
        cached too, but its owner goes on writing behind it: who finds it copies it.
        """
        whole = prefix_ids[: prompt_tokens // self.block_size]
        shared = self.prefix.match(whole)
        source, num_copied, num_found = self._partly_found(
            prefix_ids, shared, len(whole), prompt_tokens
        )
        if wanted - len(shared) > self.free_blocks - sum(not block.num_holders for block in shared):
            return None
        num_idle = self.prefix.hold(shared)
        behind = whole if whole and isinstance(whole[0], BlockHash) else prefix_ids
        new: dict[Hashable, None] = {}
        for prefix_id in behind[num_found:]:  # all, but for ids that contradict
            if prefix_id in self.prefix or prefix_id in new:
                break
            new[prefix_id] = None
        taken = self._take_apart(wanted - len(shared), len(new))
        if taken is None:
            self._release(shared, num_written=len(shared))
            return None
        singles, extents = taken
        fresh = [
            self.prefix.add(prefix_id, one) for prefix_id, one in zip(new, singles, strict=True)
        ]
        self.prefix.hold(fresh)
        table = BlockTable(extents, self.block_size, 0, (*shared, *fresh), num_found, prompt_tokens)
        table.num_tokens = min(
            len(shared) * self.block_size + num_copied, prompt_tokens, num_tokens - 1
        )
        if num_copied:
            self.prefix.touch(source)
            target = fresh[0].extents if fresh else extents
            self.moves.append(Move(source.extents, (Extent(target[0].start, 1),), num_copied))
        self.num_held += table.num_blocks - len(shared) + num_idle
        self.prefix.num_asked += len(prefix_ids)
        self.prefix.num_found += num_found
        return table

    def _partly_found(
        self,
        prefix_ids: Sequence[Hashable],
        shared: list[CachedBlock],
        num_whole: int,
        prompt_tokens: int,
    ) -> tuple[CachedBlock | None, int, int]:
        """Behind the ``shared`` blocks: the block to copy from, how many tokens, and how many ids
        are found with it.
        """
        found = (
            self.prefix.closest(prefix_ids[len(shared)]) if len(shared) < len(prefix_ids) else None
        )
        if found is None:
            return None, 0, len(shared)
        source, num_tokens = found
        num_found = len(shared)
        if not num_tokens:  # a prompt's partial last block, by an id that does not say its tokens
            if (
                num_found < num_whole
            ):  # an id of somebody's partial block, which cannot be this whole one
                return None, 0, num_found
            num_tokens, num_found = prompt_tokens - num_whole * self.block_size, num_found + 1
        elif num_tokens < COPIED_FROM:
            return None, 0, num_found
        return source, num_tokens if self._is_written(source) else 0, num_found

    def _take_apart(
        self, num_blocks: int, num_singles: int
    ) -> tuple[list[tuple[Extent, ...]], tuple[Extent, ...]] | None:
        """``num_blocks`` blocks, the first ``num_singles`` of them each an allocation by itself;
        None, and nothing taken, without room.
        """
        if not num_singles:
            extents = self._take(num_blocks) if num_blocks else ()
            return None if extents is None else ([], extents)
        if self._split:
            extents = self._take(num_blocks)
            return None if extents is None else self._split(extents, num_singles)
        singles: list[tuple[Extent, ...]] = []
        extents: tuple[Extent, ...] | None = ()
        while len(singles) < num_singles and (one := self._take(1)) is not None:
            singles.append(one)
        if len(singles) == num_singles and num_blocks > num_singles:
            extents = self._take(num_blocks - num_singles)
        if len(singles) < num_singles or extents is None:
            for one in singles:
                self.allocator.free(one)
            return None
        return singles, extents

    def _leave_behind(self, table: BlockTable, prefix_ids: Sequence[Hashable]) -> None:
        """Cache a leaving sequence's own whole blocks under the ids that are not known yet; the
        others' content is there already.
        """
        first, last = len(table.shared), min(table.num_tokens // self.block_size, len(prefix_ids))
        if first >= last or not table.extents or not self._split:
            return
        singles, rest = self._split(table.extents, last - first)
        for prefix_id, one in reversed(
            list(zip(prefix_ids[first:last], singles, strict=True))
        ):  # the last is evicted first
            if prefix_id in self.prefix:
                self.allocator.free(one)
            else:
                self.prefix.add(prefix_id, one)
        self.num_held -= len(singles)
        table.extents = rest
        table.num_blocks -= len(singles)

    def _is_written(self, block: CachedBlock) -> bool:
        """Whether a step before the coming one has computed a cached block; if not, a copy would
        hold nothing.

        Not while one of its holders is to compute it: the others count it as theirs from their
        admission on.
        """
        for table in self.tables.values():
            if block in table.shared:
                end = (table.shared.index(block) + 1) * self.block_size
                if table.num_tokens < min(end, table.prompt_tokens):
                    return False
        return True

    def _release(self, shared: Sequence[CachedBlock], num_written: int) -> int:
        """One holder less for each cached block; those behind the first ``num_written`` are
        forgotten. How many are now free.
        """
        idle = self.prefix.release(shared)
        if unwritten := [block for block in shared[num_written:] if not block.num_holders]:
            self.prefix.forget(unwritten)
            self.allocator.free(extent for block in unwritten for extent in block.extents)
        return idle

    def _owes_enough(self) -> bool:
        if self.max_moved_tokens is None or not self.moves:
            return False
        return (
            sum(move.num_tokens - move.skipped for move in self.moves if move.way is Way.WITHIN)
            >= self.max_moved_tokens
        )

    def _relocate(self, table: BlockTable, missing: int) -> tuple[Extent, ...] | None:
        if self._owes_enough():
            self.is_deferred = True
            return None
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
