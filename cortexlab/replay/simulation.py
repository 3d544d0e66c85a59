"""A workload on the engine's own scheduler and block manager, on a virtual clock and without
tensors: an hour in seconds.

The clock counts whole nanoseconds and never looks at the machine. A step takes ``step_time``;
between two steps in which anything is decided (an arrival, an admission, a request that needs a
block or ends) all steps are alike and are taken in one jump:

    step      0    1    2    3 ...       17   18
    a    prefill   d    d    d            d    +block      a decision: step 18
    b              prefill   d            d    d
                             '- one jump -'
"""

import gc
import math
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter, itemgetter

import pandas as pd

from ..allocators import Allocator, blamed_on, check_names, strategy_of
from ..errors import BadInput, at_least
from ..metrics import SHARES, counted_latency_summary, weighted_mean
from ..scheduler.block_manager import BlockManager, BlockTable
from ..scheduler.request import Request, RequestState
from ..scheduler.scheduler import WATERMARK, Chunk, Scheduler
from ..workloads.synthetic import WorkItem, default_max_seq_len, pool_blocks
from .step_time import SECOND, StepTime

LONG_EXTENT = (
    128  # tokens: from here on attention reads an extent at about the speed of one contiguous view
)
MAX_BATCH_SIZE, MAX_STEP_TOKENS = 256, 2048  # vLLM's defaults for a small server
LARGEST_POOL = 1 << 26  # blocks
MAX_JUMP = 256  # steps taken at once
NUM_SAMPLES = 500  # of the pool's state, over the time in which requests arrive

reference = StepTime(
    base_s=0.030, token_s=0.000_01, sequence_s=0.000_1
)  # about 40 ms at 60 sequences and 6,000 prompt tokens a second


@dataclass(eq=False, slots=True)
class Counted(Request):
    """A request of which only the number of tokens counts; it ends after ``output_length`` of them,
    at most ``max_tokens``.
    """

    output_length: int = 1
    final_slots: int = (
        1  # that hold a token when it ends: its last one is sampled, but never written
    )
    clock: "Replay | None" = None
    arrived_ns: int = 0
    first_ns: int | None = None  # end of the step that gave its first token
    last_ns: int = 0  # the same of its last token before it stood still
    finished_ns: int | None = None
    base: int | None = (
        None  # while it decodes, it has base + (number of the step) tokens, prompt and output
    )
    still: int = 0  # while it does not, that many
    in_cache: int = 0  # while it does not decode: its tokens in the cache
    num_ids: int = 0  # of the trace's blocks; ours may hold several
    ids_per_block: int = 1
    table: BlockTable | None = None
    capacity: int = 0  # slots of its table when the totals were last told
    grown_at: float = 0.0  # `Totals.weight` then

    @property
    def num_tokens(self) -> int:
        return self.still if self.base is None else self.base + self.clock.step

    @property
    def internal(self) -> int:
        """Slots it holds and never fills."""
        return max(0, self.capacity - self.final_slots)


@dataclass(slots=True)
class Totals:
    """What is summed over steps. The shares of a step are weighted by its time and divided by its H
    + X (interface.md).
    """

    time: int = 0  # nanoseconds of steps
    weight: float = 0.0  # sum of time / (H + X)
    token: float = 0.0  # of weight * slots, as are the next two; what is left of H is reserved
    internal: float = 0.0
    external: float = 0.0
    decode_tokens: int = 0  # tokens in the cache, summed over every decode step of every request
    decode_slots: int = 0  # the same of slots held
    decode_steps: int = 0  # of all requests
    written: int = 0  # prompt tokens computed
    copied_tokens: int = 0
    copied_blocks: int = 0
    peak_blocks: int = 0
    queued: int = 0  # nanoseconds of steps in which somebody waits
    queued_free: int = 0  # of time * free blocks in them
    prefix_ids: int = 0
    prefix_hits: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    num_extents: int = 0  # of finished requests, as are the next two
    final_tokens: int = 0
    long_tokens: int = 0
    gaps: Counter = field(
        default_factory=Counter
    )  # nanoseconds between two tokens of a request -> how often


