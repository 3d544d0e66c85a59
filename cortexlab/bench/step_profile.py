"""Where a step's time goes: the step of a real model over an arena, beside its parts run alone, and
attention by length of extents.

A part is measured by repeating what a step did: while one step runs, the calls of the model's
modules and of the cache are recorded; afterwards all calls of one part run in a row, through all
layers, on arrays of equal shapes. Nothing is left out between them, so a part's time has its share
of building the graph and of starting kernels, as in the step. What no part accounts for is the
rest: residuals, the embedding, the plan, and misses of the processor's cache that a part alone does
not have.

The matrix products are the bound: the model's own layers at this many rows, at the BLAS's speed. No
engine that computes the same tokens takes less, so a step is read as a multiple of them.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd

from ..engine.arena import Arena, LayerShape
from ..engine.attention import Plan, RowRun
from ..engine.mlx_lm_hook import SWIGLU, LayerCache
from ..engine.model_runner import Batching, ModelRunner
from ..errors import ModelError, at_least
from ..host import fast_math
from ..metrics import PARTS, REST
from ..options import ATTENTION_METHODS
from .measure import in_turn

PRODUCTS, ATTENTION, ACTIVATION, ROPE, NORMS, WRITES = PARTS
ACTIVATIONS = SWIGLU, "silu", "gelu", "gelu_approx", "relu2"  # names of functions in models


@dataclass(frozen=True, slots=True)
class Call:
    """A call as a step made it, with stand-ins for the numbers. ``flops``: of a matrix product,
    additions counted.
    """

    part: str
    function: Callable
    args: tuple
    kwargs: dict
    flops: int = 0


def measure_steps(
    model: nn.Module,
    decode_rows: Sequence[int],
    prefill_rows: Sequence[int],
    context: int,
    repeats: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """A row a step: its median time and its parts' in ms, measured in turn.

    A decode step of n rows has n sequences of ``context`` tokens each, in one extent; a prefill
    step is the start of one prompt. ``times_products``: the step by its own matrix products, the
    median of the ratios within a turn.
    """
    decode_rows, prefill_rows = (
        [at_least("rows", num_rows, 1) for num_rows in rows] for rows in (decode_rows, prefill_rows)
    )
    repeats, context = at_least("repeats", repeats, 1), at_least("context", context, 1)
    steps = {f"decode, {n} row{'s' * (n > 1)}": _neighbours(n, context, 1) for n in decode_rows}
    steps |= {f"prefill, {n} rows": _neighbours(1, 0, n) for n in prefill_rows}
    runner = ModelRunner(model)
    arena = filled_arena(
        runner.layers, runner.dtype, max(rows[-1].runs[-1][1] for rows in steps.values()), seed
    )
    return pd.DataFrame(
        [
            {"step": name} | _measure_step(runner, rows, arena, repeats)
            for name, rows in steps.items()
        ]
    )


def measure_extents(
    layers: Sequence[LayerShape],
    num_heads: int,
    extent_slots: Sequence[int],
    num_sequences: int,
    context: int,
    methods: Sequence[str] = ATTENTION_METHODS,
    repeats: int = 5,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> pd.DataFrame:
    """A row a length of extents and method: ms of one layer's decode attention, over
    ``num_sequences`` of ``context`` tokens.

    The tokens are equal everywhere; only the number of extents differs. Measured over all layers in
    a row, as in a step, so that no layer finds its K and V in the processor's cache; the plan is
    made once for all layers, and counted.
    """
    num_sequences = at_least("num_sequences", num_sequences, 1)
    context = at_least("context", context, 1)
    extent_slots = [at_least("extent_slots", each, 1) for each in extent_slots]
    rows = {each: _scattered(num_sequences, context, each, seed) for each in extent_slots}
    arena = filled_arena(layers, dtype, num_sequences * context, seed)
    works = {
        (each, method): partial(attend, rows[each], arena, num_heads, method)
        for each in extent_slots
        for method in methods
    }
    return pd.DataFrame(
        {
            "extent_slots": each,
            "num_extents": -(-context // each),
            "method": method,
            "ms": median(seconds) / len(layers) * 1000,
        }
        for (each, method), seconds in in_turn(works, repeats).items()
    )


def attend(rows: Sequence[RowRun], arena: Arena, num_heads: int, method: str) -> None:
    """One step's attention, of every layer, with constant queries."""
    plan, chain = Plan(rows, arena, method), mx.array(0)
    for layer, shape in enumerate(arena.layers):
        queries = mx.full((plan.num_rows, num_heads, shape.key_dim), 0.1, arena.dtype)
        chain = mx.depends(chain, plan.attend(queries, layer, shape.key_dim**-0.5))
    mx.eval(chain)


