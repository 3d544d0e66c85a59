"""A workload on the engine's own scheduler and block manager, on a virtual clock and without
tensors: an hour in seconds.

The clock counts whole nanoseconds and never looks at the machine. A step takes ``step_time``;
between two steps in which anything is decided (an arrival, an admission, a request that needs a
block or ends) all steps are alike and are taken in one jump:

    step      0    1    2    3 ...       17   18
    a    prefill   d    d    d            d    +block      a decision: step 18
    b              prefill   d            d    d
                             '- one jump -'

Here is what happens, and in ``accounting`` what is counted. ``naive`` takes every step by itself.
"""

import gc
import math
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from operator import attrgetter

from ..allocators import Allocator, blamed_on, check_names, strategy_of
from ..errors import BadInput, a_function, a_sequence, at_least
from ..options import ReplayOptions
from ..scheduler.block_manager import BlockManager
from ..scheduler.request import RequestState
from ..scheduler.scheduler import Chunk, Scheduler
from ..workloads.synthetic import WorkItem, checked_items, default_max_seq_len, pool_blocks
from .accounting import Clock, CountedRequest, Ledger
from .step_time import SECOND, StepTime, checked_step_time, reference

DEFAULT_STEP_TOKENS = 2048  # as vLLM's for a small server
LARGEST_POOL = 1 << 26  # blocks
MAX_JUMP = 256  # steps taken at once
NUM_SAMPLES = 500  # of the pool's state, over the time in which requests arrive