class Replay:
    """One strategy on a virtual clock. `run` a workload once; then read the row it returns,
    `samples` and `requests`.

    Arguments as `Engine`. ``prefix_caching`` shares prompt blocks by the workload's prefix ids:
    ``block_size`` must then be theirs or a multiple. Raises `BadInput` for an argument that makes
    no sense, or when no request can ever fit.
    """

    def __init__(
        self,
        strategy: str | Callable[[int], Allocator] = "paged",
        *,
        num_blocks: int,
        block_size: int = 16,
        growth: str | None = None,
        oom_policy: str = "wait",
        max_batch_size: int = MAX_BATCH_SIZE,
        max_step_tokens: int | None = None,
        max_seq_len: int | None = None,
        prefix_caching: bool = False,
        watermark: float = WATERMARK,
        step_time: StepTime = reference,
    ):
        at_least("max-batch-size", max_batch_size, 1)
        step_tokens = (
            max(MAX_STEP_TOKENS, max_batch_size) if max_step_tokens is None else max_step_tokens
        )
        self.strategy = strategy_of(strategy, growth)
        self._foreign = callable(
            strategy
        )  # the user's own: its books are looked at with every sample
        self.blocks = BlockManager(
            self.strategy, num_blocks, block_size, max_seq_len, prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_size=max_batch_size,
            max_step_tokens=step_tokens,
            oom_policy=oom_policy,
            watermark=watermark,
        )
        self._nanoseconds = step_time.nanoseconds
        self.step = 0
        self.now = 0  # nanoseconds
        self.requests: list[Counted] = []
        self.samples: list[dict] = []
        self.row: dict = {}
        self.totals = Totals()
        self._num_arrived = 0
        self._num_decoding = 0
        self._base_sum = 0  # of the decoding requests
        self._decode_slots = 0  # they hold
        self._still_tokens = 0  # in the cache, of those that do not decode
        self._internal = 0  # slots held that are never filled
        self._prefilling: dict[Counted, None] = {}
        self._crossings: dict[int, list[Counted]] = defaultdict(
            list
        )  # by the step before which they need a block
        self._sample_every = self._next_sample = 0
        self._finishes: dict[int, list[Counted]] = defaultdict(
            list
        )  # by the step after which they have ended

    def run(self, items: Sequence[WorkItem]) -> dict:
        """Serve ``items`` until the last has ended; the row of `interface.md`. ``seconds`` is the
        wall time it took.
        """
        started = time.perf_counter()
        self.requests, refused = self._accept(items)
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
        self.row = self._row(refused, last_arrival) | {"seconds": time.perf_counter() - started}
        self.blocks.check()
        assert self.blocks.num_held == held_before, (
            "a request ended and its blocks did not come back"
        )
        return self.row

    def _serve(self, coming: list[Counted]) -> None:
        scheduler, arrived = self.scheduler, 0
        self._num_arrived = 0
        next_arrival = coming[0].arrived_ns
        while True:
            while next_arrival is not None and next_arrival <= self.now:
                scheduler.add(coming[arrived])
                arrived = self._num_arrived = arrived + 1
                next_arrival = coming[arrived].arrived_ns if arrived < len(coming) else None
            if scheduler.running or scheduler.waiting:
                self._step(next_arrival)
            elif next_arrival is None:
                return
            else:
                self.now = next_arrival

    # --- one step, or many alike ------------------------------------------------------------------

    def _step(self, next_arrival: int | None) -> None:
        scheduler, blocks, step = self.scheduler, self.blocks, self.step
        prefills, resumed, unusable = (), (), 0
        due = self._due()
        if (
            due
            or self._prefilling
            or (scheduler.waiting and scheduler.admits)
            or (scheduler.stalled and scheduler.may_resume)
        ):
            prefills, resumed, unusable = self._decide(due)
        elif scheduler.waiting:
            unusable = scheduler.unusable_blocks
        if blocks.moves:
            self._count_moves()
        decoding = self._num_decoding
        if not decoding and not prefills:
            return  # nobody ran: what was wanted failed, or gave way
        prefill_tokens = sum(stop - start for _, start, stop in prefills) if prefills else 0
        base_ns, token_ns, sequence_ns = self._nanoseconds
        dt = (
            base_ns
            + token_ns * (decoding + prefill_tokens)
            + sequence_ns * (decoding + len(prefills))
        )
        passing = (
            unusable and not scheduler.unusable_blocks
        )  # who was refused has failed: nobody is in the next step
        steps = 1 if prefills or self._prefilling or passing else self._alike(dt, next_arrival)
        if self._next_sample <= self.now + dt * (steps - 1):
            self._sample(unusable, dt)
        self._add(dt, steps, unusable)
        totals = self.totals
        totals.written += prefill_tokens
        for request in resumed:
            totals.gaps[dt] -= 1
            totals.gaps[self.now + dt - request.last_ns] += 1

        self.now += dt * steps
        self.step = last = step + steps - 1  # the step whose tokens come now
        for request, _, stop in prefills:
            if stop == request.num_tokens:
                self._start_decoding(request)
        if last in self._finishes:
            ended = [
                r
                for r in self._finishes.pop(last)
                if r.base is not None and r.final_slots == r.base + last
            ]
            if (
                len(ended) > 1
                # their blocks come back in the engine's order: the oldest first, who computed
                # several tokens last
            ):
                several = {request for request, start, stop in prefills if stop - start > 1}
                ended.sort(key=lambda request: (request in several, request.admission))
            for request in ended:
                self._finish(request)
        self.step = last + 1

    def _add(self, dt: int, steps: int, unusable: int) -> None:
        """To the totals: ``steps`` steps of ``dt``, in each of which every decoding request gains a
        token.
        """
        totals, blocks, decoding = self.totals, self.blocks, self._num_decoding
        held, size = blocks.num_held, blocks.block_size
        decode_tokens = (self._base_sum + decoding * self.step) * steps + decoding * steps * (
            steps - 1
        ) // 2
        still = self._still_tokens - (
            blocks.prefix.num_shared * size if blocks.prefix is not None else 0
        )
        weight = dt / ((held + unusable) * size)
        totals.time += dt * steps
        totals.weight += weight * steps
        totals.token += weight * (decode_tokens + still * steps)
        if self._internal:
            totals.internal += weight * self._internal * steps
        if unusable:
            totals.external += weight * unusable * size * steps
        totals.decode_tokens += decode_tokens
        totals.decode_slots += self._decode_slots * steps
        totals.decode_steps += decoding * steps
        totals.gaps[dt] += decoding * steps
        if held > totals.peak_blocks:
            totals.peak_blocks = held
        if self.scheduler.waiting:
            totals.queued += dt * steps
            totals.queued_free += dt * steps * (blocks.num_blocks - held)

    def _due(self) -> list[Counted]:
        """Who needs a block before this step and did not get it. The oldest is served first, as the
        scheduler does.
        """
        step = self.step
        if step not in self._crossings:
            return []
        full = (
            step - 1
            # a request crosses when its table is; other entries are of requests that lost their
            # place
        )
        due = [
            request
            for request in self._crossings.pop(step)
            if request.base is not None and request.capacity == request.base + full
        ]
        if len(due) > 1:
            due = sorted(dict.fromkeys(due), key=attrgetter("admission"))
        for request in due:
            request.num_computed = request.table.num_tokens = request.capacity
        if self.scheduler.stalled:
            return due
        grow, grown = (
            self.blocks.grow,
            self._grown,
        )  # while nobody waits for a block, growing is all that the scheduler would do
        for served, request in enumerate(due):
            if not grow(request.id, request.base + step):
                return due[served:]
            grown(request)
        return []

    def _alike(self, dt: int, next_arrival: int | None) -> int:
        """How many steps from this one on differ in nothing but the tokens they add."""
        scheduler, step = self.scheduler, self.step
        limit = MAX_JUMP
        if scheduler.waiting:
            if scheduler.admits:
                return 1
        elif next_arrival is not None:
            limit = min(
                limit, -((self.now - next_arrival) // dt)
            )  # up to the first step that starts with it there
        if scheduler.stalled and scheduler.may_resume:
            return 1
        crossings, finishes = self._crossings, self._finishes
        for ahead in range(1, limit):
            if step + ahead in crossings or step + ahead - 1 in finishes:
                return ahead
        return max(1, limit)

    def _decide(self, due: list[Counted]) -> tuple[list[Chunk], list[Counted], int]:
        """Ask the scheduler. The prompts' chunks, who had waited for a block and got it, and the
        blocks free but not usable.
        """
        scheduler = self.scheduler
        plan = scheduler.schedule(self.now / SECOND, [*due, *self._prefilling])
        for request in (*plan.preempted, *plan.failed):
            if request.table is not None:
                self._leave(request, ended=False)
        for request in due:
            if request in scheduler.stalled and request.base is not None:
                self._stall(request)
        for request in plan.failed:
            request.state, request.finish_reason, request.finished_ns = (
                RequestState.FAILED,
                "error",
                self.now,
            )
        resumed = self._decode(
            [chunk for chunk in plan.chunks if chunk.request.state is RequestState.DECODING]
        )
        prefills = [
            chunk for chunk in plan.chunks if chunk.request.state is RequestState.PREFILLING
        ]
        self._prefill(prefills)
        return prefills, resumed, plan.unusable_blocks

    # --- requests ---------------------------------------------------------------------------------

    def _prefill(self, chunks: Sequence[Chunk]) -> None:
        """Take note of prompt tokens computed in this step, and of who was admitted for them."""
        for request, start, stop in chunks:
            table = self.blocks.tables[request.id]
            if request.table is not table:  # admitted
                request.table, request.capacity, request.grown_at = (
                    table,
                    table.capacity,
                    self.totals.weight,
                )
                request.in_cache = start
                self._still_tokens += start
                self._internal += request.internal
                self._prefilling[request] = None
                if request.num_preemptions == 0:
                    self._count_prefix(request)
            self._still_tokens += stop - start
            request.in_cache = request.num_computed = stop

    def _start_decoding(self, request: Counted) -> None:
        """Its tokens are all computed: it has given one now, and another in each step to come."""
        del self._prefilling[request]
        if request.first_ns is None:
            request.first_ns = self.now
        else:
            self.totals.gaps[self.now - request.last_ns] += 1
        request.state = RequestState.DECODING
        self._join(request, request.num_tokens - self.step)
        self._grown(request)

    def _decode(self, chunks: Sequence[Chunk]) -> list[Counted]:
        """Take note of decoding requests that got the block they needed; those that had been
        waiting for it.
        """
        resumed = []
        for request, _, stop in chunks:
            if request.base is None:
                self._join(request, stop - self.step)
                resumed.append(request)
            self._grown(request)
        return resumed

    def _join(self, request: Counted, base: int) -> None:
        """From now on it has ``base`` + (number of the step) tokens. What happens to it next is for
        `_grown` to say.
        """
        self._still_tokens -= request.in_cache
        self._num_decoding += 1
        self._base_sum += base
        self._decode_slots += request.capacity
        request.base = base

    def _part(self, request: Counted) -> None:
        """It decodes no more."""
        self._num_decoding -= 1
        self._base_sum -= request.base
        self._decode_slots -= request.capacity
        request.base = None

    def _grown(self, request: Counted) -> None:
        """It decodes, and its table may have grown: what happens to it next?"""
        before, final = request.capacity, request.final_slots
        capacity = request.table.num_blocks * self.blocks.block_size
        if capacity != before:
            request.capacity, request.grown_at = capacity, self.totals.weight
            self._decode_slots += capacity - before
        if final <= capacity:
            self._internal += capacity - max(final, before)
            self._finishes[final - request.base].append(request)
        else:
            self._crossings[capacity - request.base + 1].append(request)

    def _stall(self, request: Counted) -> None:
        """It stands still with what it holds until there is a block for it."""
        tokens = request.num_tokens
        self._part(request)
        request.still, request.in_cache, request.last_ns = tokens, tokens - 1, self.now
        self._still_tokens += tokens - 1

    def _leave(self, request: Counted, ended: bool) -> None:
        """Its blocks are gone. Where it had not ``ended``, slots thought reserved turn out to have
        been internal.
        """
        if request.base is not None:
            tokens = request.num_tokens
            self._part(request)
            request.still, request.in_cache, request.last_ns = tokens, tokens - 1, self.now
        else:
            self._still_tokens -= request.in_cache
            self._prefilling.pop(request, None)
        self._internal -= request.internal
        if not ended:
            never = min(request.capacity, request.final_slots) - request.in_cache
            self.totals.internal += (self.totals.weight - request.grown_at) * never
        request.table = None

    def _finish(self, request: Counted) -> None:
        totals, table = self.totals, request.table
        extents, slots = table.all_extents, self.blocks.block_size
        totals.num_extents += len(extents)
        totals.final_tokens += request.final_slots
        left = request.final_slots
        for _, num_blocks in (
            extents if max(map(itemgetter(1), extents)) * slots >= LONG_EXTENT else ()
        ):
            if num_blocks * slots >= LONG_EXTENT:
                totals.long_tokens += max(
                    0, min(left, num_blocks * slots)
                )  # nothing in an extent behind its last token
            left -= num_blocks * slots
        request.state, request.finish_reason, request.finished_ns = (
            RequestState.FINISHED,
            "length",
            self.now,
        )
        self._leave(request, ended=True)
        self.scheduler.remove(request)

    # --- before and after -------------------------------------------------------------------------

    def _accept(self, items: Sequence[WorkItem]) -> tuple[list[Counted], int]:
        """Requests that can ever be served, in order of arrival; number of the others."""
        coming, fits = [], {}
        if self.blocks.prefix is not None and not any(item.prefix_ids for item in items):
            raise BadInput(
                "prefix caching needs requests with prefix ids: a trace with hash_ids, or the "
                "workload shared-prefix"
            )
        for index, item in enumerate(items):
            limit = max(item.output_tokens, item.max_tokens or 0)
            slots = item.prompt_tokens + limit - 1
            need = self.blocks.blocks_for(slots)
            if need not in fits:
                fits[need] = self.blocks.could_ever_hold(slots)
            if fits[need]:
                final = item.prompt_tokens + item.output_tokens - 1
                request = Counted(
                    f"r{index}",
                    range(item.prompt_tokens),
                    limit,
                    output_length=item.output_tokens,
                    final_slots=final,
                    still=item.prompt_tokens,
                    clock=self,
                    arrived_ns=round(item.arrived_at * SECOND),
                    arrived_at=item.arrived_at,
                )
                if self.blocks.prefix is not None and item.prefix_ids:
                    request.prefix_ids = self._prefix_ids(item)
                    request.num_ids, request.ids_per_block = (
                        len(item.prefix_ids),
                        self.blocks.block_size // item.prefix_block,
                    )
                coming.append(request)
        if not coming:
            slots = self.blocks.num_blocks * self.blocks.block_size
            raise BadInput(
                f"no request can be served: none of {len(items)} can ever fit the pool of {slots} "
                "slots"
            )
        coming.sort(key=attrgetter("arrived_ns"))
        return coming, len(items) - len(coming)

    def _prefix_ids(self, item: WorkItem) -> tuple[int, ...]:
        """One id a block: an id stands for all before it too, so the last of those in a block names
        the block.
        """
        per_block, rest = divmod(self.blocks.block_size, item.prefix_block)
        if rest:
            raise BadInput(
                f"block-size must be a multiple of {item.prefix_block} to share this trace's "
                f"prefixes, not {self.blocks.block_size}"
            )
        ids = item.prefix_ids[: -(-item.prompt_tokens // item.prefix_block)]
        partial = (
            len(ids) % per_block and len(ids) * item.prefix_block >= item.prompt_tokens
        )  # else its last id does not reach the end
        return ids[per_block - 1 :: per_block] + (ids[-1:] if partial else ())

    def _count_prefix(self, request: Counted) -> None:
        totals = self.totals
        totals.prompt_tokens += len(request.prompt)
        totals.prefix_ids += request.num_ids
        totals.prefix_hits += min(request.table.num_found * request.ids_per_block, request.num_ids)
        totals.hit_tokens += min(
            request.table.num_found * self.blocks.block_size, len(request.prompt)
        )
        request.cached_tokens = request.in_cache

    def _count_moves(self) -> None:
        for move in self.blocks.moves:
            self.totals.copied_tokens += move.num_tokens
            self.totals.copied_blocks += self.blocks.blocks_for(move.num_tokens)
        self.blocks.moves.clear()

    def _sample(self, unusable: int, dt: int) -> None:
        """The pool as it lies in the first of these steps of ``dt`` that starts when a sample is
        due, or later.
        """
        ahead = max(0, -((self.now - self._next_sample) // dt))
        at = self.now + ahead * dt
        self._next_sample = at + self._sample_every
        blocks, scheduler = self.blocks, self.scheduler
        pool, size = blocks.stats(), blocks.block_size
        arrived = (
            bisect_right(self.requests, at, key=attrgetter("arrived_ns")) - self._num_arrived
        )  # since these steps began
        shared = blocks.prefix.num_shared if blocks.prefix is not None else 0
        held = blocks.num_held * size
        token = (
            self._still_tokens
            + self._base_sum
            + self._num_decoding * (self.step + ahead)
            - shared * size
        )
        slots = {
            "token": token,
            "reserved": held - token - self._internal,
            "internal": self._internal,
        }
        if self._foreign:
            blocks.check()
        if (
            len(self.samples) == 2 * NUM_SAMPLES
        ):  # it takes longer than the requests took to arrive: every other one will do
            del self.samples[1::2]
            self._sample_every *= 2
        self.samples.append(
            {
                "started_at": at / SECOND,
                **{f"{name}_slots": count for name, count in slots.items()},
                "external_slots": unusable * size,
                "pool_slots": blocks.num_blocks * size,
                "num_running": len(scheduler.running),
                "num_waiting": len(scheduler.waiting) + arrived,
                **pool,
            }
        )

    def _row(self, refused: int, last_arrival: int) -> dict:
        totals, blocks = self.totals, self.blocks
        done = [request for request in self.requests if request.state is RequestState.FINISHED]
        duration = self.now / SECOND
        outputs = sum(request.output_length for request in done)
        inputs = sum(len(request.prompt) for request in done)
        latency = {
            "ttft": Counter(request.first_ns - request.arrived_ns for request in done),
            "tpot": Counter(
                (r.finished_ns - r.first_ns) / (r.output_length - 1)
                for r in done
                if r.output_length > 1
            ),
            "itl": totals.gaps,
            "e2el": Counter(request.finished_ns - request.arrived_ns for request in done),
        }
        parts = {"token": totals.token, "internal": totals.internal, "external": totals.external}
        parts["reserved"] = max(
            0.0, totals.time - math.fsum(parts.values())
        )  # not `sum`: Python 3.12 adds floats in another way
        spans = [
            after["started_at"] - sample["started_at"]
            for sample, after in pairwise([*self.samples, {"started_at": duration}])
        ]
        caching = blocks.prefix is not None and totals.prefix_ids > 0
        return {
            "strategy": self.strategy.name,
            "block_size": blocks.block_size,
            "num_blocks": blocks.num_blocks,
            "batch_size": self.scheduler.max_batch_size,
            "requests": len(self.requests) + refused,
            "completed": len(done),
            "completed_by_last_arrival": sum(
                request.finished_ns <= last_arrival for request in done
            ),
            "refused": refused,
            "failed": len(self.requests) - len(done),
            "tokens": inputs + outputs,
            "duration": duration,
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": len(done) / duration if duration else None,
            "output_throughput": outputs / duration if duration else None,
            **counted_latency_summary(latency),
            **{
                f"{name}_share": parts[name] / totals.time if totals.time else None
                for name in SHARES
            },
            "utilization": totals.decode_tokens / totals.decode_slots
            if totals.decode_slots
            else None,
            "mean_live_tokens": totals.decode_tokens / totals.decode_steps
            if totals.decode_steps
            else None,
            **{
                name: weighted_mean(
                    (span, sample[name]) for span, sample in zip(spans, self.samples, strict=True)
                )
                for name in ("external_fragmentation", "num_holes")
            },
            "prefix_hit_rate": totals.prefix_hits / totals.prefix_ids if caching else None,
            "prefix_hit_tokens_rate": totals.hit_tokens / totals.prompt_tokens if caching else None,
            "long_extent_share": totals.long_tokens / totals.final_tokens if done else None,
            "extents_per_sequence": totals.num_extents / len(done) if done else None,
            "peak_blocks": totals.peak_blocks,
            "empty_share": totals.queued_free / totals.queued / blocks.num_blocks
            if totals.queued
            else None,
            "copied_blocks": totals.copied_blocks,
            "copied_share": totals.copied_tokens / (totals.written + totals.decode_steps)
            if totals.written
            else None,
            "num_preemptions": self.scheduler.num_preemptions,
        }


def replay(
    items: Sequence[WorkItem],
    strategies: Sequence[str | Callable[[int], Allocator]] = ("paged",),
    *,
    block_sizes: Sequence[int] = (16,),
    num_blocks: int | str = "unlimited",
    max_batch_size: int = MAX_BATCH_SIZE,
    max_seq_len: int | None = None,
    progress: Callable[[Replay], None] = lambda done: None,
    **options,
) -> list[Replay]:
    """Every strategy at every block size on ``items``; each result is a `Replay` that has run, with
    its ``row``.

    ``num_blocks``: a number, ``unlimited``, or a percentage of what ``paged`` holds at its peak
    when unlimited, at the same block size. ``max_seq_len``, the region of ``static``: by default
    the longest request, rounded up to a power of two. ``options`` are those of `Replay`. Raises
    `BadInput` before anything runs.
    """
    at_least("max-batch-size", max_batch_size, 1)
    check_names(strategies)
    options |= {
        "max_batch_size": max_batch_size,
        "max_seq_len": max_seq_len or default_max_seq_len(items),
    }
    caching = options.get("prefix_caching", False)
    replays = []
    for block_size in dict.fromkeys(block_sizes):
        at_least("block-size", block_size, 1)
        unlimited = unlimited_blocks(items, block_size, max_batch_size, caching)

        def peak(block_size=block_size, unlimited=unlimited) -> int:
            paged = options | {"growth": None, "oom_policy": "wait"}
            return Replay("paged", num_blocks=unlimited, block_size=block_size, **paged).run(items)[
                "peak_blocks"
            ]

        if num_blocks == "unlimited" and unlimited > LARGEST_POOL:
            raise BadInput(
                f"an unlimited pool would need {unlimited} blocks of {block_size}, at most "
                f"{LARGEST_POOL} are possible"
            )
        pool = at_least(
            "num-blocks",
            unlimited if num_blocks == "unlimited" else pool_blocks(num_blocks, peak),
            1,
            LARGEST_POOL,
        )
        for strategy in strategies:
            with blamed_on(strategy):
                each = Replay(strategy, num_blocks=pool, block_size=block_size, **options)
                each.run(items)
                wrong = [
                    name
                    for name, value in each.row.items()
                    if isinstance(value, float) and not math.isfinite(value)
                ]
                assert not wrong, f"{wrong[0]} is {each.row[wrong[0]]}"
            replays.append(each)
            progress(each)
    return replays


def tables(replays: Sequence[Replay]) -> dict[str, pd.DataFrame]:
    """``rows``, ``requests`` (times in seconds of the virtual clock) and ``steps`` (the pool's
    state, sampled) of what has run.
    """
    requests, samples = [], []
    for each in replays:
        which = {"strategy": each.strategy.name, "block_size": each.blocks.block_size}
        ends = [sample["started_at"] for sample in each.samples[1:]] + [each.now / SECOND]
        samples += [
            which | {"repeat": 0, "ended_at": end} | sample
            for sample, end in zip(each.samples, ends, strict=True)
        ]
        requests += [which | _told(request) for request in each.requests]
    return {
        "rows": pd.DataFrame([each.row for each in replays]),
        "requests": pd.DataFrame(requests),
        "steps": pd.DataFrame(samples),
    }


def _told(request: Counted) -> dict:
    stamps = {
        "arrived_at": request.arrived_ns,
        "first_token_at": request.first_ns,
        "finished_at": request.finished_ns,
    }
    return {
        "request": request.id,
        "state": str(request.state),
        "prompt_tokens": len(request.prompt),
        "output_tokens": request.output_length,
        **{name: None if at is None else at / SECOND for name, at in stamps.items()},
        "cached_tokens": request.cached_tokens,
        "num_preemptions": request.num_preemptions,
        "error": request.error,
    }


def unlimited_blocks(
    items: Sequence[WorkItem], block_size: int, max_batch_size: int, prefix_caching: bool = False
) -> int:
    """Blocks that no workload's run can ever use up, whatever the placement."""
    longest = max(
        item.prompt_tokens + max(item.output_tokens, item.max_tokens or 0) - 1 for item in items
    )
    region = 1 << (-(-longest // block_size) - 1).bit_length()
    blocks = 2 * region * min(max_batch_size, len(items))
    if prefix_caching:
        blocks += sum(-(-item.prompt_tokens // block_size) for item in items)
    return blocks