# --- a step and its parts -------------------------------------------------------------------------


def _measure_step(runner: ModelRunner, rows: list[RowRun], arena: Arena, repeats: int) -> dict:
    calls = record_step(runner, rows, arena)
    works = {"step": lambda: _run_step(runner, rows, arena)}
    works |= {
        part: lambda part=part: _run_calls([call for call in calls if call.part == part], arena)
        for part in PARTS
    }
    times = in_turn(works, repeats)
    ms = {name: median(seconds) * 1000 for name, seconds in times.items()}
    ratios = [
        step / products for step, products in zip(times["step"], times[PRODUCTS], strict=True)
    ]
    return {
        "num_rows": sum(run.num_rows for run in rows),
        "step_ms": ms["step"],
        **{part: ms[part] for part in PARTS},
        REST: ms["step"] - sum(ms[part] for part in PARTS),
        "times_products": median(ratios),
        "products_gflops": sum(call.flops for call in calls) / ms[PRODUCTS] / 1e6,
    }


def _run_step(runner: ModelRunner, rows: list[RowRun], arena: Arena) -> None:
    """A step as the engine runs it, to its tokens."""
    ends = (np.cumsum([run.num_rows for run in rows]) - 1).tolist()
    plans = runner.plans([rows], arena, "auto")
    logits = runner.logits(plans, mx.zeros(ends[-1] + 1, mx.uint32), ends)
    mx.eval(mx.argmax(logits, axis=-1), arena.arrays())


def _run_calls(calls: Sequence[Call], arena: Arena) -> None:
    """Run ``calls`` in a chain of which only the end is held, so that each result is freed once it
    is computed, as in a step.
    """
    chain = mx.array(0)
    for call in calls:
        chain = mx.depends(chain, call.function(*call.args, **call.kwargs))
    mx.eval(chain, arena.arrays())


def record_step(runner: ModelRunner, rows: list[RowRun], arena: Arena) -> list[Call]:
    """The calls that one step of ``rows`` makes, in order. `ModelError` for a model that brings its
    own attention, or has layers with states.
    """
    if runner.way is not Batching.ALL:
        raise ModelError(f"this model takes {runner.way}: the parts of a step cannot be told apart")
    with _recorder(runner.model) as calls:
        _run_step(runner, rows, arena)
    return calls


@contextlib.contextmanager
def _recorder(model: nn.Module) -> Iterator[list[Call]]:
    """Records calls of the parts into the list it gives; the model is itself again afterwards."""
    recorder = _Recorder()
    with contextlib.ExitStack() as stack:
        for owner, name, part in _targets(model):
            original = vars(owner)[name]
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, recorder.recording(part, original, isinstance(owner, type)))
        yield recorder.calls
    mx.eval(list(recorder.stand_ins.values()))


class _Recorder:
    """The calls of a step, the outermost where one part calls another."""

    def __init__(self):
        self.calls: list[Call] = []
        self.stand_ins: dict[tuple, mx.array] = {}  # random numbers by shape and type
        self.depth = 0  # of calls under way

    def recording(self, part: str, original: Callable, is_method: bool) -> Callable:
        """``original``, whose calls are recorded."""

        def call(*args, **kwargs):
            self.depth += 1
            try:
                result = original(*args, **kwargs)
            finally:
                self.depth -= 1
            if not self.depth:
                given = args[:is_method] + tuple(map(self._stand_in, args[is_method:]))
                named = {name: self._stand_in(value) for name, value in kwargs.items()}
                flops = 2 * result.size * args[1].shape[-1] if part == PRODUCTS else 0
                self.calls.append(Call(part, original, given, named, flops))
            return result

        return call

    def _stand_in(self, value):
        """Random numbers in place of an array of floats, so that no array of the step is kept."""
        if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
            return value
        key = value.shape, value.dtype
        if key not in self.stand_ins:
            self.stand_ins[key] = mx.random.normal(*key, key=mx.random.key(0))
        return self.stand_ins[key]


