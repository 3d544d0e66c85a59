"""Attention by windows: all decode rows of a step in two calls, wherever their K and V lie.

`mx.as_strided` views the arena as overlapping windows of `WINDOW` slots; `mx.gather_mm` multiplies
each (row, window) pair; partial softmaxes are merged by their maxima, as flash-decoding does.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..arena import Arena
from .views import MASKED, Exp, RowRun

WINDOW = 128  # slots per window
PRODUCTS_A_STREAM = 200  # fewer do not pay for another stream: starting and waiting take 70 us

# One for each core besides the first; their threads begin with the first use.
STREAMS = (
    [mx.new_thread_local_stream(mx.cpu) for _ in range(min(len(os.sched_getaffinity(0)), 8) - 1)]
    if sys.platform == "linux"
    else []
)


def can_use_windows(arena: Arena) -> bool:
    """MLX's `gather_mm` knows only float32 on the CPU."""
    return arena.dtype == mx.float32 or mx.default_device() != mx.cpu


class Windows:
    """The (row, window) pairs of a step's decode rows, and attention over them in two
    `mx.gather_mm` calls a layer.

    extent            |-------- 300 slots --------|
    windows of 128    [---------][---------][---------]     a bias masks what lies past the extent

    Each pair gives a maximum, a sum of weights and a weighted sum of V, merged row by row at the
    end. On the CPU the cores share the pairs, a stream each, and every head has products of its
    own: a matrix times a vector takes a third of the time of a matrix times three, which a BLAS
    spreads over threads that wait for each other.
    """

    def __init__(self, rows: Sequence[RowRun], arena: Arena, num_kv_heads: int):
        self.num_rows = len(rows)
        self.on_cpu = mx.default_device() == mx.cpu
        self._num_starts = arena.num_slots - WINDOW + 1
        pieces = [
            (i, a, b)
            for i, row in enumerate(rows)
            for start, stop in row.runs
            for a, b in _pieces(start, stop)
        ]
        row, first, stop = np.array(pieces, dtype=np.int32).T
        # The arena's last window serves every extent after its start.
        window = np.minimum(first, self._num_starts - 1)
        slot = window[:, None] + np.arange(WINDOW, dtype=np.int32)
        outside = (slot < first[:, None]) | (slot >= stop[:, None])
        counts = np.bincount(row)
        # A row's pairs lie together; the last one fills up.
        nth = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
        self._row = mx.array(row)
        self._pairs_of_row = mx.array((np.cumsum(counts) - counts)[:, None] + nth)
        self._of_row = mx.array((row == np.arange(self.num_rows)[:, None]).astype(np.float32))
        self._ones = mx.ones((WINDOW, 1))
        self._num_pairs = len(pieces)
        self._pieces = row, window, np.where(outside, np.float32(MASKED), np.float32(0))
        self._heads = np.arange(num_kv_heads)[:, None, None]
        self._shares: list[_Share] = []

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float,
        exp: Exp = mx.exp, sinks: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """``[rows, heads, key_dim]`` queries -> ``[rows, heads, value_dim]``."""
        rows, heads, dim = queries.shape
        kv_heads, num_slots, value_dim = values.shape
        group = heads // kv_heads
        products = group if self.on_cpu else 1  # a pair: of one query each, or of the group
        shares = self._shares_for(products)
        q = (queries * scale).reshape(rows, kv_heads, products, group // products, dim)
        q = q.swapaxes(0, 1)
        shape = kv_heads, self._num_starts
        k = mx.as_strided(keys, (*shape, dim, WINDOW), (num_slots * dim, dim, 1, dim))
        strides = num_slots * value_dim, value_dim, value_dim, 1
        v = mx.as_strided(values, (*shape, WINDOW, value_dim), strides)
        found, streams = [], [mx.default_stream(mx.default_device()), *STREAMS]
        for share, stream in zip(shares, streams, strict=False):
            with mx.stream(stream):
                found.append(share.attend(q, k, v, self._ones, exp))
        largest, sums, parts = (mx.concatenate(each, axis=1) for each in zip(*found, strict=True))
        out = self._merged(largest.reshape(kv_heads, -1, group), sums, parts, exp, sinks)
        return out.swapaxes(0, 1).reshape(rows, heads, value_dim).astype(queries.dtype)

    def _merged(
        self, largest: mx.array, sums: mx.array, parts: mx.array, exp: Exp, sinks: mx.array | None
    ) -> mx.array:
        """Merge pairs into rows, by the row's largest score: ``[kv_heads, rows, group, dim]``."""
        kv_heads, _, group = largest.shape
        of_rows = largest[:, self._pairs_of_row].max(axis=2)
        if sinks is not None:  # an extra key, its V zero
            sink = sinks.astype(mx.float32).reshape(kv_heads, 1, group)
            of_rows = mx.maximum(of_rows, sink)
        factors = exp(largest - of_rows[:, self._row])
        sums = self._of_row @ (sums.reshape(factors.shape) * factors)
        if sinks is not None:
            sums = sums + exp(sink - of_rows)
        parts = parts.astype(mx.float32).reshape(*factors.shape, -1) * factors[..., None]
        out = self._of_row @ parts.reshape(kv_heads, parts.shape[1], -1)
        return out.reshape(kv_heads, self.num_rows, group, -1) / sums[..., None]

    def _shares_for(self, products: int) -> list["_Share"]:
        if not self._shares:
            row, window, bias = self._pieces
            num_products = self._num_pairs * len(self._heads) * products
            wanted = num_products // PRODUCTS_A_STREAM if self.on_cpu else 1
            num_shares = max(1, min(wanted, len(STREAMS) + 1))
            bounds = np.linspace(0, self._num_pairs, num_shares + 1).astype(int)
            for a, b in pairwise(bounds):
                each = np.arange(products)
                pair = self._heads * (b - a) + np.arange(b - a)[:, None]
                query = self._heads * self.num_rows + row[a:b, None]
                start = self._heads * self._num_starts + window[a:b, None] + 0 * each
                numbers = (query * products + each, start, pair * products + each)
                arrays = (mx.array(number.astype(np.uint32)) for number in numbers)
                self._shares.append(_Share(*arrays, mx.array(bias[a:b, None, None])))
        return self._shares


@dataclass(frozen=True, slots=True)
class _Share:
    """A stream's pairs: query, window and weights by number, ``[kv_heads, pairs, products]``."""

    query: mx.array
    window: mx.array
    weights: mx.array
    bias: mx.array  # [pairs, 1, 1, WINDOW]

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, ones: mx.array, exp: Exp
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Of each pair: the largest score, the sum of weights by it, and V summed by weights."""
        scores = mx.gather_mm(q, k, self.query, self.window).astype(mx.float32) + self.bias
        largest = scores.max(axis=-1, keepdims=True)
        weights = exp(scores - largest)
        out = mx.gather_mm(weights.astype(v.dtype), v, self.weights, self.window)
        return largest, weights @ ones, out


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, WINDOW):
        yield first, min(first + WINDOW, stop)
