"""The engine: continuous batching of an unmodified mlx-lm model over a `KVCache`.

A step is: schedule, launch, land. Its rows are tokens: those of decoding sequences and of prompts
in any mixture, fed to the model as a batch ``[rows, 1]`` with each row's own position, so matrix
products see all of them at once and nothing is padded. Launching builds the step and starts it;
landing reads its tokens and delivers them. Pipelined, the next step is launched before one lands:

    host      schedule+launch 1 | schedule+launch 2 | land 1 | schedule+launch 3 | land 2 | ...
    device                      | 1 ............... | 2 ............... | 3 ...
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import index

import mlx.core as mx
import mlx.nn as nn

from ..allocators import Allocator, Stats
from ..errors import BadInput, at_least, one_of, shown, yes_or_no
from ..host.models import model_limits
from ..scheduler.block_manager import BlockTable
from ..scheduler.prefix_cache import block_hashes
from ..scheduler.request import Request, RequestState, SamplingParams, TokenEvent
from ..scheduler.scheduler import PREEMPTIONS, WATERMARK, Chunk, Scheduler
from .attention import RowRun, check_method
from .detokenizer import TextStream, wrapped
from .kv_cache import KVCache
from .model_runner import Driver
from .sampler import Choice, Chooser, LogitsProcessor, Sampler

DEFAULT_STEP_TOKENS = 512
# by relocation and compaction between two steps, or one sequence: 100 MB and a tenth of a second
# for SmolLM2
MAX_MOVED_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Held:
    """What one sequence held during a step. ``table`` has the tokens the sequence ended with, once
    it has.

    ``num_counted``: of its first slots, those in blocks that a sequence before it in the same step
    holds too: counted once, there.
    """

    request_id: str
    table: BlockTable
    extents: tuple
    num_slots: int
    num_tokens: int
    num_counted: int = 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it was run; times are seconds on the engine's clock. ``host_s``: scheduling,
    block tables, plans.
    """

    started_at: float
    ended_at: float
    host_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    unusable_slots: int
    pool: Stats
    copied_bytes: int
    held: tuple[Held, ...]


@dataclass(slots=True)
class _Generation:
    """What a request's tokens are made and shown with."""

    chooser: Chooser
    text: TextStream | None


@dataclass(slots=True)
class _Flight:
    """A step that was launched and has not landed."""

    chunks: list[Chunk]
    sampling: list[Request]  # whose next token comes of it
    tokens: mx.array | None = None  # [len(sampling)]
    choices: dict[Request, Choice] = field(
        default_factory=dict
    )  # where it takes more than the largest logit
    errors: dict[Request, str] = field(default_factory=dict)  # who could not be given one
    record: dict = field(default_factory=dict)  # of its `StepRecord`, what is known at launch


