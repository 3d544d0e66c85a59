"""Continuous batching: which tokens of which requests run in the next step. Integers only.

A request has ``num_tokens`` tokens, of which ``num_computed`` have their K and V in the cache. A
step computes some more of them; the chunk that reaches the last token is followed by sampling.
Prefill, decode and recomputation after a preemption are all this.
"""

from bisect import insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from ..errors import at_least, one_of, share
from ..options import OOM_POLICIES, WATERMARK
from .block_manager import BlockManager
from .block_table import Need, Way
from .layer_groups import copies
from .request import Request, RequestState

_queue_order = attrgetter("priority", "number")
_batch_order = attrgetter("priority", "admission")


class Chunk(NamedTuple):
    """Tokens ``start .. stop - 1`` of a request, run in one step, one row each."""

    request: Request
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def samples(self) -> bool:
        """Whether a new token is sampled after this chunk; ask before it is pending."""
        return self.stop == self.request.num_tokens


@dataclass(slots=True)
class Schedule:
    """One step: chunks of one row (``decode``, even of a prompt) and of several (``prefill``);
    requests out of memory that failed or were preempted; free blocks of no use to the queue's head.
    """

    decode: list[Chunk] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    failed: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    unusable_blocks: int = 0

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks in the order of their rows."""
        return [*self.decode, *self.prefill]


class Scheduler:
    """First come, first served within a priority, up to ``max_batch_size`` running requests and
    ``max_step_tokens`` tokens per step.

    A lower ``priority`` stands further ahead in the queue and is preempted later; it alone
    preempts no request. Running requests with one token to compute come first, so that a long
    prompt never holds them up; prompts share the tokens left.

    When memory is out, ``oom_policy`` decides. ``wait``: the request waits, in the queue or with
    the blocks it holds; only when all running ones wait for each other, the last goes back to the
    queue: the youngest of the last priority. ``fail``: it fails at once. ``preempt``: the last
    running request gives way. A request that lost its blocks computes its tokens again later; with
    ``swap``, a pool on the host, they are copied there and back while it has room.

    ``watermark``: share of the pool that an admission must leave free for running requests to grow
    into (vLLM's idea); not for ``reserve`` or ``fail``.

    Three ways to wait: refused at the head of the queue (``_refused``); ``stalled``, running but
    refused a block; stalled until the next step by a deferred relocation (``is_deferred``). Each is
    kept with the block manager's ``num_releases``, which changes when blocks come back or a
    deferral ends: until then the allocator is not asked again.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_size: int,
        max_step_tokens: int,
        oom_policy: str = "wait",
        watermark: float = WATERMARK,
        swap: BlockManager | None = None,
    ):
        self.blocks = blocks
        self.max_batch_size = at_least("max_batch_size", max_batch_size, 1)
        self.max_step_tokens = at_least("max_step_tokens", max_step_tokens, max_batch_size)
        self.oom_policy = one_of("oom_policy", oom_policy, OOM_POLICIES)
        grows = blocks.growth != "reserve" and oom_policy != "fail"
        self.kept_blocks = int(share("watermark", watermark) * blocks.num_blocks) if grows else 0
        self.swap = swap
        self.waiting: list[Request] = []  # by priority, then first come, first served
        self.running: list[Request] = []  # by priority, then the oldest first: the last gives way
        self.stalled: dict[Request, int] = {}  # running, refused a block: `num_releases` then
        self.num_preemptions = 0
        self.num_prefix_ids = self.num_found_ids = 0  # of prompts at their first admission
        self._now = 0.0  # time of the step being planned
        self._num_added = self._num_admissions = 0
        self._refused: tuple[Request, int] | None = None  # head of the queue, `num_releases` then

    def add(self, request: Request) -> None:
        self._num_added += 1
        request.number = self._num_added
        self._queue(request)

    def remove(self, request: Request, prefix_ids: Sequence[Hashable] = ()) -> None:
        """Take an ended request out, its blocks back; ``prefix_ids`` as in `BlockManager.free`."""
        if request.table is not None:
            self._leave(request, prefix_ids)
        else:
            self.waiting.remove(request)
            self._forget_swapped(request)

    @property
    def admits(self) -> bool:
        """Whether the next step may admit from the queue."""
        room = len(self.running) < self.max_batch_size and not self.stalled
        return bool(self.waiting) and room and not self._refused_before()

    @property
    def may_resume(self) -> bool:
        """Whether blocks have come back since a running request was refused one."""
        return any(refused != self.blocks.num_releases for refused in self.stalled.values())

    @property
    def unusable_blocks(self) -> int:
        """Free blocks of no use to the head of the queue: all, if enough for it, yet it waits."""
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return 0
        free = self.blocks.free_blocks
        return free if self.blocks.blocks_wanted(self.waiting[0].need) <= free else 0

    def schedule(self, now: float, due: Sequence[Request] | None = None) -> Schedule:
        """Plan the next step: running requests first, then of the queue what there is room for.

        ``due``, for replays: running requests to look at (default: all). The others must be
        decoding with room for their next token; they get no chunk, and the caller counts their
        tokens.
        """
        step, self._now = Schedule(), now
        prefilling, gave_way = self._plan_running(due, step), 0
        while self.running and self._all_wait():
            last = self.running[-1]
            if len(self.running) == 1 and last.num_tokens - last.num_computed > 1:
                self._leave(last)  # alone, a prompt would come back to where it is
                self._fail(last, step)
                break
            self._preempt(last, step)
            gave_way = len(step.preempted)
            prefilling = self._plan_running(None if due is None else (), step)
        prefilling = [each for each in prefilling if each.table is not None]
        num_decoding = len(self.running) - len({*self.stalled, *prefilling})
        budget = self.max_step_tokens - num_decoding
        for request in prefilling:
            if budget and self._make_room(request, budget, step):
                budget -= self._compute(request, budget, step)
        # Short of memory, no request is admitted; requests that gave way above may come back.
        short = bool(self.stalled or step.failed or step.preempted[gave_way:])
        self._admit(budget, short, step)
        for request, _, stop in step.chunks:
            request.table.num_tokens = stop
        return step

    def _all_wait(self) -> bool:
        """Whether all running requests wait for each other, and none for copies."""
        return len(self.stalled) == len(self.running) and not self.blocks.is_deferred

    def restart_all(self, requests: Iterable[Request], now: float) -> None:
        """Queue the ``requests`` that have not ended, and no others; the pools were cleared."""
        self.running, self.waiting, self.stalled, self._refused = [], [], {}, None
        for request in requests:
            if request.table is not None:
                request.fills.append(request.table.num_tokens)
            request.table = request.swapped = None
            request.num_pending = 0
            if request.finish_reason is not None:
                continue
            request.error = None
            if request.state in (RequestState.PREFILLING, RequestState.DECODING):
                self._back_to_queue(request, now)
            else:
                self._queue(request)

    def forget_prefixes(self) -> None:
        """Let no later prompt find what was computed until now."""
        if self.blocks.prefix is not None:
            self.blocks.prefix.forget_all()
        for request in self.waiting:
            self._forget_swapped(request)

    def _plan_running(self, due: Sequence[Request] | None, step: Schedule) -> list[Request]:
        """Plan the running requests with one token to compute; return those with more."""
        asked = sorted({*due, *self.stalled}, key=_batch_order) if due is not None else self.running
        prefilling = []
        for request in list(asked):
            if request.state is RequestState.PREEMPTED or request.is_full:
                continue  # gave way a moment ago, or its last token is on its way
            if request.num_tokens - request.num_computed > 1:
                prefilling.append(request)
                if self.stalled.get(request) != self.blocks.num_releases:
                    self.stalled.pop(request, None)
            elif self._make_room(request, 1, step):
                self._compute(request, 1, step)
        return prefilling

    def _admit(self, budget: int, short: bool, step: Schedule) -> None:
        """Admit from the queue while there is room; if ``short``, only see what its head wants."""
        enough_but_refused = False  # free blocks, for the head of the queue
        failed_before = len(step.failed)
        while self.waiting and budget and len(self.running) < self.max_batch_size:
            request = self.waiting[0]
            if short or not self._allocate(request, budget):
                wanted = self.blocks.blocks_wanted(request.need)
                enough_but_refused |= wanted <= self.blocks.free_blocks
                if self.oom_policy != "fail" or short:
                    break
                self._fail(self.waiting.pop(0), step)
                continue
            self.waiting.pop(0)
            self._num_admissions += 1
            request.enter(RequestState.PREFILLING, self._now)
            request.admission = self._num_admissions
            insort(self.running, request, key=_batch_order)
            if request.scheduled_at is None:
                request.scheduled_at, request.cached_tokens = self._now, request.num_computed
                self.num_prefix_ids += len(request.prefix_ids)
                self.num_found_ids += request.table.num_found
            budget -= self._compute(request, budget, step)
        if self.waiting and not (self.running or len(step.failed) > failed_before or short):
            self._fail(self.waiting.pop(0), step)  # refused by an empty pool: hopeless
        step.unusable_blocks = self.blocks.free_blocks if enough_but_refused else 0

    def _compute(self, request: Request, budget: int, step: Schedule) -> int:
        """Put up to ``budget`` tokens of a request into the step; return how many."""
        start = request.num_computed
        chunk = Chunk(request, start, min(request.num_tokens, start + budget))
        (step.decode if chunk.num_rows == 1 else step.prefill).append(chunk)
        return chunk.num_rows

    def _allocate(self, request: Request, budget: int) -> bool:
        """Give the head of the queue its blocks, and its swapped tokens back."""
        if self._refused_before():
            return False
        self._refused = None
        num_back = request.swapped.num_tokens if request.swapped else 0
        need = request.need._replace(num_back=num_back, chunk=budget)
        kept = self.kept_blocks if self.running else 0  # for running ones to grow
        low = kept and self.blocks.free_blocks < self.blocks.blocks_wanted(need) + kept
        table = None if low else self.blocks.allocate(need)
        if table is None:
            self._refused = (request, self.blocks.num_releases)
            return False
        request.table = table
        if swapped := request.swapped:
            if num_back > table.num_tokens:
                self.blocks.moves += copies(swapped, table, Way.BACK)
                table.num_tokens = num_back
            self._forget_swapped(request)
        return True

    def _refused_before(self) -> bool:
        return self._refused == (self.waiting[0], self.blocks.num_releases)

    def _make_room(self, request: Request, budget: int, step: Schedule) -> bool:
        """Grow the request's table for up to ``budget`` tokens, or do what ``oom_policy`` says;
        False if it does not run.
        """
        if self.stalled.pop(request, None) == self.blocks.num_releases:  # nothing came back
            self.stalled[request] = self.blocks.num_releases
            return False
        num_tokens = min(request.num_tokens, request.num_computed + budget)
        is_prefilling = request.num_tokens - request.num_computed > 1  # after those that decode
        while not self.blocks.grow(request.table, num_tokens):
            if self.oom_policy == "fail" and not self.blocks.is_deferred:
                self._leave(request)
                self._fail(request, step)
                return False
            if self.oom_policy != "preempt" or self.blocks.is_deferred or is_prefilling:
                self.stalled[request] = self.blocks.num_releases
                return False
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is request:
                return False
        return True

    def _queue(self, request: Request) -> None:
        if not self.waiting or _queue_order(self.waiting[-1]) < _queue_order(request):
            self.waiting.append(request)
        else:
            insort(self.waiting, request, key=_queue_order)

    def _leave(self, request: Request, prefix_ids: Sequence[Hashable] = ()) -> None:
        self.running.remove(request)
        self.stalled.pop(request, None)
        request.fills.append(request.table.num_tokens)
        self.blocks.free(request.table, prefix_ids)
        request.table = None

    def _preempt(self, request: Request, step: Schedule) -> None:
        """Send a request back to the queue, its tokens swapped out where there is room."""
        table, num_tokens = request.table, request.num_computed
        kept = num_tokens and not table.is_old  # what is computed again may be shared
        need = Need(num_tokens, num_tokens, num_back=num_tokens)
        if self.swap and kept and (out := self.swap.allocate(need)):
            self.blocks.moves += copies(table, out, Way.OUT)
            request.swapped, out.num_tokens = out, num_tokens
        self._leave(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._back_to_queue(request, self._now)
        step.preempted.append(request)

    def _back_to_queue(self, request: Request, now: float) -> None:
        request.enter(RequestState.PREEMPTED, now)
        self._queue(request)

    def _fail(self, request: Request, step: Schedule) -> None:
        request.error = (
            f"out of KV memory: request {request.id!r} wants "
            f"{self.blocks.blocks_wanted(request.need)} blocks, {self.blocks.free_blocks} are "
            "free, and the allocator refused"
        )
        step.failed.append(request)
        self._forget_swapped(request)

    def _forget_swapped(self, request: Request) -> None:
        if request.swapped is not None:
            self.swap.free(request.swapped)
            request.swapped = None
