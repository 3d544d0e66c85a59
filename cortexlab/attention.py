"""Attention over extents: every row of a step reads its sequence's K and V where they lie.

Three ways, one result (to float32 rounding):

views     one zero-copy view an extent. Several extents: scores an extent, joined (they are small), one softmax, then the sum of
          each part times its extent's V.
windows   for decode rows, all sequences in two calls. The arena is seen as overlapping windows of `WINDOW` slots
          (`mx.as_strided`, no copy); `mx.gather_mm` multiplies each (row, window) pair; partial softmaxes are merged by their
          maxima, as FlashAttention and flash-decoding do.
gather    copies a sequence's K and V together first. The bytes are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .arena import Arena, Slots
from .errors import BadInput, one_of

METHODS = ("auto", "views", "windows", "gather")
WINDOW = 128  # slots a window
QUERY_BLOCK = 64  # queries of a prompt attended at once: later ones see more keys, and scores stay in the cache
WINDOWS_FROM_ROWS = 8  # `auto`: fewer decode rows than this, all in one extent each, are cheaper as views


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows ``first .. first + num_rows - 1`` of a step: tokens of one sequence from position ``start``, its K and V in ``runs``."""

    start: int
    num_rows: int
    runs: list[tuple[int, int]]

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


def can_use_windows(arena: Arena) -> bool:
    """MLX's `gather_mm` knows only float32 on the CPU."""
    return arena.dtype == mx.float32 or mx.default_device() != mx.cpu


def check_method(method: str, arena: Arena) -> None:
    """`BadInput` for a method that is unknown, or that cannot be had for this arena."""
    one_of("attention", method, METHODS)
    if method == "windows" and not can_use_windows(arena):
        raise BadInput(f"attention 'windows' needs float32 on the CPU, not {arena.dtype}: use auto, views or gather")


class Plan:
    """Where the rows of one step read and write. Made once a step, used by every layer.

    ``rows`` lists the step's sequences in row order. Decode rows (one row a sequence) come first.
    """

    def __init__(self, rows: Sequence[RowRun], arena: Arena, method: str = "auto"):
        check_method(method, arena)
        self.arena, self.rows = arena, list(rows)
        self.num_rows = sum(run.num_rows for run in rows)
        self.single = len(rows) == 1  # one sequence: fed as [1, n] with an integer offset, as mlx-lm does
        self._decode = decode = [run for run in rows if run.num_rows == 1]
        scattered = any(len(run.runs) > 1 for run in decode)
        wanted = method == "windows" or (method == "auto" and can_use_windows(arena) and (len(decode) >= WINDOWS_FROM_ROWS or scattered))
        self._num_by_windows = len(decode) if wanted and arena.num_slots >= WINDOW else 0
        self._windows: dict[tuple[int, int | None], Windows] = {}  # by KV heads and sliding window, made when a layer asks
        self.write_slots = Slots([run for row in rows for run in tail(row.runs, row.num_rows)])
        self.positions = rows[0].start if self.single else mx.array(
            np.concatenate([np.arange(run.start, run.stop, dtype=np.int32) for run in rows])
        )  # fmt: skip
        self._gathered = [Slots(run.runs) for run in rows] if method == "gather" else None

    def attend(self, queries: mx.array, layer: int, scale: float, sliding: int | None = None, sinks: mx.array | None = None) -> mx.array:
        """``[num_rows, heads, key_dim]`` queries -> ``[num_rows, heads, value_dim]``, causal within each sequence.

        ``sliding``: a row sees that many tokens, itself the last. ``sinks``: a logit a head which takes its share of the softmax.
        """
        keys, values = self.arena.keys[layer], self.arena.values[layer]
        outputs, first, index = [], 0, 0
        if self._num_by_windows and sinks is None:
            index = first = self._num_by_windows
            outputs.append(self._windows_for(keys.shape[0], sliding).attend(queries[:first], keys, values, scale))
        for i, run in enumerate(self.rows[index:], start=index):
            rows = queries[first : first + run.num_rows]
            first += run.num_rows
            start = run.start if sliding is None else min(run.start, sliding - 1)  # of them, tokens that any of the rows sees
            if self._gathered:
                k, v = [self._gathered[i].gather(keys)[:, run.start - start :]], [self._gathered[i].gather(values)[:, run.start - start :]]
                self.arena.copied_bytes += k[0].nbytes + v[0].nbytes
            else:
                runs = run.runs if sliding is None else tail(run.runs, start + run.num_rows)
                k, v = ([array[:, a:b] for a, b in runs] for array in (keys, values))
            outputs.append(attend_parts(rows, k, v, start, scale, sliding, sinks))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _windows_for(self, num_kv_heads: int, sliding: int | None) -> "Windows":
        key = num_kv_heads, sliding
        if key not in self._windows:
            rows = self._decode if sliding is None else [RowRun(run.start, 1, tail(run.runs, sliding)) for run in self._decode]
            self._windows[key] = Windows(rows, self.arena, num_kv_heads)
        return self._windows[key]


