"""The engine: continuous batching of an unmodified mlx-lm model over a `KVCache`.

A step is: plan, launch, land, tell. Its rows are tokens of decoding sequences and prompts in
any mixture, fed to the model as a batch ``[rows, 1]`` with each row's own position, so matrix
products see all of them at once and nothing is padded. Launching builds the step and starts it;
landing waits for its tokens. Pipelined, the next step is launched before one lands:

    host      plan+launch 1 | plan+launch 2 | land 1 | tell 1 | plan+launch 3 | land 2 | ...
    device                  | 1 ............... | 2 .................... | 3 ...
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from heapq import heappop, heappush
from itertools import count

import mlx.core as mx
import mlx.nn as nn

from ..allocators import Allocator, Stats
from ..errors import BadInput, a_function
from ..host.models import Weights
from ..host.threads import end_streams_with_thread
from ..options import DEFAULT_STEP_TOKENS, EngineOptions, RequestOptions
from ..scheduler.prefix_cache import block_hashes, filled_blocks
from ..scheduler.request import Request, RequestState, TokenEvent
from ..scheduler.scheduler import Scheduler
from .attention import check_method
from .books import Books, Door, Occupied
from .detokenizer import wrapped
from .model_runner import NOT_FINITE, Flight, ModelRunner
from .output_processor import END_STATES, Generation, Notice, OutputProcessor, call_each
from .records import Done, StepRecord, before_step, serving_stats
from .submission import new_request, refusal


class Engine:
    """Serves requests on ``num_blocks`` blocks of ``block_size`` slots.

    - ``model``: one of mlx-lm's, or a `ModelRunner` of it that several engines share.
    - ``options``: the fields of `EngineOptions`. By default ``max_seq_len`` is the model's context,
      or the pool where that is smaller and a layer keeps all tokens; ``pipeline`` is on, except on
      the CPU (its queue is too short to gain) with ``max_batch_size`` above 1.
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
        self.max_seq_len = options.max_seq_len or runner.longest(options)
        self.cache = runner.new_cache(options, self.max_seq_len)
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
        self._books, self._steps = Books(self._rebuild), Door()
        self._output = OutputProcessor(self._books, self._end)
        self._weights = Weights(runner.model) if options.prefix_caching else None
        self._deadlines: list[tuple[float, int, str]] = []  # a heap: when, number, id
        self._in_flight: tuple[Flight, dict] | None = None  # with its record, as far as known
        self._is_stepping = False  # from schedule to landing
        self._is_sound = True  # what the arena holds
        self._untold: Iterator[StepRecord] = iter(())
        self._numbers = count(1)  # of requests
        self._landed_at = -math.inf
        self._done = Done()

    # --- requests, at any time, from any thread ---------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int] | str | None = None,
        max_tokens: int = 256,
        *,
        request_id: str | None = None,
        arrived_at: float | None = None,
        **options,
    ) -> Request:
        """Queue a request: token ids, or text (``messages=`` for a chat) where the engine has a
        tokenizer. ``options`` are the fields of `RequestOptions`. `BadInput` when an argument makes
        no sense, or the request could never fit; the engine goes on for the others.
        """
        request = new_request(
            self.tokenizer, self.runner.vocabulary, prompt, RequestOptions(**options),
            id=self._new_id() if request_id is None else request_id, max_tokens=max_tokens,
            arrived_at=self.clock() if arrived_at is None else arrived_at,
        )  # fmt: skip
        if self.cache.blocks.prefix is not None:
            request.prefix_ids = tuple(block_hashes(request.prompt, self.cache.blocks.block_size))
        self._books.ask(partial(self._add, request))
        if request.error and not request.number:
            raise BadInput(request.error)
        return request

    def _new_id(self) -> str:
        return next(name for n in self._numbers if (name := f"request-{n}") not in self.requests)

    def cancel(self, request_id: str) -> bool:
        """End a request now and free its blocks; the next step tells it. False when no such request
        is live.
        """
        request = self.requests.get(request_id)
        if request is None or request.finish_reason is not None:
            return False
        self._books.ask(partial(self._cancel, request))
        return True

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: let no later prompt use what was computed until now. To be called
        when the model's weights were written in place; new arrays in their place are noticed.
        """
        self._books.ask(self.scheduler.forget_prefixes)

    def stats(self) -> Stats:
        """The cache's statistics; queue, preemptions and tokens so far; rates since the first step.

        ``occupancy``: blocks held / all. Shares of the slots held, and free ones of no use to the
        head of the queue: with a token (``token_share``), held but empty (``empty_share``), free
        (``external_share``). ``prefix_hit_rate``: of the prompts' blocks, those found at first
        admission. None where there are none.
        """
        return self._books.do(
            lambda: serving_stats(self.cache, self.scheduler, self._done, self.clock())
        )

    # --- steps, one at a time ---------------------------------------------------------------------

    def run(self) -> Iterator[TokenEvent]:
        """Step until every request has ended, yielding events; those not taken stay queued.
        `CortexLabError` inside a step, as for `step`.
        """
        out = self._output
        while self.requests or out.outbox or out.events:
            if self._steps.is_occupied or not out.events:
                self._advance()
            yield from out.take_each()

    def step(self) -> list[TokenEvent]:
        """Run one step, if there is one to run, and return the events it delivered (pipelined,
        those of the step before: at first none). `CortexLabError` while a step is under way, in a
        callback or another thread: to wait for it could be to wait for ever.
        """
        self._advance()
        return self._output.take()

    def _advance(self) -> None:
        end_streams_with_thread()
        try:
            self._steps.enter(self._turn)
        except Occupied:
            raise Occupied(
                "a step is under way: until it is done, neither its callbacks nor another thread "
                "can call step() or run()"
            ) from None

    def _turn(self) -> None:
        """One step. If an exception cuts it short, the next one begins with `_rebuild`."""
        self._books.do(self._begin)
        self._tell()  # what an exception kept from being told
        landing = self._books.do(partial(self._next_landing, self._launch()))
        if landing:
            self._land(*landing)
        self._is_stepping = False
        self._tell()
        self.cache.arena.states.prune()

    def _launch(self) -> tuple[Flight, dict] | None:
        """Schedule a step and start it; None when there is nothing to run."""
        started_at = self.clock()
        if self._done.started_at is None:
            self._done.started_at = started_at
        planned = self._books.do(partial(self._plan, started_at))
        if planned is None:
            return None
        flight, before, record = planned
        self.runner.launch(flight, self.cache.arena, self.options.attention, before)
        record["host_s"] += flight.planning_s
        return flight, record

    def _land(self, flight: Flight, record: dict) -> None:
        """Wait for a step's tokens, and add them to their requests."""
        if flight.found is None:
            mx.eval(self.cache.arena.arrays())
        found = flight.found.tolist() if flight.found is not None else []
        self._books.do(partial(self._book, flight, record, found, self.clock()))

    def _tell(self) -> None:
        """Call the users' functions, with closed books."""
        self._output.tell()
        call_each(self._on_step, self._untold)

    # --- with open books --------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._is_stepping:  # the last step was cut short
            self._rebuild()

    def _plan(self, now: float) -> tuple[Flight, Flight | None, dict] | None:
        """A step's flight, the flight before whose tokens are unread, and the step's record."""
        if not self._is_sound:
            self.cache.arena.clear()
            self._is_sound = True
        self._is_stepping = True
        self._end_late(now)
        self._notice_weights()
        step = self.scheduler.schedule(now)
        for request in step.failed:
            self._output.end(request, "error", request.error)
        self.cache.arena.states.prune()
        record = {"started_at": now, "host_s": self.clock() - now}
        self.cache.make_moves()
        if not step.chunks:
            return None
        if self._on_step:
            record |= before_step(self.scheduler, step)
        before = self._in_flight[0] if self._in_flight else None
        return self.runner.plan(step, before), before, record

    def _next_landing(self, launched: tuple[Flight, dict] | None) -> tuple[Flight, dict] | None:
        """The flight to land now: pipelined, the one before that ``launched``."""
        if not self._is_stepping:  # rebuilt meanwhile: what was launched is void
            return None
        if self.pipeline:
            launched, self._in_flight = self._in_flight, launched
        return launched

    def _book(self, flight: Flight, record: dict, tokens: list[int], now: float) -> None:
        if not self._is_stepping:  # rebuilt meanwhile
            return
        self._output.book(self._notices(flight, tokens, now))
        self._done.num_steps += 1
        self._done.num_prefill_tokens += flight.num_prefill
        self._done.num_decode_tokens += flight.num_decode
        if self._on_step:
            record["started_at"] = max(record["started_at"], self._landed_at)
            told = StepRecord(
                ended_at=now, num_prefill_tokens=flight.num_prefill,
                num_decode_tokens=flight.num_decode,
                copied_bytes=self.cache.arena.copied_bytes, **record,
            )  # fmt: skip
            self._untold = iter([told])
        self._landed_at = now
        if min(tokens, default=0) < 0:
            self._rebuild()

    def _notices(self, flight: Flight, tokens: list[int], now: float) -> list[Notice]:
        """Notices of a flight's tokens; requests that can get none are ended."""
        notices = []
        for request, token in zip(flight.sampling, tokens, strict=True):
            request.num_pending -= 1
            if request.finish_reason is not None:  # ended while its token was under way
                continue
            if token < 0:
                self._doubt(request)
            elif error := flight.error(request, token, self.runner.vocabulary):
                self._output.end(request, "error", error)
            else:
                notices.append(Notice.of(request, token, flight.choices.get(request), now))
        return notices

    def _doubt(self, request: Generation) -> None:
        """Fail a request whose logits are not finite, if it is careful. Else make it so: its NaN
        may be another's, since NaN times a weight of zero is NaN.
        """
        if request.is_careful:
            self._output.end(request, "error", NOT_FINITE)
        request.is_careful, request.prefix_ids = True, ()

    def _add(self, request: Generation) -> None:
        if self.requests.get(request.id) is request:
            return
        request.error = refusal(request, self.requests, self.max_seq_len, self.cache.blocks)
        if request.error is not None:
            request.finish_reason = "error"
            self._leave(request)
            return
        self.scheduler.add(request)
        if request.timeout_s is not None:
            due = request.arrived_at + request.timeout_s
            heappush(self._deadlines, (due, request.number, request.id))
        self.requests[request.id] = request

    def _cancel(self, request: Generation) -> None:
        if request.finish_reason is None:
            self._output.end(request, "cancelled")

    def _end(self, request: Generation, reason: str) -> None:
        """Take a request out; its whole blocks stay in the prefix cache."""
        request.finish_reason = reason  # from here on, `_rebuild` ends it too
        if request.table is not None:
            self.scheduler.remove(request, self._filled(request))
        elif request in self.scheduler.waiting:
            self.scheduler.remove(request)
        self._leave(request)

    def _filled(self, request: Generation) -> Sequence:
        blocks = self.cache.blocks
        return filled_blocks(request, blocks.block_size) if blocks.prefix is not None else ()

    def _leave(self, request: Generation) -> None:
        state = END_STATES[request.finish_reason]
        if request.state is not state:
            request.finished_at = self.clock()
            request.enter(state, request.finished_at)
        if self.requests.get(request.id) is request:
            del self.requests[request.id]

    def _end_late(self, now: float) -> None:
        """End requests whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, request_id = self._deadlines[0]
            request = self.requests.get(request_id)
            if request and request.number == number and request.finish_reason is None:
                self._output.end(request, "timeout")
            heappop(self._deadlines)

    def _notice_weights(self) -> None:
        """Forget prefixes, where a prompt may be admitted that other weights computed."""
        if self._weights and self.scheduler.waiting and self._weights.have_changed():
            self.scheduler.forget_prefixes()

    def _rebuild(self) -> None:
        """Make the books anew from what an exception cannot tear: the requests, their tokens, and
        the outbox. Pool and prefix cache are emptied, and running requests computed again.
        """
        self._in_flight, self._is_sound = None, False
        live, now = list(self.requests.values()), self.clock()
        self._output.repair(live)
        for request in live:
            entered = request.history[-1][0] if request.history else RequestState.PENDING
            if entered is not request.state:
                request.history.append((request.state, now))
        self.cache.clear()
        self.scheduler.restart_all(live, now)
        for request in live:
            if request.finish_reason is not None:
                self._leave(request)
        self._is_stepping = False
