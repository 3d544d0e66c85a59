"""mlx-lm unchanged, measured with this package's clock and metrics: `BatchGenerator`, and
`generate_step` for one request after the other.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, StopSequences, generate_step
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from ..errors import ModelError
from ..scheduler.request import Request, RequestState

# tokens: MLX's CPU attention writes out every score, so short chunks take less time and memory
PREFILL_CHUNK = 256


@dataclass(frozen=True, slots=True)
class CacheUse:
    """mlx-lm's KV memory after one of its steps: bytes of its arrays, and the tokens in them."""

    started_at: float
    ended_at: float
    num_running: int
    num_waiting: int
    nbytes: int
    num_tokens: int


def run_batch_generator(
    model: nn.Module,
    requests: Sequence[Request],
    batch_size: int,
    on_step: Callable[[CacheUse], None],
    shared_tokens: Mapping[str, int],
) -> Iterator[Request]:
    """Serve ``requests`` (in order of arrival, times on `time.perf_counter`) with at most
    ``batch_size`` decoded at once; yield each that ends.

    Two things in mlx-lm would exceed the limit. Its constructor raises it to
    ``prefill_batch_size``, which is therefore capped. And it takes in new prompts without counting
    those it is still prefilling, so a request is inserted as it arrives, but not before fewer than
    ``batch_size`` are under way.

    ``shared_tokens``: how many of a request's first tokens other requests have too. They are
    computed once, when the first needs them, and then come from mlx-lm's own `LRUPromptCache`.
    """
    prefixes = SharedPrefixes(model, len(requests), shared_tokens)
    batch = _Batch(model, batch_size, prefixes)
    coming = list(requests)[::-1]
    try:
        while coming or batch.live:
            started_at = time.perf_counter()
            while coming and coming[-1].arrived_at <= started_at and len(batch.live) < batch_size:
                batch.insert(coming.pop())
            if not batch.live:
                time.sleep(max(0.0, coming[-1].arrived_at - time.perf_counter()))
                continue
            progressed = batch.generator.next()
            now = time.perf_counter()
            ended = batch.record(*progressed, started_at, now)
            num_waiting = sum(request.arrived_at <= now for request in coming)
            on_step(batch.use(started_at, now, num_waiting))
            yield from ended
    finally:
        batch.generator.close()


class _Batch:
    """A `BatchGenerator` and the requests in it."""

    def __init__(self, model: nn.Module, batch_size: int, prefixes: "SharedPrefixes"):
        self.generator = BatchGenerator(
            model, completion_batch_size=batch_size, prefill_batch_size=min(8, batch_size)
        )
        self.prefixes = prefixes
        self.live: dict[int, Request] = {}  # by mlx-lm's number of it
        self.in_cache: dict[int, int] = {}  # tokens in the cache, of each that has begun

    def insert(self, request: Request) -> None:
        prompt, cache = self.prefixes.begin(request)
        (uid,) = self.generator.insert(
            [prompt],
            max_tokens=[request.max_tokens],
            caches=[cache],
            stop_sequences=[StopSequences([[token] for token in sorted(request.stop_token_ids)])],
        )
        self.live[uid] = request

    def record(self, prompts, responses, started_at: float, now: float) -> list[Request]:
        """Write a step's progress into the requests; those that ended."""
        ended = []
        for progress in prompts:
            request = self.live[progress.uid]
            self.in_cache[progress.uid] = request.cached_tokens + progress.progress[0]
            if request.state is RequestState.PENDING:
                request.state, request.scheduled_at = RequestState.PREFILLING, started_at
        for response in responses:
            request = self.live[response.uid]
            request.state = RequestState.DECODING
            request.output_tokens.append(response.token)
            request.token_times.append(now)
            self.in_cache[response.uid] = request.num_tokens
            if response.finish_reason:
                _finish(request, response.finish_reason)
                ended.append(request)
                del self.live[response.uid], self.in_cache[response.uid]
        return ended

    def use(self, started_at: float, ended_at: float, num_waiting: int) -> CacheUse:
        nbytes = self.generator.prompt_cache_nbytes + self.prefixes.nbytes
        num_tokens = sum(self.in_cache.values())
        return CacheUse(started_at, ended_at, len(self.in_cache), num_waiting, nbytes, num_tokens)


