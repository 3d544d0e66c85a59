"""Attention over extents: every row of a step reads its sequence's K and V where they lie.

Three ways, one result (to float32 rounding):

views     one zero-copy view an extent. Several extents: scores an extent, joined (they are small),
          one softmax, then the sum of each part times its extent's V.
windows   for decode rows, all sequences in two calls. The arena is seen as overlapping windows of
          `WINDOW` slots (`mx.as_strided`, no copy); `mx.gather_mm` multiplies each (row, window)
          pair; partial softmaxes are merged by their maxima, as FlashAttention does.
gather    copies a sequence's K and V together first. The bytes are counted.

`auto` takes for each step what took least time where it was measured (SmolLM2's layers in float32,
MLX's CPU build, two cores; `rule`):

decode rows   views    at most `VIEWS_UP_TO_ROWS` rows, `VIEWS_UP_TO_TOKENS` tokens, one extent each
              gather   extents of fewer than `GATHER_BELOW` slots on average
              windows  else; where MLX has none (16-bit on the CPU), gather below
                       `GATHER_PROMPTS_BELOW` slots, or views
prompts       gather   more than `GATHER_FROM_EXTENTS` extents of fewer than
                       `GATHER_PROMPTS_BELOW` slots on average
              views    else
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..errors import BadInput, one_of
from ..host import fast_math
from .arena import Arena, Slots

METHODS = ("auto", "views", "windows", "gather")
WINDOW = 128  # slots a window
# queries of a prompt attended at once: later ones see more keys, and scores stay in the cache
QUERY_BLOCK = 64
VIEWS_UP_TO_ROWS, VIEWS_UP_TO_TOKENS, GATHER_BELOW, GATHER_FROM_EXTENTS, GATHER_PROMPTS_BELOW = (
    2,
    1024,
    6,
    4,
    128,
)
PRODUCTS_A_STREAM = (
    200  # fewer are not worth another stream: it takes 70 us to begin and to wait for
)
MASKED = -1e5  # added to a score that is not to be seen; finite, as `fast_math.exp` wants it

Exp = Callable[[mx.array], mx.array]

# One for each core besides the first, up to what memory has room for; the threads behind them begin
# with the first use.
_STREAMS = (
    [mx.new_thread_local_stream(mx.cpu) for _ in range(min(len(os.sched_getaffinity(0)), 8) - 1)]
    if sys.platform == "linux"
    else []
)


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows ``first .. first + num_rows - 1`` of a step: tokens of one sequence from position
    ``start``, its K and V in ``runs``.
    """

    start: int
    num_rows: int
    runs: list[tuple[int, int]]

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


def can_use_windows(arena: Arena) -> bool:
    """MLX's `gather_mm` knows only float32 on the CPU."""
    return arena.dtype == mx.float32 or mx.default_device() != mx.cpu


def rule() -> dict:
    """What `auto` goes by on this machine, for the record of a run."""
    return {
        "window_slots": WINDOW,
        "streams": len(_STREAMS) + 1 if mx.default_device() == mx.cpu else 1,
        "products_a_stream": PRODUCTS_A_STREAM,
        "views_up_to_rows": VIEWS_UP_TO_ROWS,
        "views_up_to_tokens": VIEWS_UP_TO_TOKENS,
        "gather_below_slots": GATHER_BELOW,
        "gather_prompts_from_extents": GATHER_FROM_EXTENTS + 1,
        "gather_prompts_below_slots": GATHER_PROMPTS_BELOW,
        "fast_math": fast_math.wanted(),
    }


def _way_of_decode(rows: Sequence[RowRun], arena: Arena, method: str) -> str:
    num_extents, num_tokens = sum(len(run.runs) for run in rows), sum(run.stop for run in rows)
    can = arena.num_slots >= WINDOW and can_use_windows(arena)
    if method != "auto":
        return "views" if method == "windows" and not can else method
    if num_extents > len(rows):
        if num_tokens < num_extents * (GATHER_BELOW if can else GATHER_PROMPTS_BELOW):
            return "gather"
    elif len(rows) <= VIEWS_UP_TO_ROWS and num_tokens <= VIEWS_UP_TO_TOKENS:
        return "views"
    return "windows" if can else "views"


