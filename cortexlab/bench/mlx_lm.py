"""mlx-lm as it is, measured with the same clock and the same words: `BatchGenerator`, and
`generate_step` one after the other.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

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
    clock=time.perf_counter,
    shared_tokens: Mapping[str, int] | None = None,
) -> Iterator[Request]:
    """Serve ``requests`` (in order of arrival, times on ``clock``) with at most ``batch_size``
    decoded at once; yield each that ends.

    Two things in mlx-lm would exceed the limit. Its constructor raises it to
    ``prefill_batch_size``, which is therefore capped. And it takes in new prompts without counting
    those it is still prefilling, so a request is inserted as it arrives, but not before fewer than
    ``batch_size`` are under way.

    ``shared_tokens``: how many of a request's first tokens other requests have too. They are
    computed once, when the first needs them, and then come from mlx-lm's own `LRUPromptCache`.
    """
    prompts_cache = PromptCache(model, len(requests)) if shared_tokens is not None else None
    generator = BatchGenerator(
        model, completion_batch_size=batch_size, prefill_batch_size=min(8, batch_size)
    )
    coming, live, in_cache = list(requests)[::-1], {}, {}
    try:
        while coming or live:
            started_at = clock()
            while coming and coming[-1].arrived_at <= started_at and len(live) < batch_size:
                request = coming.pop()
                stops = [[token] for token in sorted(request.stop_token_ids)]
                options = {"stop_sequences": [_stop_sequences(stops)]} if stops else {}
                prompt = list(request.prompt)
                if prompts_cache:
                    num_shared = request.cached_tokens = min(
                        shared_tokens.get(request.id, 0), len(prompt) - 1
                    )
                    prompt, options["caches"] = (
                        prompt[num_shared:],
                        [prompts_cache.behind(prompt[:num_shared])],
                    )
                (uid,) = generator.insert([prompt], max_tokens=[request.max_tokens], **options)
                live[uid] = request
            if not live:
                time.sleep(max(0.0, coming[-1].arrived_at - clock()))
                continue
            prompts, generated = generator.next()
            now = clock()
            ended = []
            for progress in prompts:
                request = live[progress.uid]
                in_cache[progress.uid] = request.cached_tokens + progress.progress[0]
                if request.state is RequestState.PENDING:
                    request.state, request.scheduled_at = RequestState.PREFILLING, started_at
            for response in generated:
                request = live[response.uid]
                request.state = RequestState.DECODING
                request.output_tokens.append(response.token)
                request.token_times.append(now)
                in_cache[response.uid] = request.num_tokens
                if response.finish_reason:
                    request.state, request.finish_reason, request.finished_at = (
                        RequestState.FINISHED,
                        response.finish_reason,
                        now,
                    )
                    ended.append(request)
                    del live[response.uid], in_cache[response.uid]
            waiting = sum(request.arrived_at <= now for request in coming)
            nbytes = generator.prompt_cache_nbytes + (prompts_cache.nbytes if prompts_cache else 0)
            on_step(
                CacheUse(started_at, now, len(in_cache), waiting, nbytes, sum(in_cache.values()))
            )
            yield from ended
    finally:
        generator.close()


def run_one_by_one(
    model: nn.Module,
    requests: Sequence[Request],
    on_step: Callable[[CacheUse], None],
    clock=time.perf_counter,
    shared_tokens: Mapping[str, int] | None = None,
) -> Iterator[Request]:
    """Serve ``requests`` one after the other with `generate_step`; yield each that ends.
    ``shared_tokens`` as above.
    """
    prompts_cache = PromptCache(model, len(requests)) if shared_tokens is not None else None
    for index, request in enumerate(requests):
        time.sleep(max(0.0, request.arrived_at - clock()))
        started_at = request.scheduled_at = clock()
        prompt, cache = list(request.prompt), None
        if prompts_cache:
            num_shared = request.cached_tokens = min(
                shared_tokens.get(request.id, 0), len(prompt) - 1
            )
            prompt, cache = prompt[num_shared:], prompts_cache.behind(prompt[:num_shared])
        cache = cache or make_prompt_cache(model)
        for token, _ in generate_step(
            mx.array(prompt), model, max_tokens=request.max_tokens, prompt_cache=cache
        ):
            now = clock()
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
        request.state, request.finish_reason = (
            RequestState.FINISHED,
            "stop" if stopped else "length",
        )
        request.finished_at = request.token_times[-1]
        yield request


class PromptCache:
    """mlx-lm's `LRUPromptCache`, filled as prefixes are asked for."""

    def __init__(self, model: nn.Module, max_size: int):
        self._model, self._kept = model, LRUPromptCache(max_size=max_size)

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def behind(self, tokens: list[int]) -> list | None:
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
    """Where an output parts from the reference: the gap of the reference's two best logits, and up
    to which gap that is a tie.
    """

    position: int
    gap: float
    tie_limit: float

    @property
    def near_tie(self) -> bool:
        return self.gap <= self.tie_limit


def first_difference(
    model: nn.Module, prompt: Sequence[int], output: Sequence[int]
) -> Difference | None:
    """Where greedy decoding of the unmodified model first chooses otherwise than ``output``; None
    when it never does.

    The model reads prompt and output in one forward over mlx-lm's own cache ("teacher forcing"), so
    up to the first difference it decides on the very tokens that step-by-step generation would have
    fed it. A tie is a gap of at most 1e-3 in float32, of ``2 * eps * max|logit|`` in 16-bit types.
    """
    cache = make_prompt_cache(model)
    _prefill(model, prompt[:-1], cache)
    logits = model(mx.array([prompt[-1], *output[:-1]])[None], cache=cache)[0]
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
            return Difference(position, high - low, limit)
    return None


def _stop_sequences(stops: list[list[int]]):
    from mlx_lm.generate import StopSequences

    return StopSequences(stops)
