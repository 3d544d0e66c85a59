"""The model over an arena: whether and how it can be run, and a step from chunks to tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..errors import BadInput, ModelError, shown
from ..host.models import model_limits
from ..scheduler.request import Request
from ..scheduler.scheduler import Chunk, Schedule
from .arena import Arena, LayerShape, slot_bytes
from .attention import WINDOW, Plan, RowRun
from .mlx_lm_hook import (
    LayerCache,
    WholeCache,
    WindowCache,
    attention_modules,
    attention_over_extents,
    with_last_rows,
)
from .sampler import Choice

TOLERANCE, TOLERANCE_16_BIT = 1e-3, 5e-2  # of the largest logit
PROBE = [0, 1, 2, 2], [1, 2, 0]  # two short sequences


@dataclass(slots=True)
class Flight:
    """A step that was launched and has not landed."""

    sampling: list[Request]  # requests that get a token
    num_decode: int  # rows of the last output token; all others are prefill
    num_prefill: int
    tokens: mx.array | None = None  # [len(sampling)]
    choices: dict[Request, Choice] = field(default_factory=dict)  # other than the largest logit
    errors: dict[Request, str] = field(default_factory=dict)  # why a request could get no token
    planning_s: float = 0.0  # of the host, for row runs and attention plans


class ModelRunner:
    """Runs the rows of a step through one model over an arena, for one or several engines.

    - ``layers``: shape of each layer's K and V; ``windows``: how many tokens each attends to, None
      for all; ``dtype`` of K and V; ``context`` and ``vocabulary`` in tokens.
    - ``batched``: all sequences of a step in one call, attention where K and V lie. Else (the model
      has an attention or positions of its own) one sequence after the other, K and V whole.

    `ModelError` for a model that in neither way gives its own logits.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.context, self.vocabulary = model_limits(model)
        self._modules = attention_modules(model)
        caches = make_prompt_cache(model)
        self.windows = [_window(layer, cache) for layer, cache in enumerate(caches)]
        first, second = (mx.array([tokens]) for tokens in PROBE)
        try:
            alone = model(first, cache=caches)[0], model(second, cache=make_prompt_cache(model))[0]
            reference = mx.concatenate(alone)
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

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, all layers."""
        return slot_bytes(self.layers, self.dtype)

    def launch(
        self, step: Schedule, arena: Arena, method: str, before: Flight | None = None
    ) -> Flight:
        """Build a step's graph, choose its tokens, and start it all. ``before``: the flight whose
        tokens are not read yet.
        """
        started_at = time.perf_counter()
        chunks = step.chunks
        sampling = [chunk.request for chunk in chunks if chunk.samples]
        num_decode = sum(chunk.stop > len(chunk.request.prompt) for chunk in step.decode)
        lasts = list(accumulate(chunk.num_rows for chunk in chunks))
        flight = Flight(sampling, num_decode, lasts[-1] - num_decode)
        ends = [last - 1 for chunk, last in zip(chunks, lasts, strict=True) if chunk.samples]
        rows = [
            RowRun(chunk.start, chunk.num_rows, list(chunk.request.table.runs(0, chunk.stop)))
            for chunk in chunks
        ]
        flight.planning_s = time.perf_counter() - started_at
        logits = self.logits(rows, _inputs(chunks, before), ends, arena, method)
        flight.planning_s += self.planning_s
        if logits is None:  # only parts of prompts
            mx.async_eval(arena.arrays())
        else:
            _choose(flight, logits, before)
            choices = (array for choice in flight.choices.values() for array in choice.arrays())
            mx.async_eval(flight.tokens, *choices, arena.arrays())
        for request in sampling:
            request.num_pending += 1
        return flight

    def logits(
        self, rows: Sequence[RowRun], tokens: mx.array, ends: Sequence[int], arena: Arena,
        method: str,
    ) -> mx.array | None:  # fmt: skip
        """``[len(ends), vocabulary]`` logits after the rows numbered ``ends``, not evaluated yet;
        None when ``ends`` is empty. ``tokens``: one a row, all sequences' one after the other.
        ``method`` is for batched attention. ``planning_s`` afterwards: seconds spent on plans.
        """
        self.planning_s = 0.0
        if self.batched:
            return self._run(self._plan(rows, arena, method), tokens, ends)
        found, first = [], 0
        for row in rows:
            stop = first + row.num_rows
            own = [end - first for end in ends if first <= end < stop]
            logits = self._run(self._plan([row], arena, "views"), tokens[first:stop], own)
            # Evaluated before the next sequence writes, which would copy an array still held.
            mx.eval(arena.arrays(), [] if logits is None else logits)
            found += [] if logits is None else [logits]
            first = stop
        return mx.concatenate(found) if found else None

    def _plan(self, rows: Sequence[RowRun], arena: Arena, method: str) -> Plan:
        started_at = time.perf_counter()
        plan = Plan(rows, arena, method)
        self.planning_s += time.perf_counter() - started_at
        return plan

    def _run(self, plan: Plan, tokens: mx.array, ends: Sequence[int]) -> mx.array | None:
        if self._last_rows:
            self._last_rows.rows = mx.array(list(ends) or [0])
        inputs = tokens[None] if plan.single else tokens[:, None]
        with attention_over_extents(self._modules):
            logits = self._model(inputs, cache=self._caches(plan))
        if not ends:  # only parts of prompts: the head is never evaluated
            return None
        logits = logits.reshape(-1, logits.shape[-1])
        return logits if self._last_rows else logits[mx.array(list(ends))]

    def _caches(self, plan: Plan) -> list:
        layers = enumerate(self.windows)
        if self.batched:
            return [LayerCache(plan, layer, window) for layer, window in layers]
        return [
            WholeCache(plan, layer) if window is None else WindowCache(plan, layer, window)
            for layer, window in layers
        ]

    def _error(self, reference: mx.array) -> str | None:
        """Why this way will not do; None when it gives the ``reference`` for a prompt alone, a
        token beside a prompt, and a token alone.
        """
        (first, second), arena = PROBE, Arena(self.layers, WINDOW + 32, self.dtype)
        scattered, whole = [(3, 5), (WINDOW + 5, WINDOW + 7)], [(20, 23)]
        steps = [
            ([RowRun(0, 3, [(3, 5), (WINDOW + 5, WINDOW + 6)])], first[:3]),
            ([RowRun(3, 1, scattered), RowRun(0, 2, [(20, 22)])], first[3:] + second[:2]),
            ([RowRun(2, 1, whole)], second[2:]),
        ]
        try:
            ours = [
                self.logits(rows, mx.array(tokens), range(len(tokens)), arena, "auto")
                for rows, tokens in steps
            ]
            ours = mx.concatenate(ours)
            finite = mx.isfinite(reference)  # some models never say some tokens
            gaps = mx.abs(mx.where(finite, ours - reference, 0))
            worst = mx.where(finite == mx.isfinite(ours), gaps, mx.inf).max().item()
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


def _inputs(chunks: list[Chunk], before: Flight | None) -> mx.array:
    """The chunks' tokens; pending ones come from the flight ``before``, unread."""
    tokens = [token for chunk in chunks for token in chunk.request.tokens(chunk.start, chunk.stop)]
    inputs = mx.array(tokens, dtype=mx.uint32)
    if not before:
        return inputs
    place = {request: index for index, request in enumerate(before.sampling)}
    rows, sampled = [], []
    for chunk, last in zip(chunks, accumulate(chunk.num_rows for chunk in chunks), strict=True):
        if chunk.request.num_pending and chunk.samples:
            rows.append(last - 1)
            sampled.append(place[chunk.request])
    if rows:
        inputs[mx.array(rows)] = before.tokens[mx.array(sampled)]
    return inputs


