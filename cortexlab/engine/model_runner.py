"""The model over an arena: whether and how it can be run, and a step from chunks to tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import accumulate, repeat, takewhile

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_caches
from mlx_lm.models.cache import make_prompt_cache

from ..allocators import Strategy, strategy_of
from ..errors import MAX_COUNT, BadInput, ModelError, is_own, named, reason_of
from ..host.models import model_limits
from ..options import DEFAULT_STEP_TOKENS, EngineOptions
from ..scheduler.block_table import BlockTable
from ..scheduler.layer_groups import LayerGroup, layer_groups
from ..scheduler.request import Request
from ..scheduler.scheduler import Chunk, Schedule
from .arena import Arena, LayerShape, slot_bytes
from .attention import WINDOW, Plan, RowRun
from .kv_cache import KVCache
from .mlx_lm_hook import (
    LayerCache,
    WholeCache,
    WindowCache,
    attention_modules,
    filled,
    over_extents,
    parted,
    states_of,
    with_last_rows,
)
from .sampler import Choice

TOLERANCE, TOLERANCE_16_BIT = 1e-3, 5e-2  # of the largest logit
NOT_FINITE = "its logits are not finite: no token can be chosen"
# Tokens copied by relocation and compaction between two steps (the last copy may overshoot):
# 100 MB of SmolLM2-135M in float32, 0.1 s.
MAX_MOVED_TOKENS = 2048
PROBE = [0, 1, 2, 2, 1], [1, 2, 0, 1]  # two short sequences


class Batching(StrEnum):
    """What one call of the model takes, best first. ``DECODES``: for layers with states. ``ONE``:
    for an attention or positions of the model's own, K and V given whole.
    """

    ALL = "all sequences of a step at once"
    DECODES = "decode rows at once, each prompt alone"
    ONE = "one sequence after the other"


@dataclass(slots=True)
class Flight:
    """A step that is planned or launched, and has not landed."""

    sampling: list[Request]  # requests that get a token
    pending: list[int | None]  # of each, the place of its last token in the flight before
    rows: list[list[RowRun]]  # by group of layers
    ends: list[int]  # rows after which a token is sampled
    inputs: mx.array  # a token a row
    num_decode: int  # rows of the last output token; all others are prefill
    num_prefill: int
    is_careful: bool  # no row reads a slot of another sequence
    tokens: mx.array | None = None  # [len(sampling)]
    found: mx.array | None = None  # the tokens; -1 where logits are not finite
    choices: dict[Request, Choice] = field(default_factory=dict)  # other than the largest logit
    errors: dict[Request, str] = field(default_factory=dict)  # why a request could get no token
    planning_s: float = 0.0  # of the host, for row runs and attention plans

    def error(self, request: Request, token: int, vocabulary: int) -> str | None:
        """Why a landed token of finite logits cannot be used."""
        choice, error = self.choices.get(request), self.errors.get(request)
        if choice is not None and not choice.finite.item():
            return NOT_FINITE
        if error is None and token >= vocabulary:
            return f"it was given token {token}, but tokens go up to {vocabulary - 1}"
        return error


class ModelRunner:
    """Runs the rows of a step through one model over an arena, for one or several engines.

    - ``layers``: shape of each layer's K and V; ``windows``: how many tokens each attends to, None
      for all; ``dtype`` of K and V; ``context`` and ``vocabulary`` in tokens.
    - ``way``: what one call of the model takes.

    `ModelError` for a model that gives its own logits in no way.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.context, self.vocabulary = model_limits(model)
        self._modules = attention_modules(model)
        caches, self._like = make_prompt_cache(model), make_prompt_cache(model)
        kv, states = parted(caches)
        self._states = [layer for layer, _ in states]  # layers that keep one
        self.windows = [_window(layer, cache) for layer, cache in kv]
        first, second = (mx.array([tokens]) for tokens in PROBE)
        try:
            alone = model(first, cache=caches)[0], model(second, cache=make_prompt_cache(model))[0]
            reference = mx.concatenate(alone)
            mx.eval(reference)
        except Exception as error:
            raise ModelError(f"mlx-lm itself cannot run this model here: {named(error)}") from error
        if not _can_choose(reference).all().item():
            raise ModelError("the logits of this model are not finite: see its weights")
        self.layers, self.dtype = _shapes(kv, reference.dtype)
        self._groups = layer_groups(self.windows)
        self._places = {
            layer: (group, array)
            for group, (layers, _, _) in enumerate(self._groups)
            for array, layer in enumerate(layers)
        }
        # Best first: many sequences in one call, the head on the rows that are sampled.
        ways = (Batching.DECODES if self._states else Batching.ALL), Batching.ONE
        for self.way in ways:
            for self._heads_last_rows in (True, False):
                if (reason := self._error(reference)) is None:
                    return
        raise ModelError(reason)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return slot_bytes(self.layers, self.dtype)

    def groups(
        self, strategy: Strategy | None = None, prefix_caching: bool = False
    ) -> tuple[LayerGroup, ...]:
        """Groups of the layers with K and V. One, of which windows keep every block: where shapes
        differ, where sequences take turns, and with prefix caching where no front is given back.
        """
        keeps_all = self.way is Batching.ONE or (prefix_caching and not strategy.gives_front)
        keeps_all |= len({*self.layers}) > 1
        every = LayerGroup(tuple(range(len(self.layers))), len(self.layers))
        return (every,) if keeps_all else self._groups

    def longest(self, options: EngineOptions) -> int:
        """Tokens of the longest sequence: the model's context, or the pool where that is smaller
        and a layer keeps all tokens.
        """
        pool = options.num_blocks * options.block_size
        keeps_all = None in (group.window for group in self.groups())
        return min(self.context, pool if keeps_all else MAX_COUNT)

    def new_cache(self, options: EngineOptions, max_seq_len: int) -> KVCache:
        """The cache of an engine with ``options``."""
        self._check_prefix_caching(options.prefix_caching)
        strategy = strategy_of(options.strategy, options.growth)
        groups = self.groups(strategy, options.prefix_caching)
        return KVCache(
            self.block_layers(groups), strategy, options.num_blocks, options.block_size,
            dtype=self.dtype, max_seq_len=max_seq_len, prefix_caching=options.prefix_caching,
            swap_blocks=options.num_swap_blocks, max_moved_tokens=MAX_MOVED_TOKENS, groups=groups,
            max_chunk=options.step_tokens(DEFAULT_STEP_TOKENS),
        )  # fmt: skip

    def block_layers(self, groups: Sequence[LayerGroup]) -> list[LayerShape]:
        """Shapes of the K and V that a block has room for."""
        return self.layers if len(groups) == 1 else self.layers[: groups[0].size]

    def _check_prefix_caching(self, wanted: bool) -> None:
        """`BadInput` where layers have a state: only that after the last token is known."""
        if wanted and self._states:
            raise BadInput(
                "prefix_caching does not support layers with a state yet, and layer "
                f"{self._states[0]} uses ArraysCache"
            )

    def plan(self, step: Schedule, before: Flight | None = None) -> Flight:
        """A flight of integers, ready for `launch`. ``before``: the flight whose tokens are not
        read yet.
        """
        started_at = time.perf_counter()
        chunks = step.chunks
        place = {request: i for i, request in enumerate(before.sampling)} if before else {}
        lasts = list(accumulate(chunk.num_rows for chunk in chunks))
        sampled = [pair for pair in zip(chunks, lasts, strict=True) if pair[0].samples]
        sampling = [chunk.request for chunk, _ in sampled]
        pending = [place[each] if each.num_pending else None for each in sampling]
        rows = [
            [_rows_of(chunk, part) for chunk, part in zip(chunks, parts, strict=True)]
            for parts in zip(*(chunk.request.table.parts for chunk in chunks), strict=True)
        ]
        planning_s = time.perf_counter() - started_at
        ends = [last - 1 for _, last in sampled]
        tokens = [
            token for chunk in chunks for token in chunk.request.tokens(chunk.start, chunk.stop)
        ]
        inputs = mx.array(tokens, dtype=mx.uint32)
        if unread := [(end, at) for end, at in zip(ends, pending, strict=True) if at is not None]:
            of_rows, at = (mx.array(each) for each in zip(*unread, strict=True))
            inputs[of_rows] = before.tokens[at]
        for request in sampling:
            request.num_pending += 1
        num_decode = sum(chunk.stop > len(chunk.request.prompt) for chunk in step.decode)
        return Flight(
            sampling, pending, rows, ends, inputs, num_decode, lasts[-1] - num_decode,
            any(chunk.request.is_careful for chunk in chunks),
            planning_s=planning_s,
        )  # fmt: skip

    def launch(
        self, flight: Flight, arena: Arena, method: str, before: Flight | None = None
    ) -> None:
        """Build the flight's graph, choose its tokens, and start it all."""
        started_at = time.perf_counter()
        plans = self.plans(flight.rows, arena, "views" if flight.is_careful else method)
        flight.planning_s += time.perf_counter() - started_at
        logits = self.logits(plans, flight.inputs, flight.ends)
        if logits is None:  # only parts of prompts
            mx.async_eval(arena.arrays())
            return
        _choose(flight, logits, before)
        choices = (array for choice in flight.choices.values() for array in choice.arrays())
        mx.async_eval(flight.tokens, flight.found, *choices, arena.arrays())

    def plans(self, rows: Sequence[list[RowRun]], arena: Arena, method: str) -> list[list[Plan]]:
        """For each call of the model, a plan for each group of layers. A prompt's first token has
        no state to go on from: it is not among `Batching.DECODES`.
        """
        count, first = len(rows[0]), 0
        if self.way is Batching.ALL:
            first = count
        elif self.way is Batching.DECODES:
            first = sum(1 for _ in takewhile(lambda row: row.num_rows == 1 and row.start, rows[0]))
        calls = [(0, first)] if first else []
        calls += [(i, i + 1) for i in range(first, count)]
        method = "views" if self.way is Batching.ONE else method
        return [[Plan(each[a:b], arena, method) for each in rows] for a, b in calls]

    def logits(
        self, plans: Sequence[list[Plan]], tokens: mx.array, ends: Sequence[int]
    ) -> mx.array | None:
        """``[len(ends), vocabulary]`` logits after the rows numbered ``ends``, not evaluated yet;
        None when ``ends`` is empty. ``tokens``: one a row, all sequences' one after the other.
        """
        if len(plans) == 1:
            return self._run(plans[0], tokens, ends)
        found, first = [], 0
        for of_groups in plans:
            plan = of_groups[0]
            if first:  # evaluated before the next one writes, which would copy an array still held
                mx.eval(plan.arena.arrays(), found[-1:])
            stop = first + plan.num_rows
            own = [end - first for end in ends if first <= end < stop]
            logits = self._run(of_groups, tokens[first:stop], own)
            found += [] if logits is None else [logits]
            first = stop
        return mx.concatenate(found) if found else None

    def _run(self, plans: list[Plan], tokens: mx.array, ends: Sequence[int]) -> mx.array | None:
        plan = plans[0]
        inputs = tokens[None] if plan.single else tokens[:, None]
        rows = mx.array(list(ends) or [0])
        # Wrapped anew, so that a module replaced since the last step is used.
        model = with_last_rows(self.model, rows) if self._heads_last_rows else self.model
        caches = self._caches(plans)
        logits = over_extents(self._modules, partial(model, inputs, cache=caches))
        if self._states:
            plan.arena.states.put(plan.rows, states_of(caches))
        if not ends:  # only parts of prompts: the head is never evaluated
            return None
        logits = logits.reshape(-1, logits.shape[-1])
        return logits if model is not self.model else logits[rows]

    def _caches(self, plans: list[Plan]) -> list:
        plan, kv = plans[0], []
        for layer, window in enumerate(self.windows):
            group, array = self._places[layer] if len(plans) > 1 else (0, layer)
            if self.way is not Batching.ONE:
                kv.append(LayerCache(plans[group], array, window, layer, len(plans) > 1))
            elif window is None:
                kv.append(WholeCache(plan, layer))
            else:
                kv.append(WindowCache(plan, layer, window))
        states = plan.arena.states.take(plan.rows) if self._states else None
        return filled(self._like, iter(kv), repeat(None) if states is None else iter(states))

    def _error(self, reference: mx.array) -> str | None:
        """Why this way will not do; None when it gives the ``reference`` for a prompt alone, a
        token beside a prompt, two tokens of two sequences, and a token alone.
        """
        (first, second), groups = PROBE, self.groups()
        arena = Arena(self.block_layers(groups), WINDOW + 32 * len(groups), self.dtype)

        def run(sequence: int, start: int, stop: int, at: int) -> RowRun:
            scattered = [(at + 3, at + 5), (at + WINDOW + 5, at + WINDOW + 3 + stop)]
            runs = [(at + 20, at + 20 + stop)] if sequence else scattered
            return RowRun(start, stop - start, runs, sequence)

        steps = [
            ([(0, 0, 3)], first[:3]),
            ([(0, 3, 4), (1, 0, 2)], first[3:4] + second[:2]),
            ([(0, 4, 5), (1, 2, 3)], first[4:] + second[2:3]),
            ([(1, 3, 4)], second[3:]),
        ]
        reference = reference[mx.array([0, 1, 2, 3, 5, 6, 4, 7, 8])]  # in the order of the steps
        try:
            ours = []
            for each, tokens in steps:
                rows = [[run(*row, 32 * group) for row in each] for group in range(len(groups))]
                plans = self.plans(rows, arena, "auto")
                ours.append(self.logits(plans, mx.array(tokens), range(len(tokens))))
            ours = mx.concatenate(ours)
            finite = mx.isfinite(reference)  # some models never say some tokens
            gaps = mx.abs(mx.where(finite, ours - reference, 0))
            worst = mx.where(finite == mx.isfinite(ours), gaps, mx.inf).max().item()
            worst /= max(mx.where(finite, mx.abs(reference), 0).max().item(), 1e-30)
        except ModelError as error:
            return str(error)
        except Exception as error:
            return f"this model's attention cannot read from extents: {named(error)}"
        if not worst <= (TOLERANCE if self.dtype == mx.float32 else TOLERANCE_16_BIT):
            return (
                "this model gives other logits over extents than by itself (relative difference "
                f"{worst:.1e})"
            )
        return None


