"""Attention by views: a row reads its sequence's K and V in place, a zero-copy view per extent.
Over several extents: scores per extent, one softmax, then each part of the weights times its V.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, reduce

import mlx.core as mx
import numpy as np

from ..arena import Slots

# Queries of a prompt attended at once: early ones see fewer keys; scores fit the CPU's cache.
QUERY_BLOCK = 64
MASKED = -1e5  # added to a score that is not to be seen; finite, as `fast_math.exp` wants it

Exp = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class RowRun:
    """Rows of a step that are one sequence's tokens from position ``start``. K and V of its tokens
    up to these, without those that a window has passed, lie in ``runs`` of slots. ``owner``: whose
    state goes on with them.
    """

    start: int
    num_rows: int
    runs: list[tuple[int, int]]
    owner: Hashable = None

    @property
    def stop(self) -> int:
        return self.start + self.num_rows

    @cached_property
    def slots(self) -> Slots:
        return Slots(self.runs)

    def within(self, sliding: int) -> "RowRun":
        """These rows without the tokens before them that a window of ``sliding`` hides from all."""
        start = min(self.start, sliding - 1)
        return RowRun(start, self.num_rows, tail(self.runs, start + self.num_rows))


def tail(runs: list[tuple[int, int]], num_slots: int) -> list[tuple[int, int]]:
    """The last ``num_slots`` slots of runs, in order."""
    taken = []
    for start, stop in reversed(runs):
        if num_slots <= 0:
            break
        taken.append((max(start, stop - num_slots), stop))
        num_slots -= stop - start
    return taken[::-1]


class Biases(dict):
    """Score biases ``[length, n]``, keys by queries (the last n): 0 where seen, else MASKED.
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


def attend_parts(
    queries: mx.array, keys: list[mx.array], values: list[mx.array], start: int, scale: float,
    biases: Biases, exp: Exp | None = None, sliding: int | None = None,
    sinks: mx.array | None = None,
) -> mx.array:  # fmt: skip
    """Causal attention of ``[n, heads, key_dim]`` queries at positions ``start ..`` over K and V in
    parts ``[kv_heads, length, dim]`` of ``start + n`` tokens; returns ``[n, heads, value_dim]``.

    ``sliding``, ``sinks``: see `Plan.attend`, which cuts off tokens that no row sees. ``exp``: for
    the softmax; None leaves K and V in one part to MLX's own attention.
    """
    n = len(queries)
    if n == len(keys) == 1 and sinks is None:  # a single query sees all keys: no mask
        return mx.fast.scaled_dot_product_attention(
            queries[:, :, None], keys[0][None], values[0][None], scale=scale
        )[:, :, 0]
    blocks = []
    for first in range(0, n, QUERY_BLOCK):
        block = queries[first : first + QUERY_BLOCK]
        stop = start + first + len(block)
        begin = 0 if sliding is None else max(0, start + first + 1 - sliding)
        k, v = _between(keys, begin, stop), _between(values, begin, stop)
        shape = len(block), stop - begin, sliding
        if len(k) == 1 and exp is None:
            causal = sliding is None or stop - begin <= sliding
            out = mx.fast.scaled_dot_product_attention(
                block.swapaxes(0, 1)[None], k[0][None], v[0][None], scale=scale, sinks=sinks,
                mask="causal" if causal else (biases[shape] == 0).T,
            )  # fmt: skip
            blocks.append(out[0].swapaxes(0, 1))
        else:
            bias = biases[shape] if len(block) > 1 else None
            blocks.append(_attend_block(block * scale, k, v, bias, sinks, exp or mx.exp))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def _attend_block(
    queries: mx.array, keys: list[mx.array], values: list[mx.array], bias: mx.array | None,
    sinks: mx.array | None, exp: Exp,
) -> mx.array:  # fmt: skip
    """Scaled ``[n, heads, dim]`` queries -> ``[n, heads, value_dim]``. Divides by the sum of
    weights last; K is not repeated.

    Scores are ``[kv_heads, length, group * n]``: a maximum down the columns takes a third of the
    time of one along the rows.
    """
    n, heads, dim = queries.shape
    kv_heads = keys[0].shape[0]
    group = heads // kv_heads
    q = queries.reshape(n, kv_heads, group, dim).transpose(1, 2, 0, 3)
    q = q.reshape(kv_heads, group * n, dim).swapaxes(-1, -2)
    scores, first = [], 0
    for k in keys:
        part, length = (k @ q).astype(mx.float32), k.shape[1]
        if bias is not None:
            shaped = part.reshape(kv_heads, length, group, n)
            part = (shaped + bias[first : first + length, None]).reshape(part.shape)
        scores.append(part)
        first += length
    largest = reduce(mx.maximum, [part.max(axis=1, keepdims=True) for part in scores])
    sums = 0
    if sinks is not None:  # an extra key, its V zero
        sink = mx.repeat(sinks.astype(mx.float32).reshape(kv_heads, 1, group), n, axis=-1)
        largest = mx.maximum(largest, sink)
        sums = exp(sink - largest)
    total = 0
    for part, v in zip(scores, values, strict=True):
        weights = exp(part - largest)
        # As a product, the sum takes an eighth of the time.
        sums = sums + mx.ones((1, v.shape[1])) @ weights
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
