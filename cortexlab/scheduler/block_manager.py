"""Which blocks a sequence holds, and what happens when it outgrows them. Integers only."""

from collections.abc import Hashable, Sequence
from functools import cached_property

from ..allocators import Allocator, Extent, Moved, Stats, Strategy, counted, make_allocator, merged
from ..errors import BadInput, at_least
from .block_table import BlockTable, Move, Need, Way
from .invariants import check_books
from .prefix_cache import PrefixSharing


class BlockManager:
    """Block tables of the live sequences over one allocator.

    ``growth``: ``reserve`` takes room for all tokens to come at once and never grows. ``chain``
    takes room for the tokens there are and lets it gain extents. ``relocate`` extends in place,
    else moves the sequence to a larger place. The caller makes ``moves``, in order, then calls
    `moves_made`. With ``prefix_caching``, prompts share cached blocks (`PrefixSharing`).

    ``max_moved_tokens``: upper bound on tokens copied between two steps (the last copy may
    overshoot); `is_deferred` says that a sequence waits for the next step to be relocated.
    """

    layer_shares = (1,)  # of a block's layers, the share that each group uses

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
        self._region = None  # blocks per region of `Static`
        if max_seq_len is not None:
            self._region = self.most_blocks(at_least("max_seq_len", max_seq_len, 1))
        self.max_moved_tokens = max_moved_tokens
        self.num_releases = 0  # version of what is free: a refusal holds until it changes
        self._has_prefixes = prefix_caching
        self.clear()

    def clear(self) -> None:
        """Start over with an empty pool and an empty prefix cache; tables handed out are void."""
        self.allocator = self.new_allocator()
        self._compact = getattr(self.allocator, "compact", None)
        self.tables: dict[BlockTable, None] = {}  # of live sequences, in order of admission
        self.sequences = self.tables
        self.moves: list[Move] = []
        self.is_deferred = False
        self.num_releases += 1
        self.prefix = PrefixSharing(self) if self._has_prefixes else None

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_held(self) -> int:
        """Blocks of live sequences, a shared one counted once."""
        held = self.num_blocks - self.allocator.free_blocks
        return held - self.prefix.num_idle if self.prefix is not None else held

    @property
    def free_blocks(self) -> int:
        """Blocks held by no live sequence; idle cached blocks are free."""
        return self.num_blocks - self.num_held

    def new_allocator(self) -> Allocator:
        """An empty allocator like this manager's."""
        placement = self.strategy.placement
        allocator = make_allocator(placement, self.num_blocks, region_blocks=self._region)
        return counted(allocator)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that a sequence of ``num_tokens`` holds at most."""
        return sum(self._allocations(num_tokens))

    def could_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of ``num_tokens`` fits the pool when nothing else is in it."""
        taken = []
        for size in self._allocations(num_tokens):
            taken.append(self._empty.allocate(size))
            if taken[-1] is None:
                break
        for extents in filter(None, taken):
            self._empty.free(extents)
        return taken[-1] is not None

    def blocks_wanted(self, need: Need) -> int:
        """Free blocks that admission takes: for all tokens to come under ``reserve``, else for
        those there are; less the cached blocks in use (idle ones count as free).
        """
        wanted = self._blocks_of(need)
        if self.prefix is not None and need.prefix_ids:
            wanted -= sum(block.num_holders > 0 for block in self.prefix.found(need))
        return wanted

    def allocate(self, need: Need) -> BlockTable | None:
        """A new table for ``need``; None without room. Its ``num_tokens`` are found in the cache:
        never all, as one is computed to sample.
        """
        wanted = self._blocks_of(need)
        sharing = self.prefix is not None and need.prefix_ids
        table = self.prefix.allocate(need, wanted) if sharing else None
        # With no live sequence, try again unshared: all idle blocks can then be evicted.
        if table is None and not (sharing and self.num_held):
            extents = self.take(wanted)
            if extents is None:
                return None
            table = BlockTable(extents, self.block_size)
            if table.num_blocks < wanted:
                raise BadInput(
                    f"strategy {self.strategy.name!r} handed out {table.num_blocks} blocks where "
                    f"{wanted} were asked for"
                )
        if table is not None:
            self.tables[table] = None
        return table

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make the table hold ``num_tokens``. False, and nothing changed, when it cannot."""
        missing = -(-num_tokens // self.block_size) - table.num_blocks
        if missing <= 0:
            return True
        if self.growth == "reserve":
            return False
        while True:
            own = table.extents
            extents = self.allocator.extend(own, missing) if own else self.take(missing)
            if extents is not None:
                # All but the last extent stay, unless a user's allocator merged some.
                more = table.replace(extents, len(own) - 1 if len(extents) >= len(own) > 0 else 0)
                if more < missing:
                    raise BadInput(
                        f"strategy {self.strategy.name!r} extended by {more} blocks where "
                        f"{missing} were asked for"
                    )
                return True
            if self.growth == "relocate" and self._relocate(table, missing):
                return True
            if self.is_deferred or not self._evict(missing):
                return False

    def free(self, table: BlockTable, prefix_ids: Sequence[Hashable] = ()) -> None:
        """Give the sequence's blocks back. ``prefix_ids`` name its full blocks, of prompt and
        output: those of its own allocation stay in the cache.
        """
        del self.tables[table]
        if prefix_ids and self.prefix is not None:
            self.prefix.leave_behind(table, prefix_ids)
        if table.extents:
            self.allocator.free(table.extents)
        if table.shared:
            self.prefix.release_of(table)
        self.num_releases += 1

    def moves_made(self) -> None:
        """Forget copies that have been made; a deferred sequence may ask again."""
        self.moves.clear()
        if self.is_deferred:
            self.is_deferred = False
            self.num_releases += 1

    def take(self, num_blocks: int) -> tuple[Extent, ...] | None:
        """Blocks, after compaction if any; idle cached ones are evicted while that helps."""
        if self._compact and not self._owes_enough():
            self._follow(self._compact(num_blocks))
        extents = self.allocator.allocate(num_blocks)
        while extents is None and self._evict(num_blocks):
            extents = self.allocator.allocate(num_blocks)
        return extents

    def stats(self) -> Stats:
        """The allocator's statistics; a user's allocator may give a dict."""
        return Stats(self.allocator.stats())

    def check(self) -> None:
        """`AssertionError` unless every block is in one place, and tables and allocator agree."""
        check_books(self)

    @cached_property
    def _empty(self) -> Allocator:
        """A pool that stays empty, to ask what could ever fit."""
        return self.new_allocator()

    def _allocations(self, num_tokens: int) -> list[int]:
        """Blocks of each allocation that a sequence of ``num_tokens`` has at most."""
        return [self.blocks_for(num_tokens)]

    def _blocks_of(self, need: Need) -> int:
        return self.blocks_for(need.max_slots if self.growth == "reserve" else need.num_tokens)

    def _evict(self, wanted: int) -> bool:
        """Evict one idle block; False when that cannot help."""
        if self.prefix is None or not self.prefix.num_idle or self.free_blocks < wanted:
            return False
        self.allocator.free(self.prefix.evict().extents)
        return True

    def _owes_enough(self) -> bool:
        """Whether the copies owed have reached ``max_moved_tokens``."""
        if self.max_moved_tokens is None or not self.moves:
            return False
        owed = (move.num_tokens - move.skipped for move in self.moves if move.way is Way.WITHIN)
        return sum(owed) >= self.max_moved_tokens

    def _relocate(self, table: BlockTable, missing: int) -> bool:
        """Move the table's own blocks to a place with room for ``missing`` more."""
        if self._owes_enough():
            self.is_deferred = True
            return False
        extents = self.allocator.allocate(table.num_own + missing)
        if extents is None:
            return False
        own_tokens = max(0, table.num_tokens - len(table.shared) * self.block_size)
        self.moves.append(Move(merged(table.extents), extents, own_tokens))
        self.allocator.free(table.extents)
        self.num_releases += 1
        table.replace(extents)
        return True

    def _follow(self, moved: Sequence[Moved]) -> None:
        """Point tables at their compacted blocks; owe the copies."""
        if not moved:
            return
        owner = {table.extents[0].start: table for table in self.tables if table.extents}
        for before, after, copies in moved:
            owner[before[0].start].extents = after
            for source, target in copies:
                self.moves.append(Move((source,), (target,), source.num_blocks * self.block_size))