def _choose(flight: Flight, logits: mx.array, before: Flight | None) -> None:
    """A token for each row of ``[len(flight.sampling), vocabulary]``, or why there is none."""
    flight.tokens = mx.argmax(logits, axis=-1).astype(mx.uint32)
    places, tokens = [], []
    for i, (request, at) in enumerate(zip(flight.sampling, flight.pending, strict=True)):
        chooser = request.chooser
        if chooser.plain:
            continue
        last = before.choices.get(request) if at is not None else None
        history = None
        if chooser.wants_tokens:
            history = mx.array([*request.prompt, *request.output_tokens], mx.int32)
            if at is not None:
                last_token = before.tokens[at : at + 1].astype(mx.int32)
                history = mx.concatenate([history, last_token])
        try:
            choice = chooser(history, logits[i : i + 1], last.state if last else chooser.state)
        except BadInput as error:
            flight.errors[request] = reason_of(error)
        except BaseException as error:
            if not is_own(error):
                raise
            flight.errors[request] = f"its sampler or logits processor raised {named(error)}"
        else:
            flight.choices[request] = choice
            places.append(i)
            tokens.append(choice.token)
    if places:
        flight.tokens[mx.array(places)] = mx.concatenate(tokens)
    flight.found = mx.where(_can_choose(logits), flight.tokens.astype(mx.int32), -1)