class Replay:
    """One strategy on a virtual clock. `run` a workload once; then read the row it returns,
    `samples` and `requests`.

    ``options`` are the fields of `ReplayOptions`. ``on_sample(replay, sample, ahead)`` is called
    with each new sample of the pool, taken ``ahead`` steps from where the clock stands; it may add
    to the sample. Raises `BadInput` for an argument that makes no sense, or when no request can
    ever fit.
    """

    def __init__(
        self,
        strategy: str | Callable[[int], Allocator] = "paged",
        *,
        step_time: StepTime = reference,
        on_sample: Callable[["Replay", dict, int], None] | None = None,
        **options,
    ):
        self.options = options = ReplayOptions(strategy=strategy, **options)
        self.strategy = strategy_of(strategy, options.growth)
        # The books of a user's own strategy are looked at with every sample.
        self._foreign = callable(strategy)
        self._on_sample = a_function("on_sample", on_sample)
        self.blocks = BlockManager(
            self.strategy, options.num_blocks, options.block_size, options.max_seq_len,
            options.prefix_caching,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.blocks, max_batch_size=options.max_batch_size,
            max_step_tokens=options.step_tokens(DEFAULT_STEP_TOKENS),
            oom_policy=options.oom_policy, watermark=options.watermark,
        )  # fmt: skip
        self._nanoseconds = checked_step_time(step_time).nanoseconds
        self.clock = Clock()
        self.ledger = Ledger(self.blocks, self.clock)
        self.requests: list[CountedRequest] = []
        self.samples: list[dict] = []
        self.row: dict = {}
        self._num_arrived = 0
        self._prefilling: dict[CountedRequest, None] = {}
        # Calendars: by the step before which requests need a block, and by their last step.
        self._crossings: dict[int, list[CountedRequest]] = defaultdict(list)
        self._finishes: dict[int, list[CountedRequest]] = defaultdict(list)
        self._sample_every = self._next_sample = 0

    def run(self, items: Sequence[WorkItem]) -> dict:
        """Serve ``items`` until the last has ended; return the row of measures. Its ``seconds`` is
        the wall time it took.
        """
        started, items = time.perf_counter(), checked_items(items)
        self.requests = _accepted(items, self.blocks, self.clock)
        held_before = self.blocks.num_held
        last_arrival = self.requests[-1].arrived_ns
        self._sample_every = max(last_arrival // NUM_SAMPLES, SECOND // 10)
        collecting = gc.isenabled()
        gc.disable()  # a million tuples and no cycles: looking for some took a sixth of the time
        try:
            self._serve(self.requests)
        finally:
            if collecting:
                gc.enable()
        self.row = {
            "strategy": self.strategy.name,
            "block_size": self.blocks.block_size,
            "num_blocks": self.blocks.num_blocks,
            "batch_size": self.scheduler.max_batch_size,
            "requests": len(items),
            "refused": len(items) - len(self.requests),
            **self.ledger.row(self.requests, self.samples, last_arrival),
            "num_preemptions": self.scheduler.num_preemptions,
            "seconds": time.perf_counter() - started,
        }
        self.blocks.check()
        assert self.blocks.num_held == held_before, "an ended request kept its blocks"
        return self.row

    def _serve(self, coming: list[CountedRequest]) -> None:
        scheduler, clock = self.scheduler, self.clock
        next_arrival = coming[0].arrived_ns
        while True:
            while next_arrival is not None and next_arrival <= clock.now:
                scheduler.add(coming[self._num_arrived])
                arrived = self._num_arrived = self._num_arrived + 1
                next_arrival = coming[arrived].arrived_ns if arrived < len(coming) else None
            if scheduler.running or scheduler.waiting:
                self._step(next_arrival)
            elif next_arrival is None:
                return
            else:
                clock.now = next_arrival

    # --- one step, or many alike ------------------------------------------------------------------

    def _step(self, next_arrival: int | None) -> None:
        scheduler, clock, ledger, step = self.scheduler, self.clock, self.ledger, self.clock.step
        prefills, resumed, unusable = (), (), 0
        due = self._due()
        asks = scheduler.waiting and scheduler.admits
        if due or self._prefilling or asks or (scheduler.stalled and scheduler.may_resume):
            prefills, resumed, unusable = self._decide(due)
        elif scheduler.waiting:
            unusable = scheduler.unusable_blocks
        if self.blocks.moves:
            ledger.copy()
        decoding = ledger.num_decoding
        if not decoding and not prefills:
            return  # no request ran: those that wanted memory failed, or gave way
        prefill_tokens = sum(chunk.num_rows for chunk in prefills) if prefills else 0
        base_ns, token_ns, sequence_ns = self._nanoseconds
        dt = base_ns + token_ns * (decoding + prefill_tokens)
        dt += sequence_ns * (decoding + len(prefills))
        # A refused request that has failed is not in the next step.
        passing = unusable and not scheduler.unusable_blocks
        alone = prefills or self._prefilling or passing
        steps = 1 if alone else self._alike(dt, next_arrival)
        if self._next_sample <= clock.now + dt * (steps - 1):
            self._sample(unusable, dt)
        ledger.pass_time(dt, steps, unusable, bool(scheduler.waiting))
        ledger.totals.written += prefill_tokens
        for request in resumed:
            ledger.totals.gaps[dt] -= 1
            ledger.totals.gaps[clock.now + dt - request.last_ns] += 1

        clock.now += dt * steps
        clock.step = last = step + steps - 1  # the step whose tokens come now
        for request, _, stop in prefills:
            if stop == request.num_tokens:
                self._start_decoding(request)
        if last in self._finishes:
            self._finish_due(last, prefills)
        clock.step = last + 1

    def _due(self) -> list[CountedRequest]:
        """Requests that need a block before this step and did not get it. The oldest is served
        first, as the scheduler does.
        """
        step = self.clock.step
        if step not in self._crossings:
            return []
        due = []
        for request in self._crossings.pop(step):  # some may have lost their place since
            since = request.decoding_since
            if since is not None and request.capacity == request.tokens_then + step - 1 - since:
                due.append(request)
        if len(due) > 1:
            due = sorted(dict.fromkeys(due), key=attrgetter("admission"))
        for request in due:
            request.table.num_tokens = request.capacity
        if self.scheduler.stalled:
            return due
        # While no request waits for a block, growing is all that the scheduler would do.
        grow = self.blocks.grow
        for served, request in enumerate(due):
            if not grow(request.table, request.capacity + 1):
                return due[served:]
            self._grown(request)
        return []

    def _alike(self, dt: int, next_arrival: int | None) -> int:
        """How many steps from this one on differ in nothing but the tokens they add."""
        scheduler, step = self.scheduler, self.clock.step
        limit = MAX_JUMP
        if scheduler.waiting:
            if scheduler.admits:
                return 1
        elif next_arrival is not None:  # up to the first step that starts after the arrival
            limit = min(limit, -((self.clock.now - next_arrival) // dt))
        if scheduler.stalled and scheduler.may_resume:
            return 1
        crossings, finishes = self._crossings, self._finishes
        for ahead in range(1, limit):
            if step + ahead in crossings or step + ahead - 1 in finishes:
                return ahead
        return max(1, limit)

    def _decide(self, due: list[CountedRequest]) -> tuple[list[Chunk], list[CountedRequest], int]:
        """Ask the scheduler. Returns the prompts' chunks, requests that had waited for a block and
        got it, and the blocks free but not usable.
        """
        scheduler, now = self.scheduler, self.clock.now
        plan = scheduler.schedule(now / SECOND, [*due, *self._prefilling])
        for request in (*plan.preempted, *plan.failed):
            if request.capacity:
                self.ledger.leave(request, ended=False)
                self._prefilling.pop(request, None)
        for request in due:
            if request in scheduler.stalled and request.decoding_since is not None:
                self.ledger.stall(request)
        for request in plan.failed:
            request.state, request.finish_reason = RequestState.FAILED, "error"
            request.finished_ns = now
        resumed, prefills = [], []
        for chunk in plan.chunks:
            if chunk.request.state is RequestState.PREFILLING:
                prefills.append(chunk)
                continue
            if chunk.request.decoding_since is None:
                self.ledger.join(chunk.request, chunk.start)
                resumed.append(chunk.request)
            self._grown(chunk.request)
        for request, start, stop in prefills:
            if request not in self._prefilling:
                self._prefilling[request] = None
                self.ledger.admit(request, start)
            self.ledger.compute(stop - start)
        return prefills, resumed, plan.unusable_blocks

    # --- requests ---------------------------------------------------------------------------------

    def _start_decoding(self, request: CountedRequest) -> None:
        """Let a request decode whose tokens are all computed: it has given one now, and gives one
        in each step to come."""
        now = self.clock.now
        del self._prefilling[request]
        if request.first_ns is None:
            request.first_ns = now
        else:
            self.ledger.totals.gaps[now - request.last_ns] += 1
        request.state = RequestState.DECODING
        self.ledger.join(request, request.tokens_then)
        self._grown(request)

    def _grown(self, request: CountedRequest) -> None:
        """Put what comes next for a decoding request into a calendar: its table may have grown."""
        self.ledger.grow(request)
        base = request.tokens_then - request.decoding_since
        if request.final_slots <= request.capacity:
            self._finishes[request.final_slots - base].append(request)
        else:
            self._crossings[request.capacity - base + 1].append(request)

    def _finish_due(self, last: int, prefills: Sequence[Chunk]) -> None:
        """End the requests whose last token came in step ``last``."""
        ended = []
        for request in self._finishes.pop(last):  # some may have lost their place since
            since = request.decoding_since
            if since is not None and request.final_slots == request.tokens_then + last - since:
                ended.append(request)
        if len(ended) > 1:
            # Blocks come back in the engine's order: the oldest first, and after them requests
            # that computed several tokens in this step.
            several = {chunk.request for chunk in prefills if chunk.num_rows > 1}
            ended.sort(key=lambda request: (request in several, request.admission))
        for request in ended:
            request.state, request.finish_reason = RequestState.FINISHED, "length"
            request.finished_ns = self.clock.now
            self.ledger.finish(request)
            self.ledger.leave(request, ended=True)
            self.scheduler.remove(request)

    def _sample(self, unusable: int, dt: int) -> None:
        """Take down the pool as it lies in the first of these steps of ``dt`` that starts when a
        sample is due, or later.
        """
        now, scheduler = self.clock.now, self.scheduler
        ahead = max(0, -((now - self._next_sample) // dt))
        at = now + ahead * dt
        self._next_sample = at + self._sample_every
        if self._foreign:
            self.blocks.check()
        if len(self.samples) == 2 * NUM_SAMPLES:  # longer than requests arrive: keep every other
            del self.samples[1::2]
            self._sample_every *= 2
        arrived = bisect_right(self.requests, at, key=attrgetter("arrived_ns"))
        sample = {
            "started_at": at / SECOND,
            **self.ledger.slots(unusable, ahead),
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting) + arrived - self._num_arrived,
            **self.blocks.stats(),
        }
        self.samples.append(sample)
        if self._on_sample is not None:
            self._on_sample(self, sample, ahead)


def _accepted(
    items: Sequence[WorkItem], blocks: BlockManager, clock: Clock
) -> list[CountedRequest]:
    """Requests that can ever be served, in order of arrival."""
    coming, fits = [], {}
    if blocks.prefix is not None and not any(item.prefix_ids for item in items):
        raise BadInput(
            "prefix caching needs requests with prefix ids: a trace with hash_ids, or the "
            "workload shared-prefix"
        )
    for index, item in enumerate(items):
        slots = item.prompt_tokens + item.limit - 1
        need = blocks.blocks_for(slots)
        if need not in fits:
            fits[need] = blocks.could_ever_hold(slots)
        if not fits[need]:
            continue
        request = CountedRequest(
            f"r{index}", range(item.prompt_tokens), item.limit, output_length=item.output_tokens,
            final_slots=item.prompt_tokens + item.output_tokens - 1,
            tokens_then=item.prompt_tokens, clock=clock,
            arrived_ns=round(item.arrived_at * SECOND), arrived_at=item.arrived_at,
        )  # fmt: skip
        if blocks.prefix is not None and item.prefix_ids:
            request.prefix_ids = _prefix_ids(item, blocks.block_size)
            request.num_ids = len(item.prefix_ids)
            request.ids_per_block = blocks.block_size // item.prefix_block
        coming.append(request)
    if not coming:
        raise BadInput(
            f"no request can be served: none of {len(items)} can ever fit the pool of "
            f"{blocks.num_blocks * blocks.block_size} slots"
        )
    return sorted(coming, key=attrgetter("arrived_ns"))


def _prefix_ids(item: WorkItem, block_size: int) -> tuple[int, ...]:
    """One id a block: an id stands for all before it too, so the last of those in a block names the
    block.
    """
    per_block, rest = divmod(block_size, item.prefix_block)
    if rest:
        raise BadInput(
            f"block_size must be a multiple of {item.prefix_block} to share this trace's prefixes, "
            f"not {block_size}"
        )
    ids = item.prefix_ids[: -(-item.prompt_tokens // item.prefix_block)]
    # A partial last block has an id where the last id reaches the prompt's end.
    partial = len(ids) % per_block and len(ids) * item.prefix_block >= item.prompt_tokens
    return ids[per_block - 1 :: per_block] + (ids[-1:] if partial else ())


def replay(
    items: Sequence[WorkItem],
    strategies: Sequence[str | Callable[[int], Allocator]] = ("paged",),
    *,
    block_sizes: Sequence[int] = (ReplayOptions.block_size,),
    num_blocks: int | str = "unlimited",
    max_seq_len: int | None = None,
    progress: Callable[[Replay], None] | None = None,
    **options,
) -> list[Replay]:
    """Every strategy at every block size on ``items``; each result is a `Replay` that has run, with
    its ``row``.

    ``num_blocks``: a number, ``unlimited``, or a percentage of what ``paged`` holds at its peak
    when unlimited, at the same block size. ``max_seq_len``, the region of ``static``: by default
    the longest request, rounded up to a power of two. ``options`` are those of `Replay`.
    `BadInput` where one makes no sense.
    """
    items = checked_items(items)
    strategies = a_sequence("strategies", strategies, least=1)
    check_names(strategies)
    progress = a_function("progress", progress) or (lambda done: None)
    options["max_seq_len"] = default_max_seq_len(items) if max_seq_len is None else max_seq_len
    given = {each.name for each in fields(ReplayOptions)} & set(options)
    checked = ReplayOptions(num_blocks=1, **{name: options[name] for name in given})
    replays = []
    block_sizes = a_sequence("block_sizes", block_sizes, least=1)
    for block_size in dict.fromkeys(at_least("block_size", size, 1) for size in block_sizes):
        sizes = block_size, checked.max_batch_size, checked.prefix_caching
        unlimited = unlimited_blocks(items, *sizes)
        paged = options | {"growth": None, "oom_policy": "wait", "num_blocks": unlimited}
        peak = partial(_paged_peak, items, paged | {"block_size": block_size})
        pool = _pool(num_blocks, block_size, unlimited, peak)
        for strategy in strategies:
            with blamed_on(strategy):
                each = Replay(strategy, num_blocks=pool, block_size=block_size, **options)
                each.run(items)
                wrong = [name for name, value in each.row.items() if _is_nonsense(value)]
                assert not wrong, f"{wrong[0]} is {each.row[wrong[0]]}"
            replays.append(each)
            progress(each)
    return replays


def _pool(num_blocks: int | str, block_size: int, unlimited: int, peak: Callable[[], int]) -> int:
    """Blocks of a pool given as a number, ``unlimited``, or a percentage of ``peak()``."""
    if not isinstance(num_blocks, str) or num_blocks != "unlimited":
        blocks = pool_blocks(num_blocks, peak, "unlimited, ")
        return at_least("num_blocks", blocks, 1, LARGEST_POOL)
    if unlimited > LARGEST_POOL:
        raise BadInput(
            f"an unlimited pool would need {unlimited} blocks of {block_size}, at most "
            f"{LARGEST_POOL} are possible"
        )
    return unlimited


def _paged_peak(items: Sequence[WorkItem], options: dict) -> int:
    """Blocks that ``paged`` holds at its peak."""
    return Replay("paged", **options).run(items)["peak_blocks"]


def unlimited_blocks(
    items: Sequence[WorkItem], block_size: int, max_batch_size: int, prefix_caching: bool = False
) -> int:
    """Blocks that no workload's run can ever use up, whatever the placement."""
    longest = max(item.prompt_tokens + item.limit - 1 for item in items)
    region = 1 << (-(-longest // block_size) - 1).bit_length()
    blocks = 2 * region * min(max_batch_size, len(items))
    if prefix_caching:
        blocks += sum(-(-item.prompt_tokens // block_size) for item in items)
    return blocks


def _is_nonsense(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