def _targets(model: nn.Module) -> Iterator[tuple[object, str, str]]:
    """The functions of each part in the model's code: ``(class or module, attribute, part)``, each
    once.
    """
    yield LayerCache, "attend", ATTENTION
    yield LayerCache, "update_and_fetch", WRITES
    found, names = set(), ACTIVATIONS
    if fast_math.wanted():  # the hook then replaces each ``swiglu`` of mlx-lm by its own
        names = [name for name in ACTIVATIONS if name != SWIGLU]
        yield fast_math, SWIGLU, ACTIVATION
    for module in model.modules():
        kind, code = type(module), sys.modules[type(module).__module__]
        part = part_of(kind)
        found |= {
            (owner, "__call__", part)
            for owner in kind.__mro__
            if part and "__call__" in vars(owner)
        }
        found |= {
            (owner, "as_linear", PRODUCTS) for owner in kind.__mro__ if "as_linear" in vars(owner)
        }
        found |= {
            (owner, name, ACTIVATION)
            for owner in (code, nn)
            for name in names
            if callable(vars(owner).get(name))
        }
    yield from sorted(found, key=str)


def part_of(kind: type) -> str | None:
    """The part that a class of modules is, by the names that mlx and mlx-lm use."""
    if kind.__module__ == "mlx.nn.layers.activations":
        return ACTIVATION
    words = {"Linear": PRODUCTS, "Norm": NORMS, "RoPE": ROPE, "Rotary": ROPE}
    return next((part for word, part in words.items() if word in kind.__name__), None)


# --- where sequences lie --------------------------------------------------------------------------


def _neighbours(num_sequences: int, start: int, num_rows: int) -> list[RowRun]:
    """Sequences one behind the other, each in one extent, with ``num_rows`` rows from position
    ``start``.
    """
    length = start + num_rows
    return [RowRun(start, num_rows, [(n * length, (n + 1) * length)]) for n in range(num_sequences)]


def _scattered(num_sequences: int, context: int, extent_slots: int, seed: int) -> list[RowRun]:
    """One decode row a sequence, whose tokens lie in extents of ``extent_slots`` (the last may be
    shorter), shuffled over the arena.
    """
    lengths = [
        min(extent_slots, context - first)
        for _ in range(num_sequences)
        for first in range(0, context, extent_slots)
    ]
    order = np.random.default_rng(seed).permutation(len(lengths))
    starts = np.empty(len(lengths), dtype=int)
    starts[order] = np.cumsum([0, *(lengths[i] for i in order[:-1])])
    runs = [
        (int(start), int(start) + length) for start, length in zip(starts, lengths, strict=True)
    ]
    each = len(runs) // num_sequences
    return [RowRun(context - 1, 1, runs[n * each : (n + 1) * each]) for n in range(num_sequences)]


def filled_arena(layers: Sequence[LayerShape], dtype: mx.Dtype, num_slots: int, seed: int) -> Arena:
    """Random K and V, equal numbers in every layer but memory of its own. Not zeros: untouched
    pages would be read faster.
    """
    arena = Arena(layers, num_slots, dtype)
    numbers: dict[tuple, mx.array] = {}
    for arrays in (arena.keys, arena.values):
        for layer, array in enumerate(arrays):
            if array.shape not in numbers:
                numbers[array.shape] = mx.random.normal(
                    array.shape, dtype=dtype, key=mx.random.key(seed)
                )
            arrays[layer] = numbers[array.shape] + 0
    mx.eval(arena.arrays())
    return arena
