"""`KVCache` as CortexStream documents it, in snake case: sequences by name over a cache of ours.

Source: github.com/pythongiant/CortexStream at f8c8b1f, ``docs/KV_CACHE_API_REFERENCE.md``.
"""

from collections.abc import Callable

import mlx.core as mx

from ..allocators import Allocator, Extent, strategy_of
from ..engine import kv_cache
from ..engine.arena import LayerShape, Slots
from ..errors import BadInput, NotContiguous, a_key, at_least, shown
from ..scheduler.block_table import BlockTable, Need

MIB = 1 << 20


class KVCache(kv_cache.KVCache):
    """K and V of many sequences in one arena of ``max_total_tokens`` slots (rounded up to a block).

    ``strategy`` names a pair of placement and growth, or is a factory ``Callable[[int],
    Allocator]``; ``growth`` overrides the second half; ``max_seq_len`` is the region of ``static``
    in tokens (default: an eighth of the pool). float32 unless ``dtype``.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_total_tokens: int,
        block_size: int = 16,
        strategy: str | Callable[[int], Allocator] = "cortexstream",
        *,
        growth: str | None = None,
        max_seq_len: int | None = None,
        dtype: mx.Dtype = mx.float32,
    ):
        block_size = at_least("block_size", block_size, 1)
        num_blocks = -(-at_least("max_total_tokens", max_total_tokens, 1) // block_size)
        head_dim = at_least("head_dim", head_dim, 1)
        shape = LayerShape(at_least("num_kv_heads", num_kv_heads, 1), head_dim, head_dim)
        if not isinstance(dtype, mx.Dtype):
            raise BadInput(f"dtype must be a type of MLX, not {shown(dtype)}")
        layers = [shape] * at_least("num_layers", num_layers, 1)
        strategy = strategy_of(strategy, growth)
        super().__init__(
            layers, strategy, num_blocks, block_size, dtype=dtype, max_seq_len=max_seq_len
        )
        self.tables: dict[str, BlockTable] = {}  # of sequences by name

    # --- sequences --------------------------------------------------------------------------------

    def allocate_for(self, sequence: str, num_tokens: int, max_tokens: int | None = None) -> bool:
        """Blocks for a sequence of ``num_tokens``, growing to ``max_tokens`` (under ``reserve`` all
        at once). False without room.
        """
        num_tokens = at_least("num_tokens", num_tokens, 1)
        max_tokens = (
            num_tokens if max_tokens is None else at_least("max_tokens", max_tokens, num_tokens)
        )
        if a_key("sequence", sequence) in self.tables:
            raise BadInput(f"sequence {shown(sequence)} already holds blocks: free it first")
        table = self.blocks.allocate(Need(num_tokens, max_tokens))
        if table is None:
            return False
        self.make_moves()  # of sequences that were moved to make room
        self.tables[sequence] = table
        table.num_tokens = num_tokens
        return True

    def append_token(self, sequence: str) -> bool:
        """Room for one more token. False at capacity: under ``reserve`` what was reserved, else
        when the pool has no block left.
        """
        table = self._table(sequence)
        if not self.blocks.grow(table, table.num_tokens + 1):
            return False
        self.make_moves()
        table.num_tokens += 1
        return True

    def write(
        self, sequence: str, layer: int, keys: mx.array, values: mx.array, start: int
    ) -> None:
        """Store a layer's K and V, ``[num_kv_heads, n, head_dim]``, of tokens ``start .. start + n
        - 1``, which must be allocated.
        """
        table = self._table(sequence)
        self._check_layer(layer)
        heads, key_dim, value_dim = self.arena.layers[layer]
        for name, array, dim in (("keys", keys, key_dim), ("values", values, value_dim)):
            if not isinstance(array, mx.array):
                raise BadInput(f"{name} must be an array of MLX, not {shown(array)}")
            if array.ndim != 3 or array.shape[::2] != (heads, dim) or array.shape[1] < 1:
                raise BadInput(f"{name} must be [{heads}, n, {dim}], not {list(array.shape)}")
        start = at_least("start", start, 0)
        stop = start + keys.shape[1]
        if values.shape[1] != keys.shape[1] or stop > table.num_tokens:
            raise BadInput(
                f"tokens {start}..{stop - 1} of K and V do not fit {sequence!r}, which has "
                f"{table.num_tokens} tokens"
            )
        self.arena.write(layer, Slots(table.runs(start, stop)), keys, values)

    def get_k_view(self, sequence: str, layer: int) -> mx.array:
        """``[num_kv_heads, used_tokens, head_dim]`` of the arena itself, not a copy.
        `NotContiguous` when it lies in several extents.

        MLX writes in place only while no view is alive: drop it before the next `write`, or that
        write copies the arena.
        """
        return self._only(self.get_k_views(sequence, layer), sequence)

    def get_v_view(self, sequence: str, layer: int) -> mx.array:
        """As `get_k_view`, of V."""
        return self._only(self.get_v_views(sequence, layer), sequence)

    def get_k_views(self, sequence: str, layer: int) -> tuple[mx.array, ...]:
        """One view an extent, in token order."""
        return self._views(self.arena.keys, sequence, layer)

    def get_v_views(self, sequence: str, layer: int) -> tuple[mx.array, ...]:
        """As `get_k_views`, of V."""
        return self._views(self.arena.values, sequence, layer)

    def used_tokens(self, sequence: str) -> int:
        """Tokens of the sequence, 0 if unknown."""
        table = self.tables.get(a_key("sequence", sequence))
        return table.num_tokens if table else 0

    def get_token_offset_in_block(self, sequence: str) -> int:
        """Where in its block the next token goes, -1 if unknown."""
        used = self.used_tokens(sequence)
        return used % self.blocks.block_size if sequence in self.tables else -1

    def free_for(self, sequence: str) -> None:
        """Give the sequence's blocks back. Safe to repeat."""
        if a_key("sequence", sequence) in self.tables:
            self.blocks.free(self.tables.pop(sequence))

    def extents(self, sequence: str) -> tuple[Extent, ...]:
        """Where the sequence lies, in blocks."""
        return self._table(sequence).extents

    # --- the pool ---------------------------------------------------------------------------------

    def get_total_allocated(self) -> int:
        """Bytes of K and V in blocks that sequences hold, over all layers."""
        return self.stats().used_blocks * self.block_bytes

    def get_total_free(self) -> int:
        """Bytes of K and V in free blocks, over all layers."""
        return self.stats().free_blocks * self.block_bytes

    def get_num_allocated_sequences(self) -> int:
        return len(self.tables)

    def is_full(self) -> bool:
        """Whether no block is free."""
        return self.stats().free_blocks == 0

    def get_fragmentation(self) -> float:
        """External fragmentation: 1 - largest free run / free blocks."""
        return self.stats().external_fragmentation

    @property
    def block_bytes(self) -> int:
        return self.blocks.block_size * self.arena.slot_bytes

    def dump_cache_stats(self) -> str:
        """Configuration, allocation state, and one line a sequence: ``id: used/max tokens, blocks
        [start, +n]``.
        """
        arena, blocks = self.arena, self.blocks
        heads, dim, _ = arena.layers[0]
        lines = [
            "=== KVCache Statistics ===",
            "Configuration:",
            f"  Layers: {len(arena.layers)}, Heads: {heads}, HeadDim: {dim}",
            f"  BlockSize: {blocks.block_size}, TotalBlocks: {blocks.num_blocks}, Strategy: "
            f"{blocks.strategy.name}",
            "",
            "Allocation State:",
            f"  Allocated sequences: {len(self.tables)}",
            f"  Total allocated: {self.get_total_allocated() / MIB:.2f} MB",
            f"  Total free: {self.get_total_free() / MIB:.2f} MB",
            f"  Fragmentation: {self.get_fragmentation():.2f}",
            "",
            "Sequences:",
        ]
        for sequence, table in self.tables.items():
            where = " ".join(f"[{extent.start}, +{extent.num_blocks}]" for extent in table.extents)
            lines.append(
                f"  {sequence}: {table.num_tokens}/{table.capacity} tokens, blocks {where}"
            )
        return "\n".join(lines)

    # --- helpers ----------------------------------------------------------------------------------

    def _table(self, sequence: str) -> BlockTable:
        if a_key("sequence", sequence) not in self.tables:
            raise BadInput(f"unknown sequence {shown(sequence)}: allocate_for it first")
        return self.tables[sequence]

    def _check_layer(self, layer: int) -> None:
        if at_least("layer", layer, 0) >= len(self.arena.layers):
            raise BadInput(f"layer must be below {len(self.arena.layers)}, not {layer}")

    def _views(self, arrays: list[mx.array], sequence: str, layer: int) -> tuple[mx.array, ...]:
        table = self._table(sequence)
        self._check_layer(layer)
        return tuple(Slots(table.runs(0, table.num_tokens)).views(arrays[layer]))

    def _only(self, views: tuple[mx.array, ...], sequence: str) -> mx.array:
        if len(views) != 1:
            raise NotContiguous(
                f"sequence {sequence!r} lies in {len(views)} extents: use get_k_views / get_v_views"
            )
        return views[0]
