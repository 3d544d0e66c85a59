"""Continuous batching: which tokens of which requests run in the next step. Integers only.

A request has ``num_tokens`` tokens, of which ``num_computed`` have their K and V in the cache. A
step computes some more of them; the one that reaches the last is followed by sampling. Prefill,
decode and recomputation after a preemption are all this.
"""

from bisect import insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from ..errors import BadInput, at_least, one_of
from .block_manager import BlockManager, Move, Way
from .request import Request, RequestState

OOM_POLICIES = ("wait", "fail", "preempt")
PREEMPTIONS = ("recompute", "swap")
WATERMARK = 0.02

_queue_order = attrgetter("priority", "number")
_batch_order = attrgetter("priority", "admission")


class Chunk(NamedTuple):
    """Tokens ``start .. stop - 1`` of a request, computed in one step."""

    request: Request
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether a new token is sampled behind this chunk."""
        return self.stop == self.request.num_tokens


@dataclass(slots=True)
class Schedule:
    """One step: its chunks, decoding ones first; who failed or lost its blocks for want of memory;
    blocks free but not usable.
    """

    chunks: list[Chunk] = field(default_factory=list)
    failed: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    unusable_blocks: int = 0


class Scheduler:
    """First come, first served within a priority, up to ``max_batch_size`` running requests and
    ``max_step_tokens`` tokens a step.

    A lower ``priority`` stands further ahead in the queue, and gives way to memory's want later; it
    does not by itself end the run of another.

    Decoding requests come first with a token each, so that a long prompt never holds them up;
    prompts share what is left.

    When memory is out, ``oom_policy`` decides. ``wait``: the request that wants it waits, in the
    queue, or when it is running already with what it holds; only when all that run wait for each
    other does the youngest go back to the queue. ``fail``: it fails at once. ``preempt``: the
    youngest running request of the last priority gives way. Who lost its blocks computes its tokens
    again later; with ``swap``, a pool on the host, they are copied there and back as long as it has
    room.

    ``watermark``: the share of the pool that admitting a request must leave free for those that run
    to grow into, where they do grow and it can wait (vLLM's idea; at its 1 % and more, long queues
    get shorter, since nobody is preempted or stands still).

    Who was refused is asked again only after some blocks have come back, so a waiting request costs
    nothing.
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
        one_of("oom_policy", oom_policy, OOM_POLICIES)
        if (
            isinstance(watermark, bool)
            or not isinstance(watermark, int | float)
            or not 0 <= watermark < 1
        ):
            raise BadInput(
                f"watermark must be a share of the pool, from 0 to below 1, not {watermark!r}"
            )
        self.blocks = blocks
        self.max_batch_size = at_least("max_batch_size", max_batch_size, 1)
        self.max_step_tokens = at_least("max_step_tokens", max_step_tokens, max_batch_size)
        self.oom_policy = oom_policy
        grows = blocks.growth != "reserve" and oom_policy != "fail"
        self.kept_blocks = int(watermark * blocks.num_blocks) if grows else 0
        self.swap = swap
        self.waiting: list[Request] = []  # by priority, then first come, first served
        self.running: list[
            Request
        ] = []  # by priority, then the oldest first: the last gives way first
        self.stalled: dict[
            Request, int
        ] = {}  # running, but waiting for a block -> `num_releases` when it was refused
        self.num_preemptions = 0
        self._now = 0.0  # of the step that is planned
        self._num_added = self._num_admissions = 0
        self._refused: tuple[Request, int] | None = (
            None  # the head of the queue, and `num_releases` when it was refused
        )

    def add(self, request: Request) -> None:
        self._num_added += 1
        request.number = self._num_added
        self._queue(request)

    def remove(self, request: Request, prefix_ids: Sequence[Hashable] = ()) -> None:
        """Take a request that has ended out of the queue or the batch, and its blocks back.
        ``prefix_ids`` as `BlockManager.free`.
        """
        if request in self.running:
            self._leave(request, prefix_ids)
        else:
            self.waiting.remove(request)
            self._forget_swapped(request)

    @property
    def admits(self) -> bool:
        """Whether the next step has to look at the queue: somebody waits, there is room in the
        batch, and the head was not refused.
        """
        return (
            bool(self.waiting)
            and len(self.running) < self.max_batch_size
            and not self.stalled
            and not self._refused_before()
        )

    @property
    def may_resume(self) -> bool:
        """Whether blocks have come back since a running request was refused one."""
        return any(refused != self.blocks.num_releases for refused in self.stalled.values())

    @property
    def unusable_blocks(self) -> int:
        """The free blocks, if the head of the queue needs no more than they are and is refused all
        the same (interface.md's X).
        """
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return 0
        return (
            self.blocks.free_blocks
            if self._wanted(self.waiting[0]) <= self.blocks.free_blocks
            else 0
        )

    def schedule(self, now: float, due: Sequence[Request] | None = None) -> Schedule:
        """Plan the next step: running requests first, then as many of the queue as the batch, the
        budget and the pool admit.

        ``due`` names the running requests to look at (default: all). The others must be decoding
        with room for their next token; they run without a chunk in the plan. This is what lets
        `replay` pass over tokens that need no decision.
        """
        step, self._now = Schedule(), now
        asked = self.running if due is None else sorted({*due, *self.stalled}, key=_batch_order)
        prefilling = []
        for request in list(asked):
            if (
                request.state is RequestState.PREEMPTED or request.is_full
            ):  # gave way a moment ago, or its last token is on its way
                continue
            if request.num_tokens - request.num_computed > 1:
                prefilling.append(request)
            elif self._make_room(request, step):
                step.chunks.append(Chunk(request, request.num_computed, request.num_tokens))
        if self.running and len(self.stalled) == len(self.running):  # all wait for each other
            self._preempt(self.running[-1], step)
            again = self.schedule(now, due and ())
            again.preempted += step.preempted
            return again
        prefilling = [
            request for request in prefilling if request.state is not RequestState.PREEMPTED
        ]
        short = bool(
            self.stalled or step.failed or step.preempted
        )  # somebody wanted memory in vain: nobody is let in
        budget = self.max_step_tokens - (
            len(self.running) - len(self.stalled) - len(prefilling)
        )  # a token for each that decodes
        for request in prefilling:
            if budget:
                budget -= self._compute(request, budget, step)
        self._admit(now, budget, short, step)
        for request, _, stop in step.chunks:
            self.blocks.tables[request.id].num_tokens = stop
        return step

    def restart_all(self) -> None:
        """Send every running request back to the queue, and those swapped out to their beginning:
        what they had in the cache is lost.
        """
        for request in list(self.running):
            self._leave(request)
            self._back_to_queue(request)
        for sequence in list(self.swap.tables) if self.swap else ():
            self.swap.free(sequence)
        self.blocks.moves_made()
        self.blocks.forget_prefixes()

    # --- one step ---------------------------------------------------------------------------------

    def _admit(self, now: float, budget: int, short: bool, step: Schedule) -> None:
        misplaced = False  # the head of the queue was refused, although enough blocks were free
        failed_before = len(step.failed)
        while self.waiting and budget and len(self.running) < self.max_batch_size:
            request = self.waiting[0]
            if short or not self._allocate(request):
                misplaced |= self._wanted(request) <= self.blocks.free_blocks
                if self.oom_policy != "fail" or short:
                    break
                self._fail(self.waiting.pop(0), step)
                continue
            self.waiting.pop(0)
            self._num_admissions += 1
            request.enter(RequestState.PREFILLING, now)
            request.admission = self._num_admissions
            insort(self.running, request, key=_batch_order)
            if request.scheduled_at is None:
                request.scheduled_at, request.cached_tokens = now, request.num_computed
            budget -= self._compute(request, budget, step)
        if self.waiting and not (
            self.running or len(step.failed) > failed_before or short
        ):  # refused by an empty pool: for ever
            self._fail(self.waiting.pop(0), step)
        step.unusable_blocks = self.blocks.free_blocks if misplaced else 0

    def _compute(self, request: Request, budget: int, step: Schedule) -> int:
        """Put as many of the request's tokens into the step as ``budget`` allows; their number."""
        stop = min(request.num_tokens, request.num_computed + budget)
        step.chunks.append(Chunk(request, request.num_computed, stop))
        return stop - request.num_computed

    def _allocate(self, request: Request) -> bool:
        if self._refused_before():
            return False
        self._refused = None
        kept = self.kept_blocks if self.running else 0  # for others, if there are any
        short = kept and self.blocks.free_blocks < self._wanted(request) + kept
        if short or not self.blocks.allocate(
            request.id,
            request.num_tokens,
            request.max_slots,
            request.prefix_ids,
            len(request.prompt),
        ):
            self._refused = (request, self.blocks.num_releases)
            return False
        table = self.blocks.tables[request.id]
        if self.swap and (swapped := self.swap.tables.get(request.id)):
            if (num_tokens := swapped.num_tokens) > table.num_tokens:
                self.blocks.moves.append(
                    Move(swapped.extents, table.all_extents, num_tokens, table.num_tokens, Way.BACK)
                )
                table.num_tokens = num_tokens
            self.swap.free(request.id)
        request.num_computed = table.num_tokens
        return True

    def _refused_before(self) -> bool:
        return self._refused == (self.waiting[0], self.blocks.num_releases)

    def _make_room(self, request: Request, step: Schedule) -> bool:
        """Grow the request's table, or do what ``oom_policy`` says; False when the request does not
        run in this step.
        """
        if self.stalled.pop(request, None) == self.blocks.num_releases:
            self.stalled[request] = self.blocks.num_releases
            return False
        while not self.blocks.grow(request.id, request.num_tokens):
            if self.oom_policy == "wait" or self.blocks.is_deferred:
                self.stalled[request] = self.blocks.num_releases
                return False
            if self.oom_policy == "fail":
                self._leave(request)
                self._fail(request, step)
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
        self.blocks.free(request.id, prefix_ids)

    def _preempt(self, request: Request, step: Schedule) -> None:
        """Back to the queue without its blocks; it computes its tokens again when it is admitted,
        or copies them back.
        """
        table, num_tokens = self.blocks.tables[request.id], request.num_computed
        if self.swap and num_tokens and self.swap.allocate(request.id, num_tokens, num_tokens):
            swapped = self.swap.tables[request.id]
            swapped.num_tokens = num_tokens
            self.blocks.moves.append(
                Move(table.all_extents, swapped.extents, num_tokens, way=Way.OUT)
            )
        self._leave(request)
        self._back_to_queue(request)
        step.preempted.append(request)

    def _back_to_queue(self, request: Request) -> None:
        request.restart(self._now)
        self.num_preemptions += 1
        self._queue(request)

    def _fail(self, request: Request, step: Schedule) -> None:
        request.error = (
            f"out of KV memory: request {request.id!r} wants {self._wanted(request)} blocks, "
            f"{self.blocks.free_blocks} are free, and the allocator refused"
        )
        step.failed.append(request)
        self._forget_swapped(request)

    def _forget_swapped(self, request: Request) -> None:
        if self.swap and request.id in self.swap.tables:
            self.swap.free(request.id)

    def _wanted(self, request: Request) -> int:
        return self.blocks.blocks_wanted(
            request.num_tokens, request.max_slots, request.prefix_ids, len(request.prompt)
        )