def _can_choose(logits: mx.array) -> mx.array:
    """Of each row, whether it has a largest logit, and no NaN: some models give -inf to tokens that
    they never say.
    """
    return mx.isfinite(mx.max(logits, axis=-1))  # with a NaN, the largest is NaN


def _window(layer: int, cache) -> int | None:
    """How many tokens a layer attends to, None for all, by the type of its cache."""
    if type(cache) is mlx_lm_caches.KVCache:
        return None
    if type(cache) is mlx_lm_caches.RotatingKVCache and cache.keep == 0:
        return cache.max_size
    raise ModelError(
        f"layer {layer} uses {type(cache).__name__}: only models whose layers all use KVCache, "
        "RotatingKVCache or ArraysCache, or a CacheList of these, can be run"
    )


def _rows_of(chunk: Chunk, part: BlockTable) -> RowRun:
    runs = list(part.runs(0, chunk.stop - part.skipped))
    return RowRun(chunk.start, chunk.num_rows, runs, chunk.request)


def _shapes(kv: list[tuple], default: mx.Dtype) -> tuple[list[LayerShape], mx.Dtype]:
    """The shape of each layer's K and V, and their type, from caches that have seen tokens."""
    for layer, cache in kv:
        if cache.keys is None:
            raise ModelError(f"layer {layer} never uses its {type(cache).__name__}")
    dtypes = {array.dtype for _, cache in kv for array in (cache.keys, cache.values)} or {default}
    if len(dtypes) > 1:
        raise ModelError("K and V of this model have several types, which cannot share one arena")
    shapes = [LayerShape(c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for _, c in kv]
    return shapes, dtypes.pop()
