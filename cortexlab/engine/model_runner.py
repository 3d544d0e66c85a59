"""Whether and how a model can be driven: what its layers cache, and a few tokens tried before
anybody relies on it.
"""

import time
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..errors import ModelError, shown
from .arena import Arena, LayerShape
from .attention import WINDOW, Plan, RowRun
from .mlx_lm_hook import (
    LayerCache,
    WholeCache,
    WindowCache,
    attention_modules,
    attention_over_extents,
    with_last_rows,
)

TOLERANCE, TOLERANCE_16_BIT = 1e-3, 5e-2  # of the largest logit
PROBE = [0, 1, 2, 2], [1, 2, 0]  # two short sequences


class Driver:
    """Runs the rows of a step through one model, reading and writing an arena.

    - ``layers``: the shape of each layer's K and V; ``windows``: how many tokens each attends to,
      None for all; ``dtype``.
    - ``planning_s``: seconds the last call spent on plans.
    - ``batched``: all sequences of a step in one call, attention where K and V lie. Else (the model
      has an attention or positions of its own) one sequence after the other, K and V handed to the
      model whole.

    Raises `ModelError` for a model that neither way gives the logits which it gives by itself.
    """

    def __init__(self, model: nn.Module):
        self._modules = attention_modules(model)
        caches = make_prompt_cache(model)
        self.windows = [_window(layer, cache) for layer, cache in enumerate(caches)]
        try:
            reference = mx.concatenate(
                [
                    model(mx.array([PROBE[0]]), cache=caches)[0],
                    model(mx.array([PROBE[1]]), cache=make_prompt_cache(model))[0],
                ]
            )
            mx.eval(reference)
        except Exception as error:
            raise ModelError(
                f"mlx-lm itself cannot run this model here: {_reason(error)}"
            ) from error
        self.layers, self.dtype = _shapes(caches)
        # Best first: all sequences in one call, the head on the rows that are sampled.
        for self.batched in (True, False):
            for self._model, self._last_rows in (with_last_rows(model), (model, None)):
                if (reason := self._error(reference)) is None:
                    return
        raise ModelError(reason)

    def logits(
        self,
        rows: Sequence[RowRun],
        tokens: mx.array,
        ends: Sequence[int],
        arena: Arena,
        method: str,
    ) -> mx.array | None:
        """``[len(ends), vocabulary]`` logits behind the rows numbered ``ends``, not evaluated yet;
        None when ``ends`` is empty.

        ``tokens``: one a row, all sequences' one after the other. ``method`` is for batched
        attention.
        """
        self.planning_s = 0.0
        if self.batched:
            return self._run(self._plan(rows, arena, method), tokens, ends)
        found, first = [], 0
        for row in rows:
            stop = first + row.num_rows
            logits = self._run(
                self._plan([row], arena, "views"),
                tokens[first:stop],
                [end - first for end in ends if first <= end < stop],
            )
            mx.eval(
                arena.arrays(), [] if logits is None else logits
            )  # before the next sequence writes: it would copy what is still held
            found += [] if logits is None else [logits]
            first = stop
        return mx.concatenate(found) if found else None

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's K and V in every layer."""
        return self._arena(1).slot_bytes

    def _plan(self, rows: Sequence[RowRun], arena: Arena, method: str) -> Plan:
        started_at = time.perf_counter()
        plan = Plan(rows, arena, method)
        self.planning_s += time.perf_counter() - started_at
        return plan

    def _run(self, plan: Plan, tokens: mx.array, ends: Sequence[int]) -> mx.array | None:
        if self._last_rows:
            self._last_rows.rows = mx.array(list(ends) or [0])
        with attention_over_extents(self._modules):
            logits = self._model(
                tokens[None] if plan.single else tokens[:, None], cache=self._caches(plan)
            )
        if not ends:  # only parts of prompts: the head is never evaluated
            return None
        logits = logits.reshape(-1, logits.shape[-1])
        return logits if self._last_rows else logits[mx.array(list(ends))]

    def _caches(self, plan: Plan) -> list:
        if self.batched:
            return [LayerCache(plan, layer, window) for layer, window in enumerate(self.windows)]
        return [
            WholeCache(plan, layer) if window is None else WindowCache(plan, layer, window)
            for layer, window in enumerate(self.windows)
        ]

    def _arena(self, num_slots: int) -> Arena:
        return Arena(
            len(self.layers),
            self.layers[0].num_kv_heads,
            self.layers[0].key_dim,
            num_slots,
            self.dtype,
            self.layers,
        )

    def _error(self, reference: mx.array) -> str | None:
        """Why this way will not do; None when it gives the ``reference``: a prompt alone, a token
        beside a prompt, a token alone.
        """
        (first, second), arena = PROBE, self._arena(WINDOW + 32)
        scattered, whole = [(3, 5), (WINDOW + 5, WINDOW + 7)], [(20, 23)]
        steps = [
            ([RowRun(0, 3, [(3, 5), (WINDOW + 5, WINDOW + 6)])], first[:3]),
            ([RowRun(3, 1, scattered), RowRun(0, 2, [(20, 22)])], first[3:] + second[:2]),
            ([RowRun(2, 1, whole)], second[2:]),
        ]
        try:
            ours = mx.concatenate(
                [
                    self.logits(rows, mx.array(tokens), range(len(tokens)), arena, "auto")
                    for rows, tokens in steps
                ]
            )
            finite = mx.isfinite(reference)  # some models never say some tokens
            worst = (
                mx.where(
                    finite == mx.isfinite(ours),
                    mx.abs(mx.where(finite, ours - reference, 0)),
                    mx.inf,
                )
                .max()
                .item()
            )
            worst /= max(mx.where(finite, mx.abs(reference), 0).max().item(), 1e-30)
        except ModelError as error:
            return str(error)
        except Exception as error:
            return f"this model's attention cannot read from extents: {_reason(error)}"
        if not worst <= (TOLERANCE if self.dtype == mx.float32 else TOLERANCE_16_BIT):
            return (
                "this model gives other logits over extents than by itself (relative difference "
                f"{worst:.1e})"
            )
        return None


def _window(layer: int, cache) -> int | None:
    """How many tokens a layer attends to, None for all, going by the type of its cache."""
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return cache.max_size
    raise ModelError(
        f"layer {layer} uses {type(cache).__name__}: only models whose layers all use KVCache or "
        "RotatingKVCache can be run"
    )


def _shapes(caches: list) -> tuple[list[LayerShape], mx.Dtype]:
    """The shape of each layer's K and V, and their type, from caches that have seen tokens."""
    for layer, cache in enumerate(caches):
        if cache.keys is None:
            raise ModelError(f"layer {layer} never uses its {type(cache).__name__}")
    dtypes = {array.dtype for cache in caches for array in (cache.keys, cache.values)}
    if len(dtypes) > 1:
        raise ModelError("K and V of this model have several types, which cannot share one arena")
    return [
        LayerShape(c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for c in caches
    ], dtypes.pop()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error))}"
