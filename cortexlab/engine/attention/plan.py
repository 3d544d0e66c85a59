"""Attention over extents: every row of a step reads its sequence's K and V where they lie.

views     a zero-copy view per extent
windows   all decode rows in two calls over windows of the arena
gather    copies a sequence's K and V together first; the bytes are counted
auto      for each step what took least time where it was measured (SmolLM2 in float32, MLX's CPU
          build, two cores). Decode rows: views for few short rows of one extent, gather for extents
          of few slots, else windows (where MLX has none, gather or views). Prompts: gather for many
          short extents, else views.

The result is the same to float32 rounding.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...errors import BadInput, one_of
from ...host import fast_math
from ...options import ATTENTION_METHODS
from ..arena import Arena, Slots
from .views import Biases, RowRun, attend_parts, tail
from .windows import WINDOW, Windows, can_use_windows

VIEWS_UP_TO_ROWS, VIEWS_UP_TO_TOKENS = 2, 1024
GATHER_BELOW, GATHER_FROM_EXTENTS, GATHER_PROMPTS_BELOW = 6, 4, 128


class Plan:
    """Where the rows of one step read and write. Made once a step, used by every layer.

    ``rows`` lists the step's sequences in row order. Decode rows (one row per sequence) come first.
    """

    def __init__(self, rows: Sequence[RowRun], arena: Arena, method: str = "auto"):
        check_method(method, arena)
        self.arena, self.rows = arena, list(rows)
        self.num_rows = sum(run.num_rows for run in rows)
        self._biases = Biases()
        self.exp = fast_math.exp if arena.dtype == mx.float32 and fast_math.wanted() else None
        # One sequence is fed as [1, n] with an integer offset, as mlx-lm does.
        self.single = len(rows) == 1
        way = _way_of_decode([run for run in rows if run.num_rows == 1], arena, method)
        self.ways = [  # of each sequence
            way if run.num_rows == 1 else _way_of_prompt(run, method) for run in rows
        ]
        self._num_by_windows = self.ways.count("windows")
        # By sliding window, the second by KV heads too; made when a layer asks.
        self._seen: dict[int | None, list[RowRun]] = {None: self.rows}
        self._windows: dict[tuple[int, int | None], Windows] = {}
        self.write_slots = Slots([run for row in rows for run in tail(row.runs, row.num_rows)])
        self.positions: int | mx.array = rows[0].start
        if not self.single:
            each = [np.arange(run.start, run.stop, dtype=np.int32) for run in rows]
            self.positions = mx.array(np.concatenate(each))

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

        ``sliding``: a row sees that many tokens, itself the last. ``sinks``: a logit per head which
        takes its share of the softmax.
        """
        keys, values = self.arena.keys[layer], self.arena.values[layer]
        outputs, first = [], self._num_by_windows
        if first:
            windows = self._windows_for(keys.shape[0], sliding)
            exp = self.exp or mx.exp
            outputs.append(windows.attend(queries[:first], keys, values, scale, exp, sinks))
        for run, way in zip(self.seen(sliding)[first:], self.ways[first:], strict=True):
            rows = queries[first : first + run.num_rows]
            first += run.num_rows
            if way == "gather":
                k, v = ([copy] for copy in self.arena.gather(layer, run.slots))
            else:
                k, v = ([array[:, a:b] for a, b in run.runs] for array in (keys, values))
            outputs.append(
                attend_parts(rows, k, v, run.start, scale, self._biases, self.exp, sliding, sinks)
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def seen(self, sliding: int | None) -> list[RowRun]:
        """The step's rows with the tokens that they see under a sliding window."""
        if sliding not in self._seen:
            self._seen[sliding] = [run.within(sliding) for run in self.rows]
        return self._seen[sliding]

    def _windows_for(self, num_kv_heads: int, sliding: int | None) -> "Windows":
        key = num_kv_heads, sliding
        if key not in self._windows:
            rows = self.seen(sliding)[: self._num_by_windows]
            self._windows[key] = Windows(rows, self.arena, num_kv_heads)
        return self._windows[key]


def check_method(method: str, arena: Arena) -> None:
    """`BadInput` for a method that is unknown or does not fit this arena."""
    one_of("attention", method, ATTENTION_METHODS)
    if method == "windows" and not can_use_windows(arena):
        raise BadInput(
            f"attention 'windows' needs float32 on the CPU, not {arena.dtype}: use auto, views or "
            "gather"
        )


def _way_of_decode(rows: Sequence[RowRun], arena: Arena, method: str) -> str:
    num_extents, num_tokens = sum(len(run.runs) for run in rows), sum(map(_num_seen, rows))
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
        short = _num_seen(run) < len(run.runs) * GATHER_PROMPTS_BELOW
        return "gather" if len(run.runs) > GATHER_FROM_EXTENTS and short else "views"
    return "gather" if method == "gather" else "views"


def _num_seen(run: RowRun) -> int:
    return sum(stop - start for start, stop in run.runs)
