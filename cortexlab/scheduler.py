"""Continuous batching: which tokens of which requests run in the next step. Integers only.

A request has ``num_tokens`` tokens, of which ``num_computed`` have their K and V in the cache. A step computes some more of
them; the one that reaches the last is followed by sampling. Prefill, decode and recomputation after a preemption are all this.
"""

from collections import deque
from dataclasses import dataclass, field

from .block_manager import BlockManager
from .errors import at_least, one_of
from .request import Request, RequestState

OOM_POLICIES = ("wait", "fail", "preempt")


@dataclass(frozen=True, slots=True)
class Chunk:
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
    """One step: its chunks, the requests that failed for want of memory, and the slots that were free but not usable."""

    chunks: list[Chunk] = field(default_factory=list)
    failed: list[Request] = field(default_factory=list)
    unusable_blocks: int = 0


class Scheduler:
    """First come, first served, up to ``max_batch_size`` running requests and ``max_step_tokens`` tokens a step.

    When memory is out, ``oom_policy`` decides. ``wait``: the request that wants it waits, in the queue, or when it is running
    already with what it holds; only when all that run wait for each other does the youngest go back to the queue. ``fail``: it
    fails at once. ``preempt``: the youngest running request gives way. Who lost its blocks computes its tokens again later.
    """

    def __init__(self, blocks: BlockManager, *, max_batch_size: int, max_step_tokens: int, oom_policy: str = "wait"):
        one_of("oom_policy", oom_policy, OOM_POLICIES)
        self.blocks = blocks
        self.max_batch_size = at_least("max_batch_size", max_batch_size, 1)
        self.max_step_tokens = at_least("max_step_tokens", max_step_tokens, max_batch_size)
        self.oom_policy = oom_policy
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request that has ended out of the queue or the batch, and its blocks back."""
        if request in self.running:
            self.running.remove(request)
            self.blocks.free(request.id)
        else:
            self.waiting.remove(request)

    def schedule(self, now: float) -> Schedule:
        """Plan the next step: running requests first, then as many of the queue as the batch, the budget and the pool admit."""
        step = Schedule()
        budget = self.max_step_tokens
        misplaced = False  # the head of the queue was refused, although enough blocks were free
        short = False  # somebody wanted memory in vain: nobody is let in
        for request in list(self.running):
            if budget == 0:
                break
            if request.state is RequestState.PREEMPTED:  # gave way to an older one a moment ago
                continue
            stop = min(request.num_tokens, request.num_computed + budget)
            if self._make_room(request, stop, step):
                step.chunks.append(Chunk(request, request.num_computed, stop))
                budget -= stop - request.num_computed
            else:
                short = True
        if self.running and not step.chunks and self.oom_policy != "fail":  # all wait for each other
            self._preempt(self.running[-1])
            return self.schedule(now) if self.running else step
        while self.waiting and budget and len(self.running) < self.max_batch_size:
            request = self.waiting[0]
            if short or not self.blocks.allocate(request.id, request.num_tokens, request.max_slots):
                misplaced |= self._would_fit(request)
                if self.oom_policy != "fail" or short:
                    break
                self.waiting.popleft()
                self._fail(request, step)
                continue
            self.waiting.popleft()
            self.running.append(request)
            request.state = RequestState.PREFILLING
            if request.scheduled_at is None:
                request.scheduled_at = now
            stop = min(request.num_tokens, budget)
            step.chunks.append(Chunk(request, 0, stop))
            budget -= stop
        if self.waiting and not (self.running or step.failed or short):  # refused by an empty pool: waiting would be for ever
            self._fail(self.waiting.popleft(), step)
        step.unusable_blocks = self.blocks.stats().free_blocks if misplaced else 0
        for chunk in step.chunks:
            self.blocks.tables[chunk.request.id].num_tokens = chunk.stop
        return step

    def _make_room(self, request: Request, num_tokens: int, step: Schedule) -> bool:
        """Grow the request's table, or do what ``oom_policy`` says; False when the request does not run in this step."""
        while not self.blocks.grow(request.id, num_tokens):
            if self.oom_policy == "wait":
                return False
            if self.oom_policy == "fail":
                self.running.remove(request)
                self.blocks.free(request.id)
                self._fail(request, step)
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def preempt_all(self) -> None:
        """Send every running request back to the queue, oldest first: what they had in the cache is lost."""
        for request in reversed(list(self.running)):
            self._preempt(request)

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue without its blocks; it computes its tokens again when it is admitted."""
        self.running.remove(request)
        self.blocks.free(request.id)
        request.state, request.num_computed = RequestState.PREEMPTED, 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _fail(self, request: Request, step: Schedule) -> None:
        wanted = self.blocks.blocks_wanted(request.num_tokens, request.max_slots)
        free = self.blocks.stats().free_blocks
        request.error = f"out of KV memory: request {request.id!r} wants {wanted} blocks, {free} are free, and the allocator refused"
        step.failed.append(request)

    def _would_fit(self, request: Request) -> bool:
        """Whether as many blocks are free as admitting ``request`` takes, wherever they lie."""
        wanted = self.blocks.blocks_wanted(request.num_tokens, request.max_slots)
        return wanted <= self.blocks.stats().free_blocks