def run_one_by_one(
    model: nn.Module,
    requests: Sequence[Request],
    on_step: Callable[[CacheUse], None],
    shared_tokens: Mapping[str, int],
) -> Iterator[Request]:
    """Serve ``requests`` one after the other with `generate_step`; yield each that ends.
    ``shared_tokens``: as for `run_batch_generator`.
    """
    prefixes = SharedPrefixes(model, len(requests), shared_tokens)
    for index, request in enumerate(requests):
        time.sleep(max(0.0, request.arrived_at - time.perf_counter()))
        started_at = request.scheduled_at = time.perf_counter()
        prompt, cache = prefixes.begin(request)
        cache = cache or make_prompt_cache(model)
        for token, _ in generate_step(
            mx.array(prompt), model, max_tokens=request.max_tokens, prompt_cache=cache
        ):
            now = time.perf_counter()
            request.output_tokens.append(int(token))
            request.token_times.append(now)
            waiting = sum(other.arrived_at <= now for other in requests[index + 1 :])
            on_step(
                CacheUse(started_at, now, 1, waiting, sum(c.nbytes for c in cache), cache[0].offset)
            )
            started_at = now
            if int(token) in request.stop_token_ids:
                break
        stopped = request.output_tokens[-1] in request.stop_token_ids
        _finish(request, "stop" if stopped else "length")
        yield request


def _finish(request: Request, reason: str) -> None:
    request.state, request.finish_reason = RequestState.FINISHED, reason
    request.finished_at = request.token_times[-1]


class SharedPrefixes:
    """mlx-lm's `LRUPromptCache` of the first tokens that requests share, filled when a request
    needs them. ``shared_tokens``: their number, by request id.
    """

    def __init__(self, model: nn.Module, max_size: int, shared_tokens: Mapping[str, int]):
        self._model, self._shared_tokens = model, shared_tokens
        self._kept = LRUPromptCache(max_size=max_size)

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def begin(self, request: Request) -> tuple[list[int], list | None]:
        """The rest of the prompt, to be computed, and a cache of the shared tokens before it; None
        where none are shared. Sets ``cached_tokens``.
        """
        prompt = list(request.prompt)
        num_shared = min(self._shared_tokens.get(request.id, 0), len(prompt) - 1)
        request.cached_tokens = num_shared
        return prompt[num_shared:], self._behind(prompt[:num_shared])

    def _behind(self, tokens: list[int]) -> list | None:
        """A copy of the cache behind ``tokens``; None for no tokens."""
        if not tokens:
            return None
        cache, rest = self._kept.fetch_nearest_cache("", tokens)
        if not rest:
            return cache
        cache = make_prompt_cache(self._model) if cache is None else cache
        _prefill(self._model, rest, cache)
        self._kept.insert_cache("", tokens, cache)
        return self._kept.fetch_nearest_cache("", tokens)[0]


def _prefill(model: nn.Module, tokens: Sequence[int], cache: list) -> None:
    for start in range(0, len(tokens), PREFILL_CHUNK):
        model(mx.array(tokens[start : start + PREFILL_CHUNK])[None], cache=cache)
        mx.eval([c.state for c in cache])


@dataclass(frozen=True, slots=True)
class Difference:
    """The gap between the reference's two best logits where an output parts from it, and the
    largest gap that counts as a tie.
    """

    gap: float
    tie_limit: float

    @property
    def near_tie(self) -> bool:
        return self.gap <= self.tie_limit


def first_difference(
    model: nn.Module, prompt: Sequence[int], output: Sequence[int]
) -> Difference | None:
    """The first difference of ``output`` from greedy decoding of the unmodified model; None where
    there is none.

    The model reads prompt and output in one forward over mlx-lm's own cache ("teacher forcing"), so
    up to the first difference it decides on the tokens that step-by-step generation feeds it. A tie
    is a gap of at most 1e-3 in float32, of ``2 * eps * max|logit|`` in 16-bit types. `ModelError`
    where its own logits are no numbers to choose by.
    """
    cache = make_prompt_cache(model)
    _prefill(model, prompt[:-1], cache)
    logits = model(mx.array([prompt[-1], *output[:-1]])[None], cache=cache)[0]
    # NaN or +inf anywhere in a row, or nothing but -inf, make the sum no number.
    broken = ~mx.isfinite(mx.logsumexp(logits, axis=-1))
    if mx.any(broken).item():
        raise ModelError(
            "this model's own logits are NaN, infinite, or all -inf, at output token "
            f"{mx.argmax(broken).item()}: there is no choice of its own to compare with"
        )
    for position, (token, expected) in enumerate(
        zip(output, mx.argmax(logits, axis=-1).tolist(), strict=True)
    ):
        if token != expected:
            row = logits[position].astype(mx.float32)
            low, high = sorted(mx.topk(row, 2).tolist())
            limit = (
                1e-3
                if logits.dtype == mx.float32
                else 2 * mx.finfo(logits.dtype).eps * mx.abs(row).max().item()
            )
            return Difference(high - low, limit)
    return None
