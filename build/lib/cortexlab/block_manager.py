"""Which blocks a sequence holds, and what happens when it outgrows them. Integers only."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from .allocators import Extent, Strategy, make_allocator, merged
from .errors import BadInput, at_least


@dataclass(eq=False, slots=True)
class BlockTable:
    """A sequence's extents in token order. Token ``t`` lies in the ``t``-th slot of them taken one behind the other."""

    extents: tuple[Extent, ...]
    block_size: int
    num_tokens: int = 0  # slots that hold a token; after the sequence has ended, as many as ever did
    num_blocks: int = field(init=False)

    def __post_init__(self):
        self.replace(self.extents)

    def replace(self, extents: tuple[Extent, ...]) -> None:
        self.extents = extents
        self.num_blocks = sum(extent.num_blocks for extent in extents)

    @property
    def capacity(self) -> int:
        """Slots held."""
        return self.num_blocks * self.block_size

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The slots of tokens ``start .. stop - 1`` as runs ``(first slot, slot behind the last)``, in token order."""
        token = 0  # of the extent's first slot
        if start >= stop:
            return
        for extent in self.extents:
            if token >= stop:
                return
            size = extent.num_blocks * self.block_size
            if token + size > start:
                first = extent.start * self.block_size - token
                yield first + max(start, token), first + min(stop, token + size)
            token += size


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens to be copied from one table's slots to another's before the next write: the price of relocation."""

    source: tuple[Extent, ...]
    target: tuple[Extent, ...]
    num_tokens: int


class BlockManager:
    """Block tables of the live sequences over one allocator.

    ``reserve`` takes room for a sequence's last token at once and never grows. ``chain`` takes what its tokens need and lets the
    allocator extend it. ``relocate`` extends in place, else moves the sequence to a larger place; the copies it owes stand in
    ``moves``, in order, until somebody makes them.
    """

    def __init__(self, strategy: Strategy, num_blocks: int, block_size: int, max_seq_len: int | None = None):
        self.strategy = strategy
        self.num_blocks = at_least("num_blocks", num_blocks, 1)
        self.block_size = at_least("block_size", block_size, 1)
        region = self.blocks_for(at_least("max_seq_len", max_seq_len, 1)) if max_seq_len is not None else None
        self.allocator = make_allocator(strategy.placement, num_blocks, region_blocks=region)
        self._empty = make_allocator(strategy.placement, num_blocks, region_blocks=region)  # asked what could ever fit
        self.tables: dict[str, BlockTable] = {}
        self.moves: list[Move] = []

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def could_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of ``num_tokens`` fits the pool when nothing else is in it."""
        extents = self._empty.allocate(self.blocks_for(num_tokens))
        if extents is None:
            return False
        self._empty.free(extents)
        return True

    def blocks_wanted(self, num_tokens: int, max_tokens: int) -> int:
        """Blocks that admitting a sequence takes now: for its last token under ``reserve``, else for those it has."""
        return self.blocks_for(max_tokens if self.strategy.growth == "reserve" else num_tokens)

    def allocate(self, sequence: str, num_tokens: int, max_tokens: int) -> bool:
        """Room for ``num_tokens`` (under ``reserve``, for ``max_tokens``) in a new table. False, and nothing taken, without room."""
        if sequence in self.tables:
            raise BadInput(f"sequence {sequence!r} already holds blocks: free it first")
        extents = self.allocator.allocate(self.blocks_wanted(num_tokens, max_tokens))
        if extents is None:
            return False
        self.tables[sequence] = BlockTable(extents, self.block_size)
        return True

    def grow(self, sequence: str, num_tokens: int) -> bool:
        """Make the table hold ``num_tokens``. False, and nothing changed, when it cannot."""
        table = self.tables[sequence]
        if num_tokens <= table.capacity:
            return True
        if self.strategy.growth == "reserve":
            return False
        missing = self.blocks_for(num_tokens) - table.num_blocks
        extents = self.allocator.extend(table.extents, missing)
        if extents is None and self.strategy.growth == "relocate":
            extents = self._relocate(table, missing)
        if extents is None:
            return False
        table.replace(extents)
        return True

    def free(self, sequence: str) -> None:
        """Give the sequence's blocks back; its table keeps the tokens it ended with."""
        self.allocator.free(self.tables.pop(sequence).extents)

    def check(self) -> None:
        self.allocator.check()
        held = sorted(extent for table in self.tables.values() for extent in table.extents)
        assert all(a.end <= b.start for a, b in pairwise(held)), "two sequences hold the same block"
        assert sum(extent.num_blocks for extent in held) == self.allocator.stats().used_blocks, "a block is lost"

    def _relocate(self, table: BlockTable, missing: int) -> tuple[Extent, ...] | None:
        extents = self.allocator.allocate(table.num_blocks + missing)
        if extents is not None:
            self.moves.append(Move(merged(table.extents), extents, table.num_tokens))
            self.allocator.free(table.extents)
        return extents
