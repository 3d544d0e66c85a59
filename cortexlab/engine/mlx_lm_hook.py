"""The one place that reaches into mlx-lm: how an unmodified model's attention reads the arena.

In rows     A model's layers call ``cache.update_and_fetch(k, v)`` and then their module's
            ``scaled_dot_product_attention``. Our `LayerCache` returns an `ArenaArray`, and while a
            step runs, that function is wrapped: an `ArenaArray` goes to the plan, other arrays to
            the original. All sequences of a step run at once.
One by one  `WholeCache` and `WindowCache` are mlx-lm's own caches over the arena. Sequences take
            turns; K and V in several runs are copied together.

Afterwards, and after an exception, the modules are as they were.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from ..errors import ModelError
from ..host import fast_math
from .attention import Plan
from .books import Door

ATTENTION, SWIGLU = "scaled_dot_product_attention", "swiglu"
INNER = ("language_model", "model", "transformer", "backbone")  # names of a model's inner model
_door = Door()


class ArenaArray(mx.array):
    """Stands for a layer's K or V in the arena: an array, since some models ask for its dtype."""

    layer_cache: "LayerCache"

    def astype(self, *_args, **_kwargs):
        return self


class LayerCache:
    """mlx-lm's cache protocol for one layer and one step; ``array`` is the arena's for it.

    Where layers of several groups share an array (``is_shared``), each writes into it in the same
    step. MLX does so in place only once those that read it before are done, so a layer's attention
    is started at once, and the next layer with the array waits for it.
    """

    def __init__(self, plan: Plan, array: int, window: int | None, layer: int, is_shared: bool):
        self.plan, self.array, self.window, self.layer = plan, array, window, layer
        self._readers = plan.arena.readers if is_shared else None
        self.offset = plan.positions

    def make_mask(self, *_args, window_size: int | None = None, **_kwargs) -> None:
        """None: the plan masks each sequence by itself, to this layer's window."""
        _check_window(self.layer, window_size, self.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[ArenaArray, ArenaArray]:
        """Write ``[rows, kv_heads, 1, dim]`` (one sequence: ``[1, kv_heads, rows, dim]``)."""
        k, v = (x[0] if self.plan.single else x[:, :, 0].swapaxes(0, 1) for x in (keys, values))
        if self._readers is not None:
            mx.eval(self._readers.pop(self.array, ()))
        self.plan.arena.write(self.array, self.plan.write_slots, k, v)
        handle = ArenaArray(mx.zeros((1,), keys.dtype))
        handle.layer_cache = self
        return handle, handle

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None = None) -> mx.array:
        """Attention over the arena, in the model's shape of ``queries``."""
        single = self.plan.single
        rows = queries[0].swapaxes(0, 1) if single else queries[:, :, 0]
        out = self.plan.attend(rows, self.array, scale, self.window, sinks)
        if self._readers is not None:
            mx.async_eval(out)
            self._readers[self.array] = out
        return out.swapaxes(0, 1)[None] if single else out[:, :, None]


class _InArena:
    """Puts one of mlx-lm's caches over the arena, for one layer, step and sequence."""

    window: int | None = None

    def _over(self, plan: Plan, layer: int) -> None:
        self._plan, self._layer, self.offset = plan, layer, plan.positions

    def make_mask(self, *args, window_size: int | None = None, **kwargs):
        _check_window(self._layer, window_size, self.window)
        return super().make_mask(*args, window_size=window_size, **kwargs)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write ``[1, kv_heads, rows, dim]`` K and V; return all that the rows see of both."""
        plan = self._plan
        plan.arena.write(self._layer, plan.write_slots, keys[0], values[0])
        (seen,) = plan.seen(self.window)
        k, v = plan.arena.read(self._layer, seen.slots)
        self.keys, self.values = k[None], v[None]
        self.offset = plan.rows[0].stop
        return self.keys, self.values


class WholeCache(_InArena, KVCache):
    """All tokens of the sequence."""

    def __init__(self, plan: Plan, layer: int):
        super().__init__()
        self._over(plan, layer)


class WindowCache(_InArena, RotatingKVCache):
    """The last ``window`` tokens, in their order; the arena keeps earlier ones too."""

    def __init__(self, plan: Plan, layer: int, window: int):
        super().__init__(max_size=window)
        self.window = window
        self._over(plan, layer)


def _check_window(layer: int, asked: int | None, window: int | None) -> None:
    """`ModelError` for a mask unlike the cache: mlx-lm applies it to some chunks alone."""
    if asked not in (None, window):
        cache = "KVCache" if window is None else f"RotatingKVCache of {window}"
        raise ModelError(
            f"layer {layer} masks a sliding window of {asked} tokens over a {cache}: mlx-lm's own "
            "tokens depend on its chunks"
        )


def parted(caches: Sequence) -> tuple[list[tuple], list[tuple]]:
    """A model's caches of K and V, and those of states, each with its layer; those in a `CacheList`
    one by one.
    """
    kv, states = [], []
    for layer, cache in enumerate(caches):
        for each in cache.caches if type(cache) is CacheList else [cache]:
            (states if type(each) is ArraysCache else kv).append((layer, each))
    return kv, states


def states_of(caches: Sequence) -> list[mx.array | None]:
    """The states in a model's caches, as `filled` puts them there."""
    return [array for _, cache in parted(caches)[1] for array in cache.cache]


