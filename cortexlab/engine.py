"""The engine: continuous batching of an unmodified mlx-lm model over a `KVCache`.

A step is: schedule, run, sample, deliver. Its rows are tokens: those of decoding sequences and of prompts in any mixture, fed to
the model as a batch ``[rows, 1]`` with each row's own position, so matrix products see all of them at once and nothing is padded.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .allocators import Allocator, Stats
from .attention import Plan, RowRun, check_method
from .block_manager import BlockTable
from .driving import check_exact, kv_shape
from .errors import BadInput, at_least, shown
from .hook import LayerCache, attention_modules, attention_over_extents, with_last_rows
from .kv_cache import KVCache
from .model import model_limits
from .request import Request, RequestState, TokenEvent
from .scheduler import WATERMARK, Chunk, Scheduler

DEFAULT_STEP_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Held:
    """What one sequence held during a step. ``table`` has the tokens the sequence ended with, once it has."""

    request_id: str
    table: BlockTable
    extents: tuple
    num_slots: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it was run; times are seconds on the engine's clock."""

    started_at: float
    ended_at: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    unusable_slots: int
    pool: Stats
    copied_bytes: int
    held: tuple[Held, ...]


class Engine:
    """Serves requests on ``num_blocks`` blocks of ``block_size`` slots.

    - ``strategy``, ``growth``: as `KVCache`. ``max_seq_len``: longest prompt + output a request may have, and the region of
      ``static`` (default: the model's context, or the pool where that is smaller).
    - ``max_batch_size`` requests run at once; a step computes at most ``max_step_tokens`` tokens (default: 512, or the batch size
      where that is more), prompts in chunks if need be.
    - ``oom_policy``: ``wait``, ``fail`` or ``preempt``; ``watermark``: the share of the pool kept free for growth (`Scheduler`).
    - ``attention``: ``views``, ``windows``, ``gather`` (`cortexlab.attention`), or ``auto``, the default: windows from eight
      decoding sequences on or where one lies in several extents, else views.
    - ``on_step`` is called with a `StepRecord` after every step; ``clock`` gives seconds.

    Greedy decoding: the tokens are those of `mlx_lm.generate.generate_step`, whatever the strategy. Raises `ModelError` for a
    model that cannot be driven exactly (a few tokens are tried), `BadInput` for an argument that makes no sense.

    When a step raises, the error is passed on, and everything that was running is computed again from its tokens by later steps.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int,
        block_size: int = 16,
        strategy: str | Callable[[int], Allocator] = "paged",
        growth: str | None = None,
        max_batch_size: int = 16,
        max_seq_len: int | None = None,
        max_step_tokens: int | None = None,
        oom_policy: str = "wait",
        watermark: float = WATERMARK,
        attention: str = "auto",
        on_step: Callable[[StepRecord], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        at_least("num_blocks", num_blocks, 1)
        at_least("block_size", block_size, 1)
        context, self.vocabulary = model_limits(model)
        self.max_seq_len = min(context, num_blocks * block_size) if max_seq_len is None else at_least("max_seq_len", max_seq_len, 1)
        self.num_layers, num_kv_heads, head_dim, dtype = kv_shape(model)
        self.cache = KVCache(
            self.num_layers, num_kv_heads, head_dim, num_blocks * block_size, block_size, strategy,
            growth=growth, max_seq_len=self.max_seq_len, dtype=dtype,
        )  # fmt: skip
        check_method(attention, self.cache.arena)
        at_least("max_batch_size", max_batch_size, 1)
        step_tokens = max(DEFAULT_STEP_TOKENS, max_batch_size) if max_step_tokens is None else max_step_tokens
        self.scheduler = Scheduler(
            self.cache.blocks, max_batch_size=max_batch_size, max_step_tokens=step_tokens, oom_policy=oom_policy, watermark=watermark
        )  # fmt: skip
        self.attention = attention
        self.clock = clock
        self.requests: dict[str, Request] = {}  # not ended yet
        self._model, self._last_rows = with_last_rows(model)
        self._modules = attention_modules(model)
        check_exact(model, self.cache.arena)
        self._on_step = on_step
        self._pending_events: list[TokenEvent] = []
        self._num_submitted = 0
        self._started_at: float | None = None
        self._num_steps = self._num_prefill_tokens = self._num_decode_tokens = 0

    # --- requests -------------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int = 256,
        *,
        stop_token_ids: Sequence[int] = (),
        request_id: str | None = None,
        arrived_at: float | None = None,
    ) -> Request:
        """Queue a request. `BadInput` when the prompt is empty or holds what is no token, or when it could never fit."""
        request = Request(
            id=self._new_id() if request_id is None else request_id,
            prompt=self._tokens("prompt", prompt),
            max_tokens=at_least("max_tokens", max_tokens, 1),
            stop_token_ids=frozenset(self._tokens("stop_token_ids", stop_token_ids)),
            arrived_at=self.clock() if arrived_at is None else arrived_at,
        )
        self._check(request)
        self.requests[request.id] = request
        self.scheduler.add(request)
        return request

    def cancel(self, request_id: str) -> bool:
        """End a request now; its blocks are free at once. False when no such request is under way."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self.scheduler.remove(request)
        self._end(request, RequestState.CANCELLED, "cancelled")
        self._pending_events.append(TokenEvent(request_id, None, "cancelled"))
        return True

    def run(self) -> Iterator[TokenEvent]:
        """Step until every request has ended, yielding each token as it comes."""
        while self.requests or self._pending_events:
            yield from self.step()

    def step(self) -> list[TokenEvent]:
        """Run one step and return what it delivered; nothing to do returns at once."""
        started_at = self.clock()
        if self._started_at is None:
            self._started_at = started_at
        events, self._pending_events = self._pending_events, []
        step = self.scheduler.schedule(started_at)
        for request in step.failed:
            self._end(request, RequestState.FAILED, "error")
            events.append(TokenEvent(request.id, None, "error"))
        if not step.chunks:
            return events
        chunks = sorted(step.chunks, key=lambda chunk: chunk.stop - chunk.start > 1)  # decode rows first, as `Plan` wants them
        held = self._held() if self._on_step else ()
        running, pool = len(self.scheduler.running), self.cache.blocks.stats() if self._on_step else None
        try:
            self.cache.make_moves()
            tokens = self._forward(chunks)
        except BaseException:
            self._recover(events)
            raise
        now = self.clock()
        for chunk in chunks:
            chunk.request.num_computed = chunk.stop
        sampling = [chunk.request for chunk in chunks if chunk.samples]
        num_decode = sum(chunk.stop - chunk.start == 1 and bool(chunk.request.output_tokens) for chunk in chunks)
        num_prefill = sum(chunk.stop - chunk.start for chunk in chunks) - num_decode
        for request, token in zip(sampling, tokens, strict=True):
            events.append(self._deliver(request, token, now))
        self._num_steps += 1
        self._num_prefill_tokens += num_prefill
        self._num_decode_tokens += num_decode
        if self._on_step:
            unusable = step.unusable_blocks * self.cache.blocks.block_size
            waiting, copied = len(self.scheduler.waiting), self.cache.arena.copied_bytes
            self._on_step(
                StepRecord(started_at, now, num_prefill, num_decode, running, waiting, unusable, pool, copied, held)
            )  # fmt: skip
        return events

    def stats(self) -> Stats:
        """The cache's statistics; queue, preemptions and tokens so far; tokens a second since the first step."""
        elapsed = self.clock() - self._started_at if self._started_at is not None else math.nan
        return Stats(
            self.cache.stats(),
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self.scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            decode_tokens_per_s=self._num_decode_tokens / elapsed if elapsed > 0 else None,
            prefix_hit_rate=None,  # no prefix cache yet: does not apply
        )

    # --- one step -------------------------------------------------------------------------------------------------------------

    def _forward(self, chunks: list[Chunk]) -> list[int]:
        """Run the chunks through the model; the sampled token of each that reaches its end, in order."""
        tables = self.cache.blocks.tables
        rows = [RowRun(c.start, c.stop - c.start, list(tables[c.request.id].runs(0, c.stop))) for c in chunks]
        plan = Plan(rows, self.cache.arena, self.attention)
        inputs = mx.array([token for c in chunks for token in c.request.tokens(c.start, c.stop)])
        ends, last = [], -1
        for chunk in chunks:
            last += chunk.stop - chunk.start
            if chunk.samples:
                ends.append(last)
        if self._last_rows:
            self._last_rows.rows = mx.array(ends or [0])
        with attention_over_extents(self._modules):
            layers = [LayerCache(plan, layer) for layer in range(self.num_layers)]
            logits = self._model(inputs[None] if plan.single else inputs[:, None], cache=layers)
        if not ends:  # only parts of prompts: the head is never evaluated
            mx.eval(self.cache.arena.arrays())
            return []
        logits = logits.reshape(-1, logits.shape[-1])
        if not self._last_rows:
            logits = logits[mx.array(ends)]
        sampled = mx.argmax(logits, axis=-1)
        mx.eval(sampled, self.cache.arena.arrays())
        return sampled.tolist()

    def _recover(self, events: list[TokenEvent]) -> None:
        """After a step that raised: what is in the arena is not to be trusted, and what was to be delivered still is."""
        self.cache.arena.clear()
        self.scheduler.restart_all()
        self._pending_events = events

    def _deliver(self, request: Request, token: int, now: float) -> TokenEvent:
        request.output_tokens.append(token)
        request.token_times.append(now)
        request.state = RequestState.DECODING
        reason = None
        if token in request.stop_token_ids:
            reason = "stop"
        elif len(request.output_tokens) == request.max_tokens:
            reason = "length"
        if reason:
            self.scheduler.remove(request)
            self._end(request, RequestState.FINISHED, reason)
        return TokenEvent(request.id, token, reason)

    def _end(self, request: Request, state: RequestState, reason: str) -> None:
        request.state, request.finish_reason, request.finished_at = state, reason, self.clock()
        del self.requests[request.id]

    def _held(self) -> tuple[Held, ...]:
        tables = self.cache.blocks.tables
        return tuple(Held(r.id, table := tables[r.id], table.extents, table.capacity, table.num_tokens) for r in self.scheduler.running)

    def _new_id(self) -> str:
        while True:
            self._num_submitted += 1
            if (name := f"request-{self._num_submitted}") not in self.requests:
                return name

    def _tokens(self, name: str, tokens: Sequence[int]) -> tuple[int, ...]:
        """Token ids as plain ints; NumPy's and MLX's are welcome."""
        try:
            given = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
        except TypeError:
            raise BadInput(f"{name} must be a sequence of token ids, not {shown(tokens)}") from None
        found = []
        for token in given:
            number = token.__index__() if hasattr(token, "__index__") and not isinstance(token, bool) else -1
            if not 0 <= number < self.vocabulary:
                raise BadInput(f"{name} has token {shown(token)}, but tokens are whole numbers from 0 to {self.vocabulary - 1}")
            found.append(number)
        return tuple(found)

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise BadInput(f"prompt of request {request.id!r} is empty: give at least one token")
        if request.id in self.requests:
            raise BadInput(f"request id {request.id!r} is already in use: choose another")
        length = len(request.prompt) + request.max_tokens
        if length > self.max_seq_len:
            raise BadInput(f"request {request.id!r} wants {length} tokens (prompt + max_tokens), but max_seq_len is {self.max_seq_len}")
        if not self.cache.blocks.could_ever_hold(request.max_slots):
            pool = self.cache.blocks.num_blocks * self.cache.blocks.block_size
            raise BadInput(f"request {request.id!r} wants {request.max_slots} slots, which can never fit the pool of {pool} slots")
