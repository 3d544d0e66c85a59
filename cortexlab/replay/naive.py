"""The replay by its definition: every step by itself, every slot by its number.

`Replay` must give the same rows; tests hold it to them. Read this first to see what a replay is.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from math import ceil

from .. import metrics
from ..allocators import strategy_of
from ..options import ReplayOptions
from ..scheduler.block_manager import BlockManager
from ..scheduler.block_table import BlockTable, Need
from ..scheduler.request import Request, RequestState
from ..scheduler.scheduler import Chunk, Schedule, Scheduler
from ..workloads.synthetic import WorkItem
from .accounting import LONG_EXTENT, over
from .step_time import SECOND


def slots_of(table: BlockTable) -> list[int]:
    """All slots of a table, in token order."""
    return [slot for run in table.runs(0, table.capacity) for slot in range(*run)]


@dataclass(frozen=True)
class Step:
    """One step as it was. ``held``: of each running sequence its table, the table's slots, and its
    tokens; ``decoded``: tokens and slots of each request that decoded.
    """

    started_ns: int
    ns: int
    held: list[tuple[BlockTable, list[int], int]]
    decoded: list[tuple[int, int]]
    unusable_slots: int
    num_held: int
    num_running: int
    num_waiting: int
    pool: dict

    def shares(self) -> dict[str, int]:
        """Slots of H by what they are, each slot once however many sequences hold it."""
        slots, token, filled = set(), set(), set()
        for table, places, num_tokens in self.held:
            slots.update(places)
            token.update(places[:num_tokens])
            filled.update(places[: table.num_tokens])  # read when the sequence has ended
        return {
            "token": len(token),
            "reserved": len(filled - token),
            "internal": len(slots - filled - token),
            "external": self.unusable_slots,
        }


@dataclass(eq=False)
class Served:
    """A request as an engine sees it, with its time stamps in nanoseconds."""

    request: Request
    item: WorkItem
    arrived_ns: int
    token_ns: list[int] = field(default_factory=list)
    finished_ns: int | None = None
    first_table: BlockTable | None = None


class NaiveReplay:
    """A workload step by step: schedule, one token for each chunk that ends, a clock that adds up.

    ``step_ns``: nanoseconds of a step, of a token, of a sequence; ``options`` as `ReplayOptions`.
    """

    def __init__(
        self,
        items: Sequence[WorkItem],
        strategy: str,
        *,
        step_ns: tuple[int, int, int],
        max_step_tokens: int,
        **options,
    ):
        given = ReplayOptions(strategy=strategy, max_step_tokens=max_step_tokens, **options)
        self.blocks = BlockManager(
            strategy_of(strategy, given.growth),
            given.num_blocks,
            given.block_size,
            given.max_seq_len,
            given.prefix_caching,
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_size=given.max_batch_size,
            max_step_tokens=max_step_tokens,
            oom_policy=given.oom_policy,
            watermark=given.watermark,
        )
        # Needs that the pool refused in this step: were there enough free blocks?
        self._refused: list[bool] = []
        self.blocks.allocate = self._watched(self.blocks.allocate)
        self.step_ns, self.now = step_ns, 0
        self.steps: list[Step] = []
        self.moves, self.written = [], 0
        self._sampled: set[Request] = set()  # requests with a token since their last admission
        self._final: list[tuple[int, tuple]] = []  # (tokens, extents) of finished requests
        served = [_served(index, item, given) for index, item in enumerate(items)]
        fits = self.blocks.could_ever_hold
        self.served = [each for each in served if fits(each.request.max_slots)]
        self.refused = len(items) - len(self.served)
        self.served.sort(key=lambda each: each.arrived_ns)

    def run(self, limit: int = 20_000) -> "NaiveReplay":
        """Take steps until the last request has ended."""
        coming, by_request = list(self.served), {each.request: each for each in self.served}
        for _ in range(limit):
            while coming and coming[0].arrived_ns <= self.now:
                self.scheduler.add(coming.pop(0).request)
            if self.scheduler.running or self.scheduler.waiting:
                self._step(by_request)
            elif coming:
                self.now = coming[0].arrived_ns
            else:
                return self
        raise AssertionError("no end in sight")

    def _step(self, by_request: dict[Request, Served]) -> None:
        self._refused.clear()
        plan = self.scheduler.schedule(self.now / SECOND)
        self.blocks.check()
        self.moves += self.blocks.moves
        self.blocks.moves.clear()
        self._sampled -= set(plan.preempted)
        for request in plan.failed:
            request.state, by_request[request].finished_ns = RequestState.FAILED, self.now
        if not plan.chunks:
            return
        num_tokens = sum(chunk.num_rows for chunk in plan.chunks)
        base, token, sequence = self.step_ns
        ns = base + token * num_tokens + sequence * len(plan.chunks)
        self.written += num_tokens
        for request in self.scheduler.running:
            each = by_request[request]
            each.first_table = each.first_table or request.table
        self._record(plan, ns)
        self.now += ns
        for chunk in plan.chunks:
            if chunk.samples:
                self._sample(chunk, by_request[chunk.request])

    def _record(self, plan: Schedule, ns: int) -> None:
        tables = [request.table for request in self.scheduler.running]
        decoding = (chunk for chunk in plan.chunks if chunk.request in self._sampled)
        self.steps.append(
            Step(
                self.now,
                ns,
                [(table, slots_of(table), table.num_tokens) for table in tables],
                [(chunk.stop, chunk.request.table.capacity) for chunk in decoding],
                self._unusable_slots(plan),
                self.blocks.num_held,
                len(self.scheduler.running),
                len(self.scheduler.waiting),
                dict(self.blocks.stats()),
            )
        )

    def _sample(self, chunk: Chunk, each: Served) -> None:
        """Give a request its next token; end it with its last."""
        request = chunk.request
        request.output_tokens.append(0)
        request.token_times.append(self.now / SECOND)
        request.state = RequestState.DECODING
        self._sampled.add(request)
        each.token_ns.append(self.now)
        if len(request.output_tokens) == each.item.output_tokens:
            each.finished_ns, request.state = self.now, RequestState.FINISHED
            self._final.append((chunk.stop, request.table.all_extents))
            self.scheduler.remove(request)

    # --- free, but of no use: X by the letter -----------------------------------------------------

    def _watched(self, allocate: Callable[[Need], BlockTable | None]) -> Callable:
        def watching(need: Need) -> BlockTable | None:
            enough = self._enough(need)
            table = allocate(need)
            if table is None:
                self._refused.append(enough)
            return table

        return watching

    def _enough(self, need: Need) -> bool:
        """Whether no more blocks would be taken than are free. A prefix shared with a live sequence
        needs no free block.
        """
        blocks, size = self.blocks, self.blocks.block_size
        reserve = blocks.growth == "reserve"
        wanted = ceil((need.max_slots if reserve else need.num_tokens) / size)
        held = {block.prefix_id for table in blocks.tables for block in table.shared}
        whole = need.prefix_ids[: need.prompt_tokens // size]
        shared = list(takewhile(held.__contains__, whole))
        return wanted - len(shared) <= blocks.num_blocks - len(self._held_slots()) // size

    def _unusable_slots(self, plan: Schedule) -> int:
        """All free slots where the head of the queue was refused, though it needs no more blocks
        than are free.
        """
        scheduler, blocks = self.scheduler, self.blocks
        refused = bool(plan.failed) and any(self._refused)  # a head that failed is in no queue
        spent = sum(chunk.num_rows for chunk in plan.chunks) == scheduler.max_step_tokens
        if scheduler.waiting and len(scheduler.running) < scheduler.max_batch_size and not spent:
            refused |= self._enough(scheduler.waiting[0].need)
        return blocks.num_blocks * blocks.block_size - len(self._held_slots()) if refused else 0

    def _held_slots(self) -> set[int]:
        return {slot for table in self.blocks.tables for slot in slots_of(table)}

    # --- what it comes to -------------------------------------------------------------------------

    def row(self) -> dict:
        """The measures by their definitions."""
        done = [each for each in self.served if each.request.state is RequestState.FINISHED]
        decoded = [pair for step in self.steps for pair in step.decoded]
        live, held = sum(tokens for tokens, _ in decoded), sum(slots for _, slots in decoded)
        size, seconds = self.blocks.block_size, self.now / SECOND
        inputs = sum(each.item.prompt_tokens for each in done)
        outputs = sum(len(each.token_ns) for each in done)
        num_ids, num_found = self._prefix_ids()
        final, long, extents = self._final_extents()
        moved = [move.num_tokens for move in self.moves]
        blocks, queued = self.blocks.num_blocks, [step for step in self.steps if step.num_waiting]
        return {
            "requests": len(self.served) + self.refused,
            "completed": len(done),
            "completed_by_last_arrival": sum(
                each.finished_ns <= self.served[-1].arrived_ns for each in done
            ),
            "refused": self.refused,
            "failed": len(self.served) - len(done),
            "tokens": inputs + outputs,
            "duration": seconds,
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": over(len(done), seconds),
            "output_throughput": over(outputs, seconds),
            **metrics.shares((step.ns, step.shares()) for step in self.steps),
            "utilization": over(live, held),
            "mean_live_tokens": over(live, len(decoded)),
            "prefix_hit_rate": over(num_found, num_ids),
            "prefix_hit_tokens_rate": self._hit_tokens_rate() if num_ids else None,
            "long_extent_share": over(long, final),
            "extents_per_sequence": over(extents, len(done)),
            "empty_share": over(
                sum(step.ns * (blocks - step.num_held) for step in queued),
                sum(step.ns * blocks for step in queued),
            ),
            "peak_blocks": max((step.num_held for step in self.steps), default=0),
            "copied_blocks": sum(ceil(num_tokens / size) for num_tokens in moved),
            "copied_share": over(sum(moved), self.written),
            "num_preemptions": self.scheduler.num_preemptions,
        }

    def gaps(self) -> Counter:
        """Nanoseconds between two tokens of a request -> how often."""
        return Counter(
            after - before for each in self.served for before, after in pairwise(each.token_ns)
        )

    def latencies(self) -> dict:
        """`metrics.latency_summary` of the finished requests."""
        requests = (each.request for each in self.served)
        return metrics.latency_summary(r for r in requests if r.state is RequestState.FINISHED)

    def _prefix_ids(self) -> tuple[int, int]:
        """Prefix ids of the trace, of all admitted prompts; those in the blocks that were found."""
        num_ids = num_found = 0
        for each in self.served:
            if each.first_table and each.request.prefix_ids:
                slots = each.first_table.num_found * self.blocks.block_size
                num_ids += len(each.item.prefix_ids)
                num_found += min(len(each.item.prefix_ids), slots // each.item.prefix_block)
        return num_ids, num_found

    def _hit_tokens_rate(self) -> float:
        """Tokens in the blocks that were found, of all tokens of admitted prompts."""
        found = prompts = 0
        for each in self.served:
            if each.first_table:
                prompt = len(each.request.prompt)
                found += min(each.first_table.num_found * self.blocks.block_size, prompt)
                prompts += prompt
        return found / prompts

    def _final_extents(self) -> tuple[int, int, int]:
        """Tokens of finished requests, those in an extent of `LONG_EXTENT` or more, and extents."""
        tokens = long = num_extents = 0
        for num_tokens, extents in self._final:
            lengths = []  # of the extent that each slot lies in
            for extent in extents:
                slots = extent.num_blocks * self.blocks.block_size
                lengths += [slots] * slots
            tokens += num_tokens
            long += sum(length >= LONG_EXTENT for length in lengths[:num_tokens])
            num_extents += len(extents)
        return tokens, long, num_extents


def _served(index: int, item: WorkItem, options: ReplayOptions) -> Served:
    request = Request(
        f"r{index}",
        tuple(range(item.prompt_tokens)),
        item.limit,
        arrived_at=round(item.arrived_at * SECOND) / SECOND,
    )
    if options.prefix_caching:  # an id stands for all before it, so a block's last id names it
        whole, part = divmod(item.prompt_tokens, options.block_size)
        per_block = options.block_size // item.prefix_block
        ids = tuple(item.prefix_ids[(block + 1) * per_block - 1] for block in range(whole))
        request.prefix_ids = ids + item.prefix_ids[-1:] * bool(part)
    return Served(request, item, round(item.arrived_at * SECOND))