def filled(like: Sequence, kv: Iterator, states: Iterator[mx.array | None]) -> list:
    """New caches in the places of those ``like`` them: of K and V the next of ``kv``, of a state
    filled from ``states``.
    """
    return [_filled(cache, kv, states) for cache in like]


def _filled(like, kv: Iterator, states: Iterator[mx.array | None]):
    if type(like) is CacheList:
        return CacheList(*map(partial(_filled, kv=kv, states=states), like.caches))
    if type(like) is not ArraysCache:
        return next(kv)
    cache = ArraysCache(len(like.cache))
    cache.cache = [next(states) for _ in like.cache]
    return cache


def attention_modules(model: nn.Module) -> list[ModuleType]:
    """The Python modules whose attention function the model's layers call."""
    names = {type(module).__module__ for module in model.modules()}
    return [module for name in sorted(names) if hasattr(module := sys.modules[name], ATTENTION)]


def over_extents(modules: list[ModuleType], call: Callable):
    """What ``call`` returns: within it an `ArenaArray` goes to its plan, SwiGLU to `fast_math`. One
    thread at a time.
    """
    return _door.wait(lambda: _over_extents(modules, call))


def _over_extents(modules: list[ModuleType], call: Callable):
    with contextlib.ExitStack() as stack:
        for module in modules:
            original = getattr(module, ATTENTION)
            # Restored in any case: an exception may come before the next line.
            stack.callback(setattr, module, ATTENTION, original)
            setattr(module, ATTENTION, _dispatching(original))
            if fast_math.wanted() and getattr(module, SWIGLU, None) is swiglu:
                stack.callback(setattr, module, SWIGLU, swiglu)
                setattr(module, SWIGLU, _swiglu)
        return call()


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    is_float32 = gate.dtype == x.dtype == mx.float32
    return fast_math.swiglu(gate, x) if is_float32 else swiglu(gate, x)


def _dispatching(original):
    def scaled_dot_product_attention(
        queries, keys, values, cache=None, scale=1.0, mask=None, sinks=None, **more
    ):
        if not isinstance(keys, ArenaArray):
            more |= {"sinks": sinks} if sinks is not None else {}
            return original(queries, keys, values, cache, scale=scale, mask=mask, **more)
        if mask is not None or more:
            raise ModelError(
                "this model's attention has a mask of its own, which extents do not support"
            )
        return keys.layer_cache.attend(queries, scale, sinks)

    return scaled_dot_product_attention


class LastRows:
    """A language model's inner model, handing on to the head only ``rows`` that are sampled."""

    def __init__(self, inner: nn.Module, rows: mx.array):
        self._inner, self._rows = inner, rows

    def __call__(self, *args, **kwargs):
        hidden = self._inner(*args, **kwargs)
        return hidden.reshape(1, -1, hidden.shape[-1])[:, self._rows]

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


def with_last_rows(model: nn.Module, rows: mx.array) -> nn.Module:
    """A shallow copy of ``model`` whose inner model is a `LastRows`, sharing every weight; the
    model itself where there is no inner model to wrap: the head then runs on every row.
    """
    name = next((name for name in INNER if isinstance(model.get(name), nn.Module)), None)
    if name is None:
        return model
    inner = model[name]
    deeper = with_last_rows(inner, rows) if name == "language_model" else LastRows(inner, rows)
    if deeper is inner:
        return model
    outer = copy.copy(model)
    setattr(outer, name, deeper)
    return outer
