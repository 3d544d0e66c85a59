"""The one place that reaches into mlx-lm: how an unmodified model's attention comes to read the
arena. There are two ways.

In rows     A model's layers call ``cache.update_and_fetch(k, v)`` and then their module's
            ``scaled_dot_product_attention``. Our `LayerCache` returns an `ArenaArray` there, and
            while a step runs, that function is wrapped: it looks at the type of ``keys`` and hands
            ours to the plan, everything else to the original. All sequences of a step run at once.
One by one  `WholeCache` and `WindowCache` are mlx-lm's own caches, with K and V that lie in the
            arena. The model gets them whole and does what it likes; they are copied together where
            a sequence lies in several runs. Sequences take turns.

Afterwards, and after an exception, the modules are as they were.
"""

import contextlib
import copy
import sys
import threading
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..errors import ModelError
from ..host import fast_math
from .arena import Slots
from .attention import Plan, tail

ATTENTION, SWIGLU = "scaled_dot_product_attention", "swiglu"
_lock = threading.RLock()


class ArenaArray(mx.array):
    """Stands for a layer's K or V in the arena. It is an array only because some models ask one for
    its ``dtype``.
    """

    layer_cache: "LayerCache"

    def astype(self, *_args, **_kwargs):
        return self


class LayerCache:
    """mlx-lm's cache protocol for one layer and one step: writes the step's rows, then stands for
    what attention reads.
    """

    def __init__(self, plan: Plan, layer: int, window: int | None):
        self.plan, self.layer, self.window = plan, layer, window
        self.offset = plan.positions

    def make_mask(self, *_args, window_size: int | None = None, **_kwargs) -> None:
        """None: the plan masks each sequence by itself, to this layer's window."""
        _check_window(self.layer, window_size, self.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[ArenaArray, ArenaArray]:
        """Write ``[rows, kv_heads, 1, head_dim]`` (one sequence: ``[1, kv_heads, rows, head_dim]``)
        K and V.
        """
        k, v = (x[0] if self.plan.single else x[:, :, 0].swapaxes(0, 1) for x in (keys, values))
        self.plan.arena.write(self.layer, self.plan.write_slots, k, v)
        handle = ArenaArray(mx.zeros((1,), keys.dtype))
        handle.layer_cache = self
        return handle, handle

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None = None) -> mx.array:
        """Queries as the model shapes them, and back in the same shape."""
        if self.plan.single:
            return self.plan.attend(
                queries[0].swapaxes(0, 1), self.layer, scale, self.window, sinks
            ).swapaxes(0, 1)[None]
        return self.plan.attend(queries[:, :, 0], self.layer, scale, self.window, sinks)[:, :, None]


class _InArena:
    """Puts one of mlx-lm's caches over the arena, for one layer, step and sequence."""

    window: int | None = None

    def _over(self, plan: Plan, layer: int) -> None:
        self._plan, self._layer, (self._row,) = plan, layer, plan.rows
        self.offset = self._row.start

    def make_mask(self, *args, window_size: int | None = None, **kwargs):
        _check_window(self._layer, window_size, self.window)
        return super().make_mask(*args, window_size=window_size, **kwargs)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write ``[1, kv_heads, rows, dim]`` K and V; the sequence's whole, or what of it the rows
        see through the window.
        """
        arena, row = self._plan.arena, self._row
        arena.write(self._layer, self._plan.write_slots, keys[0], values[0])
        seen = row.stop if self.window is None else row.num_rows + min(row.start, self.window - 1)
        self.keys, self.values = (
            x[None] for x in arena.read(self._layer, Slots(tail(row.runs, seen)))
        )
        self.offset = row.stop
        return self.keys, self.values


class WholeCache(_InArena, KVCache):
    """All tokens of the sequence."""

    def __init__(self, plan: Plan, layer: int):
        super().__init__()
        self._over(plan, layer)


class WindowCache(_InArena, RotatingKVCache):
    """The last ``window`` tokens, in their order. The arena keeps those before them, too."""

    def __init__(self, plan: Plan, layer: int, window: int):
        super().__init__(max_size=window)
        self.window = window
        self._over(plan, layer)


def _check_window(layer: int, asked: int | None, window: int | None) -> None:
    """mlx-lm applies a mask that is wider or narrower than its cache to some chunks and not to
    others: nothing to be equal to.
    """
    if asked not in (None, window):
        cache = "KVCache" if window is None else f"RotatingKVCache of {window}"
        raise ModelError(
            f"layer {layer} masks a sliding window of {asked} tokens over a {cache}: mlx-lm's own "
            "tokens depend on its chunks"
        )


def attention_modules(model: nn.Module) -> list[ModuleType]:
    """The Python modules whose attention function the model's layers call."""
    names = {type(module).__module__ for module in model.modules()}
    return [module for name in sorted(names) if hasattr(module := sys.modules[name], ATTENTION)]


@contextlib.contextmanager
def attention_over_extents(modules: list[ModuleType]):
    """Within it, attention on an `ArenaArray` goes to its plan, and SwiGLU where `fast_math` is
    wanted. One thread at a time.
    """
    with _lock:
        originals = [
            (module, ATTENTION, getattr(module, ATTENTION), _dispatching) for module in modules
        ]
        if fast_math.wanted():
            originals += [
                (module, SWIGLU, swiglu, _in_float32)
                for module in modules
                if getattr(module, SWIGLU, None) is swiglu
            ]
        try:
            for module, name, original, wrapped in originals:
                setattr(module, name, wrapped(original))
            yield
        finally:
            for module, name, original, _ in originals:
                setattr(module, name, original)


def _in_float32(original):
    def swiglu(gate, x):
        return (
            fast_math.swiglu(gate, x) if gate.dtype == x.dtype == mx.float32 else original(gate, x)
        )

    return swiglu


def _dispatching(original):
    def scaled_dot_product_attention(
        queries, keys, values, cache=None, scale=1.0, mask=None, sinks=None, **more
    ):
        if not isinstance(keys, ArenaArray):
            return original(
                queries,
                keys,
                values,
                cache,
                scale=scale,
                mask=mask,
                **({"sinks": sinks} if sinks is not None else {}),
                **more,
            )
        if mask is not None or more:
            raise ModelError(
                "this model's attention has a mask of its own, which extents do not support"
            )
        return keys.layer_cache.attend(queries, scale, sinks)

    return scaled_dot_product_attention


class LastRows:
    """A language model's inner model, handing on only the ``rows`` behind which a token is sampled:
    only they want the head.
    """

    def __init__(self, inner: nn.Module):
        self._inner = inner
        self.rows: mx.array | None = None

    def __call__(self, *args, **kwargs):
        hidden = self._inner(*args, **kwargs)
        return hidden.reshape(1, -1, hidden.shape[-1])[:, self.rows]

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


def with_last_rows(model: nn.Module) -> tuple[nn.Module, LastRows | None]:
    """A shallow copy of ``model`` whose inner model is a `LastRows`, sharing every weight; the
    model itself stays as it is.

    None in the second place when the model has no inner model of its own to wrap: its head then
    runs on every row.
    """
    name = next(
        (
            name
            for name in ("language_model", "model", "transformer")
            if isinstance(model.get(name), nn.Module)
        ),
        None,
    )
    if name is None:
        return model, None
    if name == "language_model":
        inner, last_rows = with_last_rows(model[name])
    else:
        inner = last_rows = LastRows(model[name])
    outer = copy.copy(model)
    setattr(outer, name, inner)
    return outer, last_rows