class Engine:
    """Serves requests on ``num_blocks`` blocks of ``block_size`` slots.

    - ``strategy``, ``growth``: as `KVCache`. ``max_seq_len``: longest prompt + output a request may
      have, and the region of ``static`` (default: the model's context, or the pool where that is
      smaller).
    - ``max_batch_size`` requests run at once; a step computes at most ``max_step_tokens`` tokens
      (default: 512, or the batch size where that is more), prompts in chunks if need be.
    - ``oom_policy``: ``wait``, ``fail`` or ``preempt``; ``watermark``: the share of the pool kept
      free for growth (`Scheduler`). ``preemption``: who gives way will ``recompute`` its tokens, or
      is copied to the host and back (``swap``), as long as there is room in its ``swap_blocks``
      (default: as many as the pool has).
    - ``prefix_caching``: whole blocks of equal prefixes are held once, and kept until memory is
      wanted.
    - ``attention``: ``views``, ``windows``, ``gather`` (`cortexlab.attention`), or ``auto``, the
      default, which chooses for each step by a rule of measured crossovers.
    - ``pipeline``: launch a step before the last one's tokens are read (default: where the device
      is not the CPU, whose queue is too short to gain by it; one request at a time does, by a
      tenth).
    - ``tokenizer``: for prompts as text, text as it comes, stop strings, and to stop at its
      end-of-sequence tokens.
    - ``on_step`` is called with a `StepRecord` after every step; ``clock`` gives seconds.

    The tokens are those of `mlx_lm.generate.generate_step`, whatever the strategy. Raises
    `ModelError` for a model that cannot be driven exactly (a few tokens are tried), `BadInput` for
    an argument that makes no sense.

    When a step raises, the error is passed on, and everything that was running is computed again
    from its tokens by later steps.
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
        preemption: str = "recompute",
        swap_blocks: int | None = None,
        prefix_caching: bool = False,
        attention: str = "auto",
        pipeline: bool | None = None,
        tokenizer=None,
        on_step: Callable[[StepRecord], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        at_least("num_blocks", num_blocks, 1)
        at_least("block_size", block_size, 1)
        yes_or_no("prefix_caching", prefix_caching)
        one_of("preemption", preemption, PREEMPTIONS)
        if preemption == "swap":
            swap_blocks = (
                num_blocks if swap_blocks is None else at_least("swap_blocks", swap_blocks, 1)
            )
        elif swap_blocks is not None:
            raise BadInput("swap_blocks is for preemption 'swap'")
        context, self.vocabulary = model_limits(model)
        self.max_seq_len = (
            min(context, num_blocks * block_size)
            if max_seq_len is None
            else at_least("max_seq_len", max_seq_len, 1)
        )
        self.driver = Driver(model)
        layers = self.driver.layers
        self.cache = KVCache(
            len(layers),
            layers[0].num_kv_heads,
            layers[0].key_dim,
            num_blocks * block_size,
            block_size,
            strategy,
            growth=growth,
            max_seq_len=self.max_seq_len,
            dtype=self.driver.dtype,
            layers=layers,
            prefix_caching=prefix_caching,
            swap_blocks=swap_blocks or 0,
            max_moved_tokens=MAX_MOVED_TOKENS,
        )
        check_method(attention, self.cache.arena)
        at_least("max_batch_size", max_batch_size, 1)
        step_tokens = (
            max(DEFAULT_STEP_TOKENS, max_batch_size) if max_step_tokens is None else max_step_tokens
        )
        self.scheduler = Scheduler(
            self.cache.blocks,
            max_batch_size=max_batch_size,
            max_step_tokens=step_tokens,
            oom_policy=oom_policy,
            watermark=watermark,
            swap=self.cache.swap,
        )
        self.attention = attention
        gains = mx.default_device() != mx.cpu or max_batch_size == 1
        self.pipeline = gains if pipeline is None else yes_or_no("pipeline", pipeline)
        self.tokenizer = wrapped(tokenizer) if tokenizer is not None else None
        self.clock = _function("clock", clock)
        self.requests: dict[str, Request] = {}  # not ended yet
        self._generations: dict[Request, _Generation] = {}  # the same
        self._on_step = _function("on_step", on_step)
        self._events: deque[TokenEvent] = deque()  # not handed to the caller yet
        self._in_flight: _Flight | None = None
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
        sampling: SamplingParams | Mapping | Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        stop: str | Sequence[str] | Callable[[Request], bool] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        priority: int = 0,
        on_token: Callable[[TokenEvent], None] | None = None,
        request_id: str | None = None,
        arrived_at: float | None = None,
    ) -> Request:
        """Queue a request: token ids, or text where the engine has a tokenizer.

        - ``sampling``: `SamplingParams`, a dict of its fields, or a sampler of mlx-lm's kind;
          ``logits_processors`` likewise. Greedy by default. ``seed``: the same seed, the same
          tokens, in any batch.
        - It ends with one of ``stop_token_ids`` (and, with a tokenizer, of its end-of-sequence
          tokens unless ``ignore_eos``), before the text of ``stop`` (one or several strings; needs
          a tokenizer), or where ``stop``, a function, says so of the request.
        - ``logprobs``: tell each token's log-probability, and those of this many best ones.
        - ``priority``: lower ones first. ``on_token`` is told of each event as it comes. What
          raises in a function of the caller's own ends this request, and no other.

        `BadInput` when something in it makes no sense, or when it could never fit; the engine goes
        on for the others.
        """
        strings = (
            () if callable(stop) else (stop,) if isinstance(stop, str) else _sequence("stop", stop)
        )
        if strings and self.tokenizer is None:
            raise BadInput(
                "stop strings need an engine with a tokenizer: give Engine(tokenizer=...), or use "
                "stop_token_ids"
            )
        if wrong := [each for each in strings if not isinstance(each, str) or not each]:
            raise BadInput(
                "stop must be strings of at least one character, or a function, not "
                f"{shown(wrong[0])}"
            )
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise BadInput(
                    f"prompt {shown(prompt)} is text: give Engine(tokenizer=...), or token ids"
                )
            prompt = self.tokenizer.encode(prompt)
        stops = set(self._tokens("stop_token_ids", stop_token_ids))
        if not yes_or_no("ignore_eos", ignore_eos) and self.tokenizer is not None:
            stops |= set(self.tokenizer.eos_token_ids)
        request = Request(
            id=self._new_id() if request_id is None else _text_of("request_id", request_id),
            prompt=self._tokens("prompt", prompt),
            max_tokens=at_least("max_tokens", max_tokens, 1),
            stop_token_ids=frozenset(stops),
            arrived_at=self.clock() if arrived_at is None else _seconds("arrived_at", arrived_at),
            priority=at_least("priority", priority, -(2**31)),
            on_token=_function("on_token", on_token),
            stop_when=stop if callable(stop) else None,
        )
        self._check(request)
        generation = _Generation(
            Chooser(
                sampling,
                _sequence("logits_processors", logits_processors),
                seed,
                logprobs,
                self.vocabulary,
            ),
            TextStream(self.tokenizer, strings) if self.tokenizer is not None else None,
        )
        if self.cache.blocks.prefix is not None:
            request.prefix_ids = tuple(block_hashes(request.prompt, self.cache.blocks.block_size))
        self.requests[request.id] = request
        self._generations[request] = generation
        self.scheduler.add(request)
        return request

    def cancel(self, request_id: str) -> bool:
        """End a request now and free its blocks; False when no such request is live."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._end(request, RequestState.CANCELLED, "cancelled")
        self._end_event(request)
        return True

    def run(self) -> Iterator[TokenEvent]:
        """Step until every request has ended, yielding each token as it comes. What is not taken
        comes with the next call.
        """
        while self.requests or self._events:
            if not self._events:
                self._advance()
            while self._events:
                yield self._events.popleft()

    def step(self) -> list[TokenEvent]:
        """Run one step and return what it delivered; nothing to do returns at once. Pipelined, that
        is of the step before.
        """
        self._advance()
        events = list(self._events)
        self._events.clear()
        return events

    def stats(self) -> Stats:
        """The cache's statistics; queue, preemptions and tokens so far; rates since the first step;
        how full it is now.

        ``occupancy``: blocks held / all. Of H + X as interface.md defines them, ``token_share``
        holds tokens, ``external_share`` is free but of no use to the head of the queue,
        ``empty_share`` is held without a token: *reserved* or *internal*, which only the end of a
        sequence tells apart. None where nothing is held.
        """
        elapsed = self.clock() - self._started_at if self._started_at is not None else math.nan
        blocks, prefix = self.cache.blocks, self.cache.blocks.prefix
        held, unusable = (
            blocks.num_held * blocks.block_size,
            self.scheduler.unusable_blocks * blocks.block_size,
        )
        tokens = sum(each.num_tokens - each.num_counted for each in self._held())
        room = held + unusable
        return Stats(
            self.cache.stats(),
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self.scheduler.num_preemptions,
            num_swapped=len(self.cache.swap.tables) if self.cache.swap else 0,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            prefill_tokens_per_s=self._num_prefill_tokens / elapsed if elapsed > 0 else None,
            decode_tokens_per_s=self._num_decode_tokens / elapsed if elapsed > 0 else None,
            occupancy=blocks.num_held / blocks.num_blocks,
            token_share=tokens / room if room else None,
            empty_share=(held - tokens) / room if room else None,
            external_share=unusable / room if room else None,
            prefix_hit_rate=prefix.num_found / prefix.num_asked
            if prefix is not None and prefix.num_asked
            else None,
        )

    # --- one step ---------------------------------------------------------------------------------

    def _advance(self) -> None:
        try:
            flight = self._launch()
            if self.pipeline:
                flight, self._in_flight = self._in_flight, flight
            if flight:
                self._land(flight)
        except BaseException:
            self._recover()
            raise

    def _launch(self) -> _Flight | None:
        """Schedule a step and start it; None when there is nothing to run."""
        started_at = self.clock()
        if self._started_at is None:
            self._started_at = started_at
        step = self.scheduler.schedule(started_at)
        for request in step.failed:
            self._end(request, RequestState.FAILED, "error")
            self._end_event(request)
        if not step.chunks:
            self.cache.make_moves()  # of who was swapped out
            return None
        chunks = sorted(
            step.chunks, key=lambda chunk: chunk.stop - chunk.start > 1
        )  # decode rows first, as `Plan` wants them
        flight = _Flight(chunks, [chunk.request for chunk in chunks if chunk.samples])
        host_s = self.clock() - started_at
        if self._on_step:
            flight.record = {
                "started_at": started_at,
                "num_running": len(self.scheduler.running),
                "num_waiting": len(self.scheduler.waiting),
                "unusable_slots": step.unusable_blocks * self.cache.blocks.block_size,
                "pool": self.cache.blocks.stats(),
                "held": tuple(self._held()),
            }
        self.cache.make_moves()
        planning_at = self.clock()
        tables = self.cache.blocks.tables
        rows = [
            RowRun(c.start, c.stop - c.start, list(tables[c.request.id].runs(0, c.stop)))
            for c in chunks
        ]
        host_s += self.clock() - planning_at
        self._forward(flight, rows)
        flight.record["host_s"] = host_s + self.driver.planning_s
        for chunk in chunks:
            chunk.request.num_computed = chunk.stop
        for request in flight.sampling:
            request.num_pending += 1
        return flight

    def _forward(self, flight: _Flight, rows: list[RowRun]) -> None:
        """Build the model's graph over the chunks, choose the tokens of those that reach their end,
        and start it all.
        """
        ends, last = [], -1
        for chunk in flight.chunks:
            last += chunk.stop - chunk.start
            if chunk.samples:
                ends.append(last)
        arena = self.cache.arena
        logits = self.driver.logits(rows, self._inputs(flight.chunks), ends, arena, self.attention)
        if logits is None:  # only parts of prompts
            mx.async_eval(arena.arrays())
            return
        self._choose(flight, logits)
        mx.async_eval(
            flight.tokens,
            *(array for choice in flight.choices.values() for array in choice.arrays()),
            arena.arrays(),
        )

    def _inputs(self, chunks: list[Chunk]) -> mx.array:
        """The chunks' tokens, one behind the other; pending ones are taken from the step in flight,
        unread.
        """
        inputs = mx.array(
            [token for chunk in chunks for token in chunk.request.tokens(chunk.start, chunk.stop)],
            dtype=mx.uint32,
        )
        if not self._in_flight:
            return inputs
        place = {request: index for index, request in enumerate(self._in_flight.sampling)}
        rows, sampled, first = [], [], 0
        for request, start, stop in chunks:
            first += stop - start
            if request.num_pending and stop == request.num_tokens:
                rows.append(first - 1)
                sampled.append(place[request])
        if rows:
            inputs[mx.array(rows)] = self._in_flight.tokens[mx.array(sampled)]
        return inputs

    def _choose(self, flight: _Flight, logits: mx.array) -> None:
        """A token for each row of ``[len(flight.sampling), vocabulary]``. Who cannot be given one
        is set down with the reason.
        """
        flight.tokens = mx.argmax(logits, axis=-1).astype(mx.uint32)
        special = [
            (i, request)
            for i, request in enumerate(flight.sampling)
            if not self._generations[request].chooser.plain
        ]
        for i, request in special:
            chooser = self._generations[request].chooser
            before = self._in_flight.choices.get(request) if self._in_flight else None
            state = before.state if before else chooser.state
            try:
                choice = chooser(
                    self._context(request) if chooser.wants_tokens else None,
                    logits[i : i + 1],
                    state,
                )
            except BadInput as error:
                flight.errors[request] = str(error)
            except Exception as error:
                flight.errors[request] = (
                    f"its sampler or logits processor raised {type(error).__name__}: "
                    f"{shown(str(error))}"
                )
            else:
                flight.choices[request] = choice
        if chosen := [
            (i, flight.choices[request].token)
            for i, request in special
            if request in flight.choices
        ]:
            flight.tokens[mx.array([i for i, _ in chosen])] = mx.concatenate(
                [token for _, token in chosen]
            )

    def _context(self, request: Request) -> mx.array:
        """Prompt and output, as logits processors see them."""
        tokens = mx.array([*request.prompt, *request.output_tokens])
        if not request.num_pending:
            return tokens
        return mx.concatenate(
            [
                tokens,
                self._in_flight.tokens[self._in_flight.sampling.index(request)][None].astype(
                    tokens.dtype
                ),
            ]
        )

    def _land(self, flight: _Flight) -> None:
        """Read a step's tokens and deliver them."""
        if flight.tokens is None:
            mx.eval(self.cache.arena.arrays())
        tokens = flight.tokens.tolist() if flight.tokens is not None else []
        now = self.clock()
        num_decode = sum(
            chunk.stop - chunk.start == 1 and bool(chunk.request.output_tokens)
            for chunk in flight.chunks
        )
        num_prefill = sum(chunk.stop - chunk.start for chunk in flight.chunks) - num_decode
        self._num_steps += 1
        self._num_prefill_tokens += num_prefill
        self._num_decode_tokens += num_decode
        for request, token in zip(flight.sampling, tokens, strict=True):
            request.num_pending -= 1
            if request in self._generations:  # and has not ended since
                if request in flight.errors:
                    self._fail(request, flight.errors[request])
                else:
                    self._deliver(request, token, flight.choices.get(request), now)
        if self._on_step:
            started_at = max(flight.record.pop("started_at"), self._landed_at)
            self._on_step(
                StepRecord(
                    started_at=started_at,
                    ended_at=now,
                    num_prefill_tokens=num_prefill,
                    num_decode_tokens=num_decode,
                    copied_bytes=self.cache.arena.copied_bytes,
                    **flight.record,
                )
            )
        self._landed_at = now

    def _recover(self) -> None:
        """After a step that raised: what is in the arena is not to be trusted; what was to be
        delivered still is.
        """
        self._in_flight = None
        for request in self.requests.values():
            request.num_pending = 0
        self.cache.arena.clear()
        self.scheduler.restart_all()

    def _deliver(self, request: Request, token: int, choice: Choice | None, now: float) -> None:
        generation = self._generations[request]
        if token >= self.vocabulary:
            self._fail(
                request,
                f"its sampler returned token {token}, but tokens go up to {self.vocabulary - 1}",
            )
            return
        if (
            request.state is RequestState.PREFILLING
        ):  # not where it gave way while this token was under way
            request.enter(RequestState.DECODING, now)
        request.output_tokens.append(token)
        request.token_times.append(now)
        if choice is not None:
            generation.chooser.state = choice.state
            if (logprobs := choice.logprobs()) is not None:
                request.logprobs.append(logprobs)
        told = request.logprobs[-1] if request.logprobs else None
        reason, text = "stop" if token in request.stop_token_ids else None, None
        if generation.text:
            text, reason = self._text(request, generation.text, token, reason)
        place, error = len(self._events), None
        try:
            if reason is None and request.stop_when and request.stop_when(request):
                reason, text = "stop", self._rest(request, generation.text, text)
        except Exception as raised:
            error = raised
        if reason is None and len(request.output_tokens) == request.max_tokens:
            reason = "length"
        event = TokenEvent(request.id, token, reason, text, told)
        self._events.insert(
            place, event
        )  # before the end of a request that its own function cancels
        try:
            if request.on_token and error is None:
                request.on_token(event)
        except Exception as raised:
            error = raised
        finally:  # it has had its last token, even if the whole run is interrupted here
            if reason and error is None and request in self._generations:
                self._end(request, RequestState.FINISHED, reason)
        if reason and request.state is not RequestState.FINISHED:
            self._events[place] = replace(event, finish_reason=None)
        if error is not None:
            self._fail(
                request,
                f"its stop function or token consumer raised {type(error).__name__}: "
                f"{shown(str(error))}",
                tell=False,
            )

    def _text(
        self, request: Request, stream: TextStream, token: int, reason: str | None
    ) -> tuple[str, str | None]:
        """What can be shown behind ``token``, and the reason to stop. A stop token says nothing."""
        text = ""
        if reason is None:
            text, stopped = stream.add(token)
            reason = "stop" if stopped else None
        if len(request.output_tokens) == request.max_tokens and reason is None:
            more, stopped = stream.finish()
            text, reason = text + more, "stop" if stopped else None
        elif reason and token in request.stop_token_ids:
            text = stream.finish()[0]
        request.text += text
        return text, reason

    def _rest(self, request: Request, stream: TextStream | None, text: str | None) -> str | None:
        """``text`` and what is held back behind it, when no token comes any more."""
        if stream is None or len(request.output_tokens) == request.max_tokens:
            return text
        more, _ = stream.finish()
        request.text += more
        return text + more

    def _fail(self, request: Request, error: str, tell: bool = True) -> None:
        if request not in self._generations:  # its own consumer has cancelled it before it raised
            return
        request.error = error
        self._end(request, RequestState.FAILED, "error")
        self._end_event(request, tell)

    def _end_event(self, request: Request, tell: bool = True) -> None:
        """The event of an end without a token. What a consumer raises at that is lost: there is
        nothing left to end.
        """
        event = TokenEvent(request.id, None, request.finish_reason)
        self._events.append(event)
        if tell and request.on_token:
            with suppress(Exception):
                request.on_token(event)

    def _end(self, request: Request, state: RequestState, reason: str) -> None:
        """It holds nothing any more. What it has computed stays in the prefix cache."""
        if request in self.scheduler.running or request in self.scheduler.waiting:
            self.scheduler.remove(request, self._whole_blocks(request))
        request.finish_reason, request.finished_at = reason, self.clock()
        request.enter(state, request.finished_at)
        del self.requests[request.id], self._generations[request]

    def _whole_blocks(self, request: Request) -> Sequence:
        """The ids of the blocks that prompt and output fill, as far as they are computed."""
        blocks = self.cache.blocks
        if blocks.prefix is None or request.id not in blocks.tables:
            return ()
        known = min(
            blocks.tables[request.id].num_tokens, len(request.prompt) + len(request.output_tokens)
        )
        return tuple(
            block_hashes(request.tokens(0, known - known % blocks.block_size), blocks.block_size)
        )

    def _held(self) -> Iterator[Held]:
        tables, seen = self.cache.blocks.tables, set()
        for request in self.scheduler.running:
            table = tables[request.id]
            counted = 0
            for block in table.shared:
                counted += block in seen
                seen.add(block)
            slots = counted * self.cache.blocks.block_size
            yield Held(
                request.id, table, table.all_extents, table.capacity, table.num_tokens, slots
            )

    # --- what a request may be --------------------------------------------------------------------

    def _new_id(self) -> str:
        while True:
            self._num_submitted += 1
            if (name := f"request-{self._num_submitted}") not in self.requests:
                return name

    def _tokens(self, name: str, tokens: Sequence[int]) -> tuple[int, ...]:
        """Token ids as plain ints; NumPy's and MLX's are welcome."""
        try:
            given = list(tokens.tolist() if hasattr(tokens, "tolist") else tokens)
        except TypeError:
            raise BadInput(f"{name} must be a sequence of token ids, not {shown(tokens)}") from None
        found = []
        for token in given:
            try:
                number = -1 if isinstance(token, bool) else index(token)
            except (
                TypeError,
                ValueError,
            ):  # an array of no single whole number says it in either way
                number = -1
            if not 0 <= number < self.vocabulary:
                raise BadInput(
                    f"{name} has token {shown(token)}, but tokens are whole numbers from 0 to "
                    f"{self.vocabulary - 1}"
                )
            found.append(number)
        return tuple(found)

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise BadInput(f"prompt of request {request.id!r} is empty: give at least one token")
        if request.id in self.requests:
            raise BadInput(f"request id {request.id!r} is already in use: choose another")
        length = len(request.prompt) + request.max_tokens
        if length > self.max_seq_len:
            raise BadInput(
                f"request {request.id!r} wants {length} tokens (prompt + max_tokens), but "
                f"max_seq_len is {self.max_seq_len}"
            )
        if not self.cache.blocks.could_ever_hold(request.max_slots):
            pool = self.cache.blocks.num_blocks * self.cache.blocks.block_size
            raise BadInput(
                f"request {request.id!r} wants {request.max_slots} slots, which can never fit the "
                f"pool of {pool} slots"
            )


def _function(name: str, given):
    if given is not None and not callable(given):
        raise BadInput(f"{name} must be a function, not {shown(given)}")
    return given


def _sequence(name: str, given) -> tuple:
    try:
        return tuple(given)
    except TypeError:
        raise BadInput(f"{name} must be a sequence, not {shown(given)}") from None


def _text_of(name: str, given) -> str:
    if not isinstance(given, str) or not given:
        raise BadInput(f"{name} must be a string of at least one character, not {shown(given)}")
    return given


def _seconds(name: str, given) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise BadInput(f"{name} must be seconds on the engine's clock, not {shown(given)}")
    return given