def _way_of_prompt(run: RowRun, method: str) -> str:
    if method == "auto":
        return (
            "gather"
            if len(run.runs) > GATHER_FROM_EXTENTS
            and run.stop < len(run.runs) * GATHER_PROMPTS_BELOW
            else "views"
        )
    return "gather" if method == "gather" else "views"


def check_method(method: str, arena: Arena) -> None:
    """`BadInput` for a method that is unknown, or that cannot be had for this arena."""
    one_of("attention", method, METHODS)
    if method == "windows" and not can_use_windows(arena):
        raise BadInput(
            f"attention 'windows' needs float32 on the CPU, not {arena.dtype}: use auto, views or "
            "gather"
        )


class Biases(dict):
    """``[length, n]`` added to scores: 0 where a token is seen by those of the last n that see it,
    `MASKED` elsewhere.

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
        self.single = (
            len(rows) == 1
        )  # one sequence: fed as [1, n] with an integer offset, as mlx-lm does
        self._decode = [run for run in rows if run.num_rows == 1]
        prompts = rows[len(self._decode) :]
        ways = [_way_of_decode(self._decode, arena, method)] * len(self._decode) + [
            _way_of_prompt(run, method) for run in prompts
        ]
        self.ways = ways  # of each sequence
        self._num_by_windows = ways.count("windows")
        self._gathered = [
            Slots(run.runs) if way == "gather" else None
            for run, way in zip(rows, ways, strict=True)
        ]
        self._windows: dict[
            tuple[int, int | None], Windows
        ] = {}  # by KV heads and sliding window, made when a layer asks
        self.write_slots = Slots([run for row in rows for run in tail(row.runs, row.num_rows)])
        self.positions = rows[0].start if self.single else mx.array(
            np.concatenate([np.arange(run.start, run.stop, dtype=np.int32) for run in rows])
        )  # fmt: skip

    def attend(
        self,
        queries: mx.array,
        layer: int,
        scale: float,
        sliding: int | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """``[num_rows, heads, key_dim]`` queries -> ``[num_rows, heads, value_dim]``, causal within
        each sequence.

        ``sliding``: a row sees that many tokens, itself the last. ``sinks``: a logit a head which
        takes its share of the softmax.
        """
        keys, values = self.arena.keys[layer], self.arena.values[layer]
        outputs, first, index = [], 0, 0
        if self._num_by_windows:
            index = first = self._num_by_windows
            windows = self._windows_for(keys.shape[0], sliding)
            outputs.append(
                windows.attend(queries[:first], keys, values, scale, self.exp or mx.exp, sinks)
            )
        for i, run in enumerate(self.rows[index:], start=index):
            rows = queries[first : first + run.num_rows]
            first += run.num_rows
            start = (
                run.start if sliding is None else min(run.start, sliding - 1)
            )  # of them, tokens that any of the rows sees
            if self._gathered[i]:
                k, v = ([self._gathered[i].gather(array)] for array in (keys, values))
                self.arena.copied_bytes += k[0].nbytes + v[0].nbytes
                k, v = ([array[0][:, run.start - start :]] for array in (k, v))
            else:
                runs = run.runs if sliding is None else tail(run.runs, start + run.num_rows)
                k, v = ([array[:, a:b] for a, b in runs] for array in (keys, values))
            outputs.append(
                attend_parts(rows, k, v, start, scale, self._biases, self.exp, sliding, sinks)
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _windows_for(self, num_kv_heads: int, sliding: int | None) -> "Windows":
        key = num_kv_heads, sliding
        if key not in self._windows:
            rows = (
                self._decode
                if sliding is None
                else [RowRun(run.start, 1, tail(run.runs, sliding)) for run in self._decode]
            )
            self._windows[key] = Windows(rows, self.arena, num_kv_heads)
        return self._windows[key]


def attend_parts(
    queries: mx.array,
    keys: list[mx.array],
    values: list[mx.array],
    start: int,
    scale: float,
    biases: Biases,
    exp: Exp | None = None,
    sliding: int | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Causal attention of ``[n, heads, key_dim]`` queries at positions ``start ..`` over K and V
    given in parts.

    Each part is ``[kv_heads, length, dim]``, together ``start + n`` tokens. ``sliding``, ``sinks``
    as `Plan.attend`. ``exp``: the one for prompts; None leaves them to MLX's own attention, where K
    and V are in one part. Returns ``[n, heads, value_dim]``.
    """
    n = len(queries)
    if n == len(keys) == 1 and sinks is None:  # no mask, and products of one row: see `Windows`
        return mx.fast.scaled_dot_product_attention(
            queries[:, :, None], keys[0][None], values[0][None], scale=scale
        )[:, :, 0]
    blocks = []
    for first in range(0, n, QUERY_BLOCK):
        block = queries[first : first + QUERY_BLOCK]
        stop = start + first + len(block)
        begin = 0 if sliding is None else max(0, start + first + 1 - sliding)
        k, v = _between(keys, begin, stop), _between(values, begin, stop)
        key = len(block), stop - begin, sliding
        if len(k) == 1 and exp is None:
            q, mask = (
                block.swapaxes(0, 1)[None],
                "causal" if sliding is None or stop - begin <= sliding else (biases[key] == 0).T,
            )
            out = mx.fast.scaled_dot_product_attention(
                q, k[0][None], v[0][None], scale=scale, mask=mask, sinks=sinks
            )
            blocks.append(out[0].swapaxes(0, 1))
        else:
            blocks.append(
                _attend_block(
                    block * scale,
                    k,
                    v,
                    biases[key] if len(block) > 1 else None,
                    sinks,
                    exp or mx.exp,
                )
            )
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def _attend_block(
    queries: mx.array,
    keys: list[mx.array],
    values: list[mx.array],
    bias: mx.array | None,
    sinks: mx.array | None,
    exp: Exp,
) -> mx.array:
    """Scaled ``[n, heads, dim]`` queries -> ``[n, heads, value_dim]``. Divides by the sum of
    weights last, and repeats no K.

    Scores are ``[kv_heads, length, group * n]``: a maximum down the columns takes a third of the
    time of one along the rows.
    """
    n, heads, dim = queries.shape
    kv_heads = keys[0].shape[0]
    group = heads // kv_heads
    q = (
        queries.reshape(n, kv_heads, group, dim)
        .transpose(1, 2, 0, 3)
        .reshape(kv_heads, group * n, dim)
        .swapaxes(-1, -2)
    )
    scores, first = [], 0
    for k in keys:
        part, length = (k @ q).astype(mx.float32), k.shape[1]
        if bias is not None:
            part = (
                part.reshape(kv_heads, length, group, n) + bias[first : first + length, None]
            ).reshape(part.shape)
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
        sums = (
            sums + mx.ones((1, v.shape[1])) @ weights
        )  # a product takes an eighth of the time of a sum
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
    """The (row, window) pairs of a step's decode rows, and attention over them in two
    `mx.gather_mm` calls a layer.

    extent            |-------- 300 slots --------|
    windows of 128    [---------][---------][---------]     a bias masks what lies past the extent

    Each pair gives a maximum, a sum of weights and a weighted sum of V, which are merged row by row
    at the end (flash-decoding). On the CPU the pairs are shared among the cores, a stream each, and
    every head has products of its own: a matrix times a vector takes a third of the time of a
    matrix times three, which a BLAS spreads over threads that wait for each other.
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
        window = np.minimum(
            first, self._num_starts - 1
        )  # the arena's last window serves every extent behind its start
        slot = window[:, None] + np.arange(WINDOW, dtype=np.int32)
        outside = (slot < first[:, None]) | (slot >= stop[:, None])
        counts = np.bincount(row)
        nth = np.minimum(
            np.arange(counts.max()), counts[:, None] - 1
        )  # a row's pairs lie together; the last one fills up
        self._row = mx.array(row)
        self._pairs_of_row = mx.array((np.cumsum(counts) - counts)[:, None] + nth)
        self._of_row = mx.array((row == np.arange(self.num_rows)[:, None]).astype(np.float32))
        self._ones = mx.ones((WINDOW, 1))
        self._num_pairs = len(pieces)
        self._pieces = row, window, np.where(outside, np.float32(MASKED), np.float32(0))
        self._heads = np.arange(num_kv_heads)[:, None, None]
        self._shares: list[_Share] = []

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        exp: Exp = mx.exp,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """``[rows, heads, key_dim]`` queries -> ``[rows, heads, value_dim]``."""
        rows, heads, dim = queries.shape
        kv_heads, num_slots, value_dim = values.shape
        group = heads // kv_heads
        products = group if self.on_cpu else 1  # a pair: of one query each, or of the group
        shares = self._shares_for(products)
        q = (
            (queries * scale)
            .reshape(rows, kv_heads, products, group // products, dim)
            .swapaxes(0, 1)
        )
        shape = kv_heads, self._num_starts
        k = mx.as_strided(keys, (*shape, dim, WINDOW), (num_slots * dim, dim, 1, dim))
        v = mx.as_strided(
            values, (*shape, WINDOW, value_dim), (num_slots * value_dim, value_dim, value_dim, 1)
        )
        found = []
        for share, stream in zip(
            shares, [mx.default_stream(mx.default_device()), *_STREAMS], strict=False
        ):
            with mx.stream(stream):
                found.append(share.attend(q, k, v, self._ones, exp))
        largest, sums, parts = (
            each[0] if len(each) == 1 else mx.concatenate(each, axis=1)
            for each in zip(*found, strict=True)
        )
        largest = largest.reshape(kv_heads, -1, group)
        of_rows = largest[:, self._pairs_of_row].max(axis=2)
        if sinks is not None:  # one more token, of no value
            sink = sinks.astype(mx.float32).reshape(kv_heads, 1, group)
            of_rows = mx.maximum(of_rows, sink)
        factors = exp(largest - of_rows[:, self._row])  # to the row's maximum
        sums = self._of_row @ (sums.reshape(factors.shape) * factors)
        if sinks is not None:
            sums = sums + exp(sink - of_rows)
        parts = parts.astype(mx.float32).reshape(*factors.shape, value_dim) * factors[..., None]
        out = (self._of_row @ parts.reshape(kv_heads, -1, group * value_dim)).reshape(
            kv_heads, rows, group, value_dim
        )
        return (
            (out / sums[..., None])
            .swapaxes(0, 1)
            .reshape(rows, heads, value_dim)
            .astype(queries.dtype)
        )

    def _shares_for(self, products: int) -> list["_Share"]:
        if not self._shares:
            row, window, bias = self._pieces
            wanted = (
                self._num_pairs * len(self._heads) * products // PRODUCTS_A_STREAM
                if self.on_cpu
                else 1
            )
            bounds = np.linspace(
                0, self._num_pairs, max(1, min(wanted, len(_STREAMS) + 1)) + 1
            ).astype(int)
            for a, b in pairwise(bounds):
                each = np.arange(products)
                pair = self._heads * (b - a) + np.arange(b - a)[:, None]
                query = self._heads * self.num_rows + row[a:b, None]
                start = self._heads * self._num_starts + window[a:b, None] + 0 * each
                numbers = (query * products + each, start, pair * products + each)
                self._shares.append(
                    _Share(
                        *(mx.array(number.astype(np.uint32)) for number in numbers),
                        mx.array(bias[a:b, None, None]),
                    )
                )
        return self._shares


@dataclass(frozen=True, slots=True)
class _Share:
    """A stream's share of the pairs: numbers of query, window and weights for each product,
    ``[kv_heads, pairs, products]``.
    """

    query: mx.array
    window: mx.array
    weights: mx.array
    bias: mx.array  # [pairs, 1, 1, WINDOW]

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, ones: mx.array, exp: Exp
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Of each pair: the largest score, the sum of the weights by it, and the sum of V by the
        weights.
        """
        scores = mx.gather_mm(q, k, self.query, self.window).astype(mx.float32) + self.bias
        largest = scores.max(axis=-1, keepdims=True)
        weights = exp(scores - largest)
        return (
            largest,
            weights @ ones,
            mx.gather_mm(weights.astype(v.dtype), v, self.weights, self.window),
        )


def _pieces(start: int, stop: int):
    for first in range(start, stop, WINDOW):
        yield first, min(first + WINDOW, stop)
