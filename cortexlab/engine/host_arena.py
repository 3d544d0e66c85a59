"""K and V of swapped-out sequences in the host's memory: NumPy arrays laid out as the arena."""

import mlx.core as mx
import numpy as np

from .arena import Arena, Slots

AS_BITS = {mx.bfloat16: mx.uint16}  # what NumPy has no type for


class HostArena:
    """``num_slots`` slots for each K and V of an arena. Untouched pages take no memory."""

    def __init__(self, like: Arena, num_slots: int):
        self._bits = AS_BITS.get(like.dtype, like.dtype)
        kind = np.array(mx.zeros((), self._bits)).dtype
        self._pairs = [
            tuple(np.zeros((heads, num_slots, dim), kind) for dim in dims)
            for heads, *dims in like.layers
        ]

    def take(self, arena: Arena, source: Slots, target: Slots) -> None:
        """Copy tokens out of ``arena``, and count their bytes there."""
        for layer, pair in enumerate(self._pairs):
            for array, kept in zip((arena.keys[layer], arena.values[layer]), pair, strict=True):
                kept[:, target.numbers] = np.array(source.gather(array).view(self._bits))
        arena.copied_bytes += source.count * arena.slot_bytes

    def give(self, arena: Arena, source: Slots, target: Slots) -> None:
        """Copy tokens back into ``arena``, and count their bytes there."""
        for layer, pair in enumerate(self._pairs):
            keys, values = (mx.array(kept[:, source.numbers]).view(arena.dtype) for kept in pair)
            arena.write(layer, target, keys, values)
        mx.eval(arena.arrays())
        arena.copied_bytes += source.count * arena.slot_bytes
