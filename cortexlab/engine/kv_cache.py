"""The logical layer over the physical one: block tables over an arena, and the copies they owe."""

from collections.abc import Sequence

import mlx.core as mx

from ..allocators import Stats, Strategy, strategy_of
from ..errors import MAX_COUNT, at_least
from ..scheduler.block_table import Way, slot_runs
from ..scheduler.layer_groups import LayerGroup, block_manager
from .arena import Arena, LayerShape, Slots
from .host_arena import HostArena


class KVCache:
    """K and V of many sequences: a `BlockManager` over an `Arena`. With ``swap_blocks``, ``swap``
    and ``host`` are such a pair in the host's memory. ``layers``: shapes of a block's layers;
    ``groups``, ``max_chunk``: see `layer_groups`; ``options``: more of a `BlockManager`.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        strategy: Strategy,
        num_blocks: int,
        block_size: int,
        *,
        dtype: mx.Dtype = mx.float32,
        swap_blocks: int = 0,
        groups: Sequence[LayerGroup] = (),
        max_chunk: int = MAX_COUNT,
        **options,
    ):
        sizes = num_blocks, block_size
        self.blocks = block_manager(groups, max_chunk, strategy, *sizes, **options)
        self.arena = Arena(layers, self.blocks.num_slots, dtype)
        self.swap = self.host = None
        if at_least("swap_blocks", swap_blocks, 0):
            paged = strategy_of("paged")
            self.swap = block_manager(groups, max_chunk, paged, swap_blocks, block_size)
            self.host = HostArena(self.arena, self.swap.num_slots)

    def make_moves(self) -> None:
        """Make the copies owed, in order: one may land where an earlier one left."""
        for move in self.blocks.moves:
            size, skipped, count = self.blocks.block_size, move.skipped, move.num_tokens
            source = Slots(list(slot_runs(move.source, size, skipped, count)))
            target = Slots(list(slot_runs(move.target, size, skipped, count)))
            if move.way is Way.WITHIN:
                self.arena.copy(source, target)
            elif move.way is Way.OUT:
                self.host.take(self.arena, source, target)
            else:
                self.host.give(self.arena, source, target)
        self.blocks.moves_made()

    def clear(self) -> None:
        """Start over with empty pools; what the arena holds is void."""
        for pool in filter(None, (self.blocks, self.swap)):
            pool.clear()

    def warmup(self) -> None:
        """Evaluate all that is under way; a new arena's pages are touched already."""
        mx.eval(self.arena.arrays())

    def stats(self) -> Stats:
        """The allocator's statistics, and those of cache and arena. Idle cached blocks are free in
        ``free_blocks``, but used in ``largest_free_run`` and ``num_holes``.
        """
        blocks = self.blocks
        return Stats(
            blocks.stats(),
            free_blocks=blocks.free_blocks,
            used_blocks=blocks.num_held,
            cached_blocks=blocks.prefix.num_idle if blocks.prefix is not None else 0,
            num_blocks=blocks.num_blocks,
            block_size=blocks.block_size,
            num_sequences=len(blocks.sequences),
            arena_bytes=self.arena.nbytes,
            held_bytes=blocks.num_held * blocks.block_size * self.arena.slot_bytes
            + self.arena.states.nbytes,
            copied_bytes=self.arena.copied_bytes,
            state_bytes=self.arena.states.nbytes,
            state_copied_bytes=self.arena.states.copied_bytes,
        )