def _choose(flight: Flight, logits: mx.array, before: Flight | None) -> None:
    """A token for each row of ``[len(flight.sampling), vocabulary]``, or why there is none."""
    flight.tokens = mx.argmax(logits, axis=-1).astype(mx.uint32)
    places, tokens = [], []
    for i, request in enumerate(flight.sampling):
        chooser = request.chooser
        if chooser.plain:
            continue
        last = before.choices.get(request) if before else None
        history = _history(request, before) if chooser.wants_tokens else None
        try:
            choice = chooser(history, logits[i : i + 1], last.state if last else chooser.state)
        except BadInput as error:
            flight.errors[request] = str(error)
        except Exception as error:
            flight.errors[request] = f"its sampler or logits processor raised {_reason(error)}"
        else:
            flight.choices[request] = choice
            places.append(i)
            tokens.append(choice.token)
    if places:
        flight.tokens[mx.array(places)] = mx.concatenate(tokens)


def _history(request: Request, before: Flight | None) -> mx.array:
    """Prompt and output, as logits processors see them, a pending token included."""
    tokens = mx.array([*request.prompt, *request.output_tokens])
    if not request.num_pending:
        return tokens
    pending = before.tokens[before.sampling.index(request)]
    return mx.concatenate([tokens, pending[None].astype(tokens.dtype)])


def _window(layer: int, cache) -> int | None:
    """How many tokens a layer attends to, None for all, by the type of its cache."""
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
    shapes = [LayerShape(c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for c in caches]
    return shapes, dtypes.pop()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error))}"