def attend_parts(
    queries: mx.array, keys: list[mx.array], values: list[mx.array], start: int, scale: float,
    sliding: int | None = None, sinks: mx.array | None = None,
) -> mx.array:  # fmt: skip
    """Causal attention of ``[n, heads, key_dim]`` queries at positions ``start ..`` over K and V given in parts.

    Each part is ``[kv_heads, length, dim]``, together ``start + n`` tokens. ``sliding``, ``sinks`` as `Plan.attend`. Returns
    ``[n, heads, value_dim]``.
    """
    n, heads, dim = queries.shape
    kv_heads = keys[0].shape[0]
    if n == 1 and sinks is None:  # the heads of one KV head are so many queries to it: no mask, and no K repeated
        q = queries.reshape(kv_heads, heads // kv_heads, dim)
        if len(keys) == 1:
            out = mx.fast.scaled_dot_product_attention(q[None], keys[0][None], values[0][None], scale=scale)
        else:
            out = _weighted_sum(mx.softmax(_scores(q * scale, keys), axis=-1, precise=True), values)
        return out.reshape(1, heads, -1)
    blocks = []
    for first in range(0, n, QUERY_BLOCK):
        block = queries[first : first + QUERY_BLOCK]
        stop = start + first + len(block)
        begin = 0 if sliding is None else max(0, start + first + 1 - sliding)
        k, v = _between(keys, begin, stop), _between(values, begin, stop)
        visible = None if sliding is None or stop - begin <= sliding else _visible(len(block), stop - begin, sliding)
        if len(k) == 1:
            mask = "causal" if visible is None else visible
            out = mx.fast.scaled_dot_product_attention(
                block.swapaxes(0, 1)[None], k[0][None], v[0][None], scale=scale, mask=mask, sinks=sinks
            )
            blocks.append(out[0].swapaxes(0, 1))
        else:
            blocks.append(_causal_parts(block * scale, k, v, visible, sinks))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def _visible(n: int, length: int, sliding: int | None = None) -> mx.array:
    """``[n, length]``: which of ``length`` tokens each of the last ``n`` sees."""
    ages = mx.arange(length - n, length)[:, None] - mx.arange(length)
    return (ages >= 0) if sliding is None else (ages >= 0) & (ages < sliding)


def _causal_parts(
    queries: mx.array, keys: list[mx.array], values: list[mx.array], visible: mx.array | None, sinks: mx.array | None
) -> mx.array:
    n, heads, dim = queries.shape
    kv_heads = keys[0].shape[0]
    group = heads // kv_heads
    q = queries.reshape(n, kv_heads, group, dim).transpose(1, 2, 0, 3).reshape(kv_heads, group * n, dim)
    scores = _scores(q, keys)
    length = scores.shape[-1]
    visible = _visible(n, length) if visible is None else visible
    scores = mx.where(visible, scores.reshape(kv_heads, group, n, length), -mx.inf)
    if sinks is not None:  # one more token, of no value
        sink = mx.broadcast_to(sinks.astype(scores.dtype).reshape(kv_heads, group, 1, 1), (kv_heads, group, n, 1))
        scores = mx.concatenate([scores, sink], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(kv_heads, group * n, -1)
    out = _weighted_sum(weights, values)
    return out.reshape(kv_heads, group, n, -1).transpose(2, 0, 1, 3).reshape(n, heads, -1)


def _scores(queries: mx.array, keys: list[mx.array]) -> mx.array:
    return mx.concatenate([queries @ k.swapaxes(-1, -2) for k in keys], axis=-1)


def _weighted_sum(weights: mx.array, values: list[mx.array]) -> mx.array:
    total, first = None, 0
    for v in values:
        part = weights[..., first : first + v.shape[1]] @ v
        total = part if total is None else total + part
        first += v.shape[1]
    return total


def _between(parts: list[mx.array], begin: int, stop: int) -> list[mx.array]:
    """Tokens ``begin .. stop - 1`` of K or V given in parts."""
    taken, first = [], 0
    for part in parts:
        length = part.shape[1]
        a, b = max(begin - first, 0), min(stop - first, length)
        if a < b:
            taken.append(part if (a, b) == (0, length) else part[:, a:b])
        first += length
    return taken


def tail(runs: list[tuple[int, int]], num_slots: int) -> list[tuple[int, int]]:
    """The last ``num_slots`` slots of runs, in order."""
    taken = []
    for start, stop in reversed(runs):
        if num_slots <= 0:
            break
        taken.append((max(start, stop - num_slots), stop))
        num_slots -= stop - start
    return taken[::-1]


class Windows:
    """The (row, window) pairs of a step's decode rows, and attention over them in two `mx.gather_mm` calls a layer.

    extent            |-------- 300 slots --------|
    windows of 128    [---------][---------][---------]     the last one reaches past the extent: a bias of -inf masks it
    """

    def __init__(self, rows: Sequence[RowRun], arena: Arena, num_kv_heads: int):
        self.num_rows = len(rows)
        self._num_starts = arena.num_slots - WINDOW + 1
        pieces = [(i, a, b) for i, row in enumerate(rows) for start, stop in row.runs for a, b in _pieces(start, stop)]
        row, first, stop = (np.array(column, dtype=np.int32) for column in zip(*pieces, strict=True))
        window = np.minimum(first, self._num_starts - 1)  # the arena's last window serves every extent behind its start
        slot = window[:, None] + np.arange(WINDOW)
        outside = (slot < first[:, None]) | (slot >= stop[:, None])
        heads = np.arange(num_kv_heads)[:, None]
        pairs = len(pieces)
        self._row = mx.array(row)
        self._query = mx.array((heads * self.num_rows + row).astype(np.uint32))
        self._window = mx.array((heads * self._num_starts + window).astype(np.uint32))
        self._pair = mx.array((heads * pairs + np.arange(pairs)).astype(np.uint32))
        self._outside = mx.array(outside)[:, None]
        self._of_row = mx.array((row == np.arange(self.num_rows)[:, None]).astype(np.float32))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """``[rows, heads, key_dim]`` queries -> ``[rows, heads, value_dim]``."""
        rows, heads, dim = queries.shape
        kv_heads, num_slots, value_dim = values.shape
        group = heads // kv_heads
        q = (queries * scale).reshape(rows, kv_heads, group, dim).swapaxes(0, 1)
        shape = kv_heads, self._num_starts
        k = mx.as_strided(keys, (*shape, dim, WINDOW), (num_slots * dim, dim, 1, dim))
        v = mx.as_strided(values, (*shape, WINDOW, value_dim), (num_slots * value_dim, value_dim, value_dim, 1))
        scores = mx.gather_mm(q, k, self._query, self._window).astype(mx.float32)  # [kv_heads, pairs, group, WINDOW]
        scores = mx.where(self._outside, -mx.inf, scores)
        largest = scores.max(axis=-1, keepdims=True)
        weights = mx.exp(scores - largest)
        sums = weights.sum(axis=-1, keepdims=True)
        parts = mx.gather_mm(weights.astype(values.dtype), v, self._pair, self._window)  # [kv_heads, pairs, group, value_dim]
        row_largest = mx.full((kv_heads, rows, group, 1), -mx.inf).at[:, self._row].maximum(largest)
        rescale = mx.exp(largest - row_largest[:, self._row])
        merged = mx.concatenate([parts * rescale, sums * rescale], axis=-1).reshape(kv_heads, -1, group * (value_dim + 1))
        out = (self._of_row @ merged).reshape(kv_heads, rows, group, value_dim + 1)
        out = out[..., :value_dim] / out[..., value_dim:]
        return out.swapaxes(0, 1).reshape(rows, heads, value_dim).astype(queries.dtype)


def _pieces(start: int, stop: int):
    for first in range(start, stop, WINDOW):
        yield first, min(first + WINDOW, stop)
