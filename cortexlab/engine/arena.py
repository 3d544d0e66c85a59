"""The physical layer: preallocated K and V arrays, written by slot and read in place.

    keys[layer], values[layer]   [num_kv_heads, num_slots, head_dim]

Head-major, so that any run of slots is a view that matmul and attention take as it is. MLX writes
in place only while nothing else holds the array: write first, then take views from ``keys[layer]``,
and keep none of them to the next step.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import at_least
from .states import States


class LayerShape(NamedTuple):
    """Shape of one layer's K and V; most models have the same in all layers."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


class Arena:
    """K and V of ``num_slots`` tokens, by layer, and ``states`` of layers that have neither.
    ``copied_bytes``: of moves and gathers.
    """

    def __init__(self, layers: Sequence[LayerShape], num_slots: int, dtype: mx.Dtype = mx.float32):
        self.layers = list(layers)
        self.num_slots = at_least("num_slots", num_slots, 1)
        self.dtype = dtype
        self.copied_bytes = 0
        self.states = States()
        self.readers: dict[int, mx.array] = {}  # array -> what reads it, where layers share it
        self.clear()

    def clear(self) -> None:
        """Start over with zeros in every slot, evaluated: lazy ones are of this thread only."""
        slots = self.num_slots
        self.states.clear()
        self.readers.clear()
        self.keys = self.values = ()  # gone before the new ones come
        self.keys = [mx.zeros((heads, slots, dim), self.dtype) for heads, dim, _ in self.layers]
        self.values = [mx.zeros((heads, slots, dim), self.dtype) for heads, _, dim in self.layers]
        mx.eval(self.arrays())

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, all layers."""
        return slot_bytes(self.layers, self.dtype)

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values, *self.states.arrays()]

    def write(self, layer: int, slots: "Slots", keys: mx.array, values: mx.array) -> None:
        """Put a layer's K and V, ``[num_kv_heads, n, dim]``, into ``slots``: lazy, and in place."""
        if slots.run is not None:
            start, stop = slots.run
            self.keys[layer][:, start:stop] = keys
            self.values[layer][:, start:stop] = values
            return
        # On MLX's CPU build put_along_axis takes a quarter of the time of a scatter.
        for arrays, new in ((self.keys, keys), (self.values, values)):
            index = mx.broadcast_to(slots.index, new.shape)
            arrays[layer] = mx.put_along_axis(arrays[layer], index, new.astype(self.dtype), axis=1)

    def read(self, layer: int, slots: "Slots") -> tuple[mx.array, mx.array]:
        """A layer's K and V in ``slots``: views if one run, else copies, which are counted."""
        if slots.run is not None:
            return slots.views(self.keys[layer])[0], slots.views(self.values[layer])[0]
        return self.gather(layer, slots)

    def gather(self, layer: int, slots: "Slots") -> tuple[mx.array, mx.array]:
        """A layer's K and V in ``slots``, copied together and counted."""
        keys, values = slots.gather(self.keys[layer]), slots.gather(self.values[layer])
        self.copied_bytes += keys.nbytes + values.nbytes
        return keys, values

    def copy(self, source: "Slots", target: "Slots") -> None:
        """Copy tokens between slots in every layer, and count their bytes."""
        for layer in range(len(self.layers)):
            keys, values = source.gather(self.keys[layer]), source.gather(self.values[layer])
            # Evaluated now: lazy, they would hold the arena, and the write would copy all of it.
            mx.eval(keys, values)
            self.write(layer, target, keys, values)
        mx.eval(self.arrays())
        self.copied_bytes += source.count * self.slot_bytes


def slot_bytes(layers: Sequence[LayerShape], dtype: mx.Dtype) -> int:
    """Bytes of one token's K and V in every layer."""
    return sum(heads * (key + value) for heads, key, value in layers) * dtype.size


class Slots:
    """Slots in token order, from runs ``(first, after the last)``: one run stays a slice, several
    become an index array.
    """

    def __init__(self, runs: list[tuple[int, int]]):
        joined: list[tuple[int, int]] = []
        for start, stop in runs:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        self.runs = joined
        self.count = sum(stop - start for start, stop in joined)
        self.run = joined[0] if len(joined) == 1 else None

    @cached_property
    def numbers(self) -> np.ndarray:
        return np.concatenate([np.arange(*run, dtype=np.int32) for run in self.runs])

    @cached_property
    def index(self) -> mx.array:
        """Slot numbers ``[1, n, 1]``."""
        return mx.array(self.numbers)[None, :, None]

    def views(self, array: mx.array) -> list[mx.array]:
        """These slots of ``[num_kv_heads, num_slots, head_dim]``, one view per run."""
        return [array[:, start:stop] for start, stop in self.runs]

    def gather(self, array: mx.array) -> mx.array:
        """These slots in one new array ``[num_kv_heads, n, head_dim]``."""
        return mx.take(array, self.index.reshape(-1), axis=1)
