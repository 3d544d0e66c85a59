"""Attention over extents: every row of a step reads its sequence's K and V where they lie.

Three ways, one result (to float32 rounding):

views     one zero-copy view an extent. Several extents: scores an extent, joined (they are small), one softmax, then the sum of
          each part times its extent's V.
windows   for decode rows, all sequences in two calls. The arena is seen as overlapping windows of `WINDOW` slots
          (`mx.as_strided`, no copy); `mx.gather_mm` multiplies each (row, window) pair; partial softmaxes are merged by their
          maxima, as FlashAttention and flash-decoding do.
gather    copies a sequence's K and V together first. The bytes are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import mlx.core as mx
import numpy as np

from . import fast_math
from .arena import Arena, Slots
from .errors import BadInput, one_of

METHODS = ("auto", "views", "windows", "gather")
WINDOW = 128  # slots a window
QUERY_BLOCK = 64  # queries of a prompt attended at once: later ones see more keys, and scores stay in the cache
WINDOWS_FROM_ROWS = 8  # `auto`: fewer decode rows than this, all in one extent each, are cheaper as views
MASKED = -1e5  # added to a score that is not to be seen; finite, as `fast_math.exp` wants it

Exp = Callable[[mx.array], mx.array]


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


class Biases(dict):
    """``[length, n]`` added to scores: 0 where a token is seen by those of the last n that see it, `MASKED` elsewhere.

    By ``(n, length, sliding)``, made once a step when the first layer asks.
    """

    def __missing__(self, key: tuple[int, int, int | None]) -> mx.array:
        n, length, sliding = key
        before = length - n
        unseen = np.tri(length, n, -before - 1, np.float32)
        if sliding is not None:
            unseen += 1 - np.tri(length, n, sliding - before - 1, np.float32)
        self[key] = mx.array(unseen * MASKED)
        return self[key]


class Plan:
    """Where the rows of one step read and write. Made once a step, used by every layer.

    ``rows`` lists the step's sequences in row order. Decode rows (one row a sequence) come first.
    """

    def __init__(self, rows: Sequence[RowRun], arena: Arena, method: str = "auto"):
        check_method(method, arena)
        self.arena, self.rows = arena, list(rows)
        self.num_rows = sum(run.num_rows for run in rows)
        self._biases = Biases()
        self.exp = fast_math.exp if arena.dtype == mx.float32 and fast_math.wanted() else None
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
            outputs.append(self._windows_for(keys.shape[0], sliding).attend(queries[:first], keys, values, scale, self.exp or mx.exp))
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
            outputs.append(attend_parts(rows, k, v, start, scale, self._biases, self.exp, sliding, sinks))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _windows_for(self, num_kv_heads: int, sliding: int | None) -> "Windows":
        key = num_kv_heads, sliding
        if key not in self._windows:
            rows = self._decode if sliding is None else [RowRun(run.start, 1, tail(run.runs, sliding)) for run in self._decode]
            self._windows[key] = Windows(rows, self.arena, num_kv_heads)
        return self._windows[key]


def attend_parts(
    queries: mx.array, keys: list[mx.array], values: list[mx.array], start: int, scale: float, biases: Biases,
    exp: Exp | None = None, sliding: int | None = None, sinks: mx.array | None = None,
) -> mx.array:  # fmt: skip
    """Causal attention of ``[n, heads, key_dim]`` queries at positions ``start ..`` over K and V given in parts.

    Each part is ``[kv_heads, length, dim]``, together ``start + n`` tokens. ``sliding``, ``sinks`` as `Plan.attend`. ``exp``: the
    one for prompts; None leaves them to MLX's own attention, where K and V are in one part. Returns ``[n, heads, value_dim]``.
    """
    n, heads, dim = queries.shape
    kv_heads = keys[0].shape[0]
    if n == len(keys) == 1 and sinks is None:  # the heads of one KV head are so many queries to it: no mask, and no K repeated
        q = queries.reshape(1, kv_heads, heads // kv_heads, dim)
        return mx.fast.scaled_dot_product_attention(q, keys[0][None], values[0][None], scale=scale).reshape(1, heads, -1)
    blocks = []
    for first in range(0, n, QUERY_BLOCK):
        block = queries[first : first + QUERY_BLOCK]
        stop = start + first + len(block)
        begin = 0 if sliding is None else max(0, start + first + 1 - sliding)
        k, v = _between(keys, begin, stop), _between(values, begin, stop)
        key = len(block), stop - begin, sliding
        if len(k) == 1 and exp is None:
            q, mask = block.swapaxes(0, 1)[None], "causal" if sliding is None or stop - begin <= sliding else (biases[key] == 0).T
            out = mx.fast.scaled_dot_product_attention(q, k[0][None], v[0][None], scale=scale, mask=mask, sinks=sinks)
            blocks.append(out[0].swapaxes(0, 1))
        else:
            blocks.append(_attend_block(block * scale, k, v, biases[key] if len(block) > 1 else None, sinks, exp or mx.exp))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def _attend_block(
    queries: mx.array, keys: list[mx.array], values: list[mx.array], bias: mx.array | None, sinks: mx.array | None, exp: Exp
) -> mx.array:
    """Scaled ``[n, heads, dim]`` queries -> ``[n, heads, value_dim]``. Divides by the sum of weights last, and repeats no K.

    Scores are ``[kv_heads, length, group * n]``: a maximum down the columns takes a third of the time of one along the rows.
    """
    n, heads, dim = queries.shape
    kv_heads = keys[0].shape[0]
    group = heads // kv_heads
    q = queries.reshape(n, kv_heads, group, dim).transpose(1, 2, 0, 3).reshape(kv_heads, group * n, dim).swapaxes(-1, -2)
    scores, first = [], 0
    for k in keys:
        part, length = (k @ q).astype(mx.float32), k.shape[1]
        if bias is not None:
            part = (part.reshape(kv_heads, length, group, n) + bias[first : first + length, None]).reshape(part.shape)
        scores.append(part)
        first += length
    largest = reduce(mx.maximum, [part.max(axis=1, keepdims=True) for part in scores])
    sums = 0
    if sinks is not None:  # one more token, of no value
        sink = mx.repeat(sinks.astype(mx.float32).reshape(kv_heads, 1, group), n, axis=-1)
        largest = mx.maximum(largest, sink)
        sums = exp(sink - largest)
    total = 0
    for part, v in zip(scores, values, strict=True):
        weights = exp(part - largest)
        sums = sums + mx.ones((1, v.shape[1])) @ weights  # a product takes an eighth of the time of a sum
        total = total + weights.astype(v.dtype).swapaxes(-1, -2) @ v
    out = (total / sums.swapaxes(-1, -2)).astype(queries.dtype)
    return out.reshape(kv_heads, group, n, -1).transpose(2, 0, 1, 3).reshape(n, heads, -1)


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
    windows of 128    [---------][---------][---------]     the last one reaches past the extent: a bias masks it
    """

    def __init__(self, rows: Sequence[RowRun], arena: Arena, num_kv_heads: int):
        self.num_rows = len(rows)
        self._num_starts = arena.num_slots - WINDOW + 1
        pieces = [(i, a, b) for i, row in enumerate(rows) for start, stop in row.runs for a, b in _pieces(start, stop)]
        row, first, stop = np.array(pieces, dtype=np.int32).T
        window = np.minimum(first, self._num_starts - 1)  # the arena's last window serves every extent behind its start
        slot = window[:, None] + np.arange(WINDOW, dtype=np.int32)
        outside = (slot < first[:, None]) | (slot >= stop[:, None])
        heads = np.arange(num_kv_heads)[:, None]
        pairs = len(pieces)
        counts = np.bincount(row)
        nth = np.minimum(np.arange(counts.max()), counts[:, None] - 1)  # a row's pairs lie together; the last one fills up
        self._row = mx.array(row)
        self._pairs_of_row = mx.array((np.cumsum(counts) - counts)[:, None] + nth)
        self._query = mx.array((heads * self.num_rows + row).astype(np.uint32))
        self._window = mx.array((heads * self._num_starts + window).astype(np.uint32))
        self._pair = mx.array((heads * pairs + np.arange(pairs)).astype(np.uint32))
        self._bias = mx.array(np.where(outside, np.float32(MASKED), np.float32(0)))[:, None]
        self._of_row = mx.array((row == np.arange(self.num_rows)[:, None]).astype(np.float32))
        self._ones = mx.ones((WINDOW, 1))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, exp: Exp = mx.exp) -> mx.array:
        """``[rows, heads, key_dim]`` queries -> ``[rows, heads, value_dim]``."""
        rows, heads, dim = queries.shape
        kv_heads, num_slots, value_dim = values.shape
        group = heads // kv_heads
        q = (queries * scale).reshape(rows, kv_heads, group, dim).swapaxes(0, 1)
        shape = kv_heads, self._num_starts
        k = mx.as_strided(keys, (*shape, dim, WINDOW), (num_slots * dim, dim, 1, dim))
        v = mx.as_strided(values, (*shape, WINDOW, value_dim), (num_slots * value_dim, value_dim, value_dim, 1))
        scores = mx.gather_mm(q, k, self._query, self._window).astype(mx.float32) + self._bias  # [kv_heads, pairs, group, WINDOW]
        largest = scores.max(axis=-1, keepdims=True)
        largest = largest[:, self._pairs_of_row].max(axis=2)  # of the row: one maximum for all its windows
        weights = exp(scores - largest[:, self._row])
        parts = mx.gather_mm(weights.astype(values.dtype), v, self._pair, self._window)  # [kv_heads, pairs, group, value_dim]
        out = self._of_row @ parts.astype(mx.float32).reshape(kv_heads, -1, group * value_dim)
        sums = self._of_row @ (weights @ self._ones).reshape(kv_heads, -1, group)
        out = out.reshape(kv_heads, rows, group, value_dim) / sums[..., None]
        return out.swapaxes(0, 1).reshape(rows, heads, value_dim).astype(queries.dtype)


def _pieces(start: int, stop: int):
    for first in range(start, stop, WINDOW):
        yield first, min(first + WINDOW, stop)
