"""The engine: continuous batching of an unmodified mlx-lm model over a `KVCache`.

A step is: schedule, launch, land, deliver. Its rows are tokens of decoding sequences and prompts in
any mixture, fed to the model as a batch ``[rows, 1]`` with each row's own position, so matrix
products see all of them at once and nothing is padded. Launching builds the step and starts it;
landing waits for its tokens. Pipelined, the next step is launched before one lands:

    host      schedule+launch 1 | schedule+launch 2 | land 1 | schedule+launch 3 | land 2 | ...
    device                      | 1 ............... | 2 ............... | 3 ...
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..allocators import Allocator, Stats, strategy_of
from ..errors import BadInput, a_function
from ..options import DEFAULT_STEP_TOKENS, EngineOptions, RequestOptions
from ..scheduler.prefix_cache import block_hashes
from ..scheduler.request import Request, RequestState, TokenEvent
from ..scheduler.scheduler import Scheduler
from .attention import check_method
from .detokenizer import wrapped
from .kv_cache import KVCache
from .model_runner import Flight, ModelRunner
from .output_processor import Generation, OutputProcessor
from .records import StepRecord, holdings
from .submission import new_request

# Tokens copied by relocation and compaction between two steps (the last copy may overshoot):
# 100 MB of SmolLM2-135M in float32, 0.1 s.
MAX_MOVED_TOKENS = 2048


class Engine:
    """Serves requests on ``num_blocks`` blocks of ``block_size`` slots.

    - ``model``: one of mlx-lm's, or a `ModelRunner` of it that several engines share.
    - ``options``: the fields of `EngineOptions`. By default ``max_seq_len`` is the model's context,
      or the pool where that is smaller; ``pipeline`` is on, except on the CPU (its queue is too
      short to gain) with ``max_batch_size`` above 1.
    - ``tokenizer``: for prompts as text, text as it comes, stop strings, and to stop at its
      end-of-sequence tokens.
    - ``on_step`` is called with a `StepRecord` after every step; ``clock`` gives seconds.

    The tokens are those of `mlx_lm.generate.generate_step`, whatever the strategy. `ModelError` for
    a model that gives other logits over extents (a few tokens are tried), `BadInput` for an
    argument that makes no sense. When a step raises, the error is passed on, and later steps
    compute all running requests again.
    """

    def __init__(
        self,
        model: nn.Module | ModelRunner,
        *,
        strategy: str | Callable[[int], Allocator] = "paged",
        tokenizer=None,
        on_step: Callable[[StepRecord], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **options,
    ):
        self.options = options = EngineOptions(strategy=strategy, **options)
        self.runner = runner = model if isinstance(model, ModelRunner) else ModelRunner(model)
        pool = options.num_blocks * options.block_size
        self.max_seq_len = options.max_seq_len or min(runner.context, pool)
        self.cache = KVCache(
            runner.layers, strategy_of(strategy, options.growth), options.num_blocks,
            options.block_size, dtype=runner.dtype, max_seq_len=self.max_seq_len,
            prefix_caching=options.prefix_caching, swap_blocks=options.num_swap_blocks,
            max_moved_tokens=MAX_MOVED_TOKENS,
        )  # fmt: skip
        check_method(options.attention, self.cache.arena)
        self.scheduler = Scheduler(
            self.cache.blocks, max_batch_size=options.max_batch_size,
            max_step_tokens=options.step_tokens(DEFAULT_STEP_TOKENS),
            oom_policy=options.oom_policy, watermark=options.watermark, swap=self.cache.swap,
        )  # fmt: skip
        default = mx.default_device() != mx.cpu or options.max_batch_size == 1
        self.pipeline = default if options.pipeline is None else options.pipeline
        self.tokenizer = wrapped(tokenizer) if tokenizer is not None else None
        self.clock = a_function("clock", clock)
        self.requests: dict[str, Generation] = {}  # not ended yet
        self._on_step = a_function("on_step", on_step)
        self._output = OutputProcessor(runner.vocabulary, self._end)
        self._in_flight: tuple[Flight, dict] | None = None  # with its record, as far as known
        self._num_submitted = 0
        self._started_at: float | None = None
        self._landed_at = -math.inf
        self._num_steps = self._num_prefill_tokens = self._num_decode_tokens = 0

    # --- requests ---------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int] | str,
        max_tokens: int = 256,
        *,
        request_id: str | None = None,
        arrived_at: float | None = None,
        **options,
    ) -> Request:
        """Queue a request: token ids, or text where the engine has a tokenizer. ``options`` are the
        fields of `RequestOptions`. `BadInput` when an argument makes no sense, or the request could
        never fit; the engine goes on for the others.
        """
        request = new_request(
            self.tokenizer, self.runner.vocabulary, prompt, RequestOptions(**options),
            id=self._new_id() if request_id is None else request_id, max_tokens=max_tokens,
            arrived_at=self.clock() if arrived_at is None else arrived_at,
        )  # fmt: skip
        self._check(request)
        if self.cache.blocks.prefix is not None:
            request.prefix_ids = tuple(block_hashes(request.prompt, self.cache.blocks.block_size))
        self.requests[request.id] = request
        self.scheduler.add(request)
        return request

    def cancel(self, request_id: str) -> bool:
        """End a request now and free its blocks; False when no such request is live."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._output.end(request, RequestState.CANCELLED, "cancelled")
        return True

    def run(self) -> Iterator[TokenEvent]:
        """Step until every request has ended, yielding events; those not taken stay queued."""
        events = self._output.events
        while self.requests or events:
            if not events:
                self._advance()
            while events:
                yield events.popleft()

    def step(self) -> list[TokenEvent]:
        """Run one step, if there is one to run, and return the events it delivered (pipelined,
        those of the step before: at first none).
        """
        self._advance()
        events = list(self._output.events)
        self._output.events.clear()
        return events

    def stats(self) -> Stats:
        """The cache's statistics; queue, preemptions and tokens so far; rates since the first step.

        ``occupancy``: blocks held / all. Shares of the slots held, and free ones of no use to the
        head of the queue: with a token (``token_share``), held but empty (``empty_share``), free
        (``external_share``). None where there are none.
        """
        elapsed = self.clock() - self._started_at if self._started_at is not None else math.nan
        blocks, running = self.cache.blocks, self.scheduler.running
        prefix = blocks.prefix
        size, num_held = blocks.block_size, blocks.num_held
        held, unusable = num_held * size, self.scheduler.unusable_blocks * size
        tokens = sum(request.num_computed for request in running) - blocks.shared_tokens
        room = held + unusable
        asked = prefix.num_asked if prefix is not None else 0
        prefills, decodes = self._num_prefill_tokens, self._num_decode_tokens
        return Stats(
            self.cache.stats(),
            num_running=len(running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self.scheduler.num_preemptions,
            num_swapped=len(self.cache.swap.tables) if self.cache.swap else 0,
            num_steps=self._num_steps,
            num_prefill_tokens=prefills,
            num_decode_tokens=decodes,
            prefill_tokens_per_s=prefills / elapsed if elapsed > 0 else None,
            decode_tokens_per_s=decodes / elapsed if elapsed > 0 else None,
            occupancy=num_held / blocks.num_blocks,
            token_share=tokens / room if room else None,
            empty_share=(held - tokens) / room if room else None,
            external_share=unusable / room if room else None,
            prefix_hit_rate=prefix.num_found / asked if asked else None,
        )

    # --- one step ---------------------------------------------------------------------------------

    def _advance(self) -> None:
        try:
            landing = self._launch()
            if self.pipeline:
                landing, self._in_flight = self._in_flight, landing
            if landing:
                self._land(*landing)
        except BaseException:
            self._recover()
            raise

    def _launch(self) -> tuple[Flight, dict] | None:
        """Schedule a step and start it; None when there is nothing to run."""
        started_at = self.clock()
        if self._started_at is None:
            self._started_at = started_at
        step = self.scheduler.schedule(started_at)
        for request in step.failed:
            self._output.end(request, RequestState.FAILED, "error")
        record = {"started_at": started_at, "host_s": self.clock() - started_at}
        self.cache.make_moves()
        if not step.chunks:
            return None
        if self._on_step:
            blocks = self.cache.blocks
            record |= {
                "num_running": len(self.scheduler.running),
                "num_waiting": len(self.scheduler.waiting),
                "unusable_slots": step.unusable_blocks * blocks.block_size,
                "pool": blocks.stats(),
                "held": tuple(holdings(self.scheduler.running, blocks.block_size)),
            }
        before = self._in_flight[0] if self._in_flight else None  # tokens unread
        flight = self.runner.launch(step, self.cache.arena, self.options.attention, before)
        record["host_s"] += flight.planning_s
        return flight, record

    def _land(self, flight: Flight, record: dict) -> None:
        """Wait for a step's tokens and deliver them."""
        if flight.tokens is None:
            mx.eval(self.cache.arena.arrays())
        tokens = flight.tokens.tolist() if flight.tokens is not None else []
        now = self.clock()
        self._num_steps += 1
        self._num_prefill_tokens += flight.num_prefill
        self._num_decode_tokens += flight.num_decode
        for request, token in zip(flight.sampling, tokens, strict=True):
            request.num_pending -= 1
            if request.finish_reason is not None:  # ended while its token was under way
                continue
            if request in flight.errors:
                self._output.fail(request, flight.errors[request])
            else:
                self._output.deliver(request, token, flight.choices.get(request), now)
        if self._on_step:
            record["started_at"] = max(record["started_at"], self._landed_at)
            self._on_step(
                StepRecord(
                    ended_at=now, num_prefill_tokens=flight.num_prefill,
                    num_decode_tokens=flight.num_decode,
                    copied_bytes=self.cache.arena.copied_bytes, **record,
                )
            )  # fmt: skip
        self._landed_at = now

    def _recover(self) -> None:
        """After a step that raised: drop its tokens, clear the arena, compute all again."""
        self._in_flight = None
        for request in self.requests.values():
            request.num_pending = 0
        self.cache.arena.clear()
        self.scheduler.restart_all()

    def _end(self, request: Generation, state: RequestState, reason: str) -> None:
        """Take a request out; its whole blocks stay in the prefix cache."""
        if request.table is not None:
            self.scheduler.remove(request, self._whole_blocks(request))
        elif request in self.scheduler.waiting:
            self.scheduler.remove(request)
        request.finish_reason, request.finished_at = reason, self.clock()
        request.enter(state, request.finished_at)
        del self.requests[request.id]

    def _whole_blocks(self, request: Generation) -> Sequence:
        """Ids of the blocks that prompt and output fill, as far as they are computed."""
        blocks = self.cache.blocks
        if blocks.prefix is None:
            return ()
        size, prompt = blocks.block_size, len(request.prompt)
        whole = min(request.num_computed, prompt + len(request.output_tokens)) // size
        ids = request.prefix_ids[: min(whole, prompt // size)]
        rest = request.tokens(len(ids) * size, whole * size)
        return (*ids, *block_hashes(rest, size, ids[-1] if ids else b""))

    # --- what a request may be --------------------------------------------------------------------

    def _new_id(self) -> str:
        while True:
            self._num_submitted += 1
            if (name := f"request-{self._num_submitted}") not in self.requests:
                return name

    def _check(self, request: Request) -> None:
        """`BadInput` for a request id in use, or a request that could never fit."""
        name = f"request {request.id!r}"
        if request.id in self.requests:
            raise BadInput(f"request id {request.id!r} is already in use: choose another")
        length = len(request.prompt) + request.max_tokens
        if length > self.max_seq_len:
            raise BadInput(
                f"{name} wants {length} tokens (prompt + max_tokens), but max_seq_len is "
                f"{self.max_seq_len}"
            )
        blocks = self.cache.blocks
        if not blocks.could_ever_hold(request.max_slots):
            pool = blocks.num_blocks * blocks.block_size
            raise BadInput(
                f"{name} wants {request.max_slots} slots, which can never fit the pool of {pool} "
                "slots"
            )
