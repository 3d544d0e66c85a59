"""The replay: equal to the engine's own loop taken step by step, the same on every machine, and
right on the real traces.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from math import ceil
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlab import BadInput, Request, RequestState, metrics
from cortexlab.allocators import GROWTHS, STRATEGIES, strategy_of
from cortexlab.allocators.paged import Paged
from cortexlab.cli import main as cli
from cortexlab.replay import simulation as replay_module
from cortexlab.replay.simulation import Replay, replay, tables, unlimited_blocks
from cortexlab.replay.step_time import SECOND, StepTime
from cortexlab.scheduler.block_manager import BlockManager
from cortexlab.scheduler.scheduler import OOM_POLICIES, Scheduler
from cortexlab.workloads.synthetic import WorkItem, make_workload
from cortexlab.workloads.traces import KNOWN, load_trace

NS = 1e-9
LONG = 6  # tokens: a long extent on toy sizes


def step_time(base: int = 10, token: int = 0, sequence: int = 0) -> StepTime:
    """In whole nanoseconds."""
    return StepTime(base * NS, token * NS, sequence * NS)


def item(at: int, prompt: int, output: int, **more) -> WorkItem:
    """Arrived at nanosecond ``at``."""
    return WorkItem(at * NS, prompt, output, **more)


def replayed(
    items, strategy: str = "paged", *, num_blocks: int = 100, block_size: int = 1, **options
) -> Replay:
    done = Replay(
        strategy,
        num_blocks=num_blocks,
        block_size=block_size,
        **{"step_time": step_time()} | options,
    )
    done.run(items)
    return done


def row_of(done: Replay) -> dict:
    return {name: value for name, value in done.row.items() if name != "seconds"}


# --- the engine's loop, step by step, and every metric by its definition --------------------------


@dataclass(frozen=True)
class Step:
    """What was so in one step. ``held``: of each running sequence its table, the slots of that
    table in token order, and its tokens.
    """

    started_ns: int
    ns: int
    held: list
    decoded: list  # (tokens, slots) of each request that decoded
    unusable_slots: int
    num_held: int
    num_running: int
    num_waiting: int
    pool: dict

    def shares(self) -> dict:
        """Slots of H by what they are, each slot once however many sequences hold it."""
        slots, token, filled = set(), set(), set()
        for table, places, num_tokens in self.held:
            slots.update(places)
            token.update(places[:num_tokens])
            filled.update(places[: table.num_tokens])  # when the sequence had ended
        return {
            "token": len(token),
            "reserved": len(filled - token),
            "internal": len(slots - filled - token),
            "external": self.unusable_slots,
        }


def slots_of(table) -> list[int]:
    """All slots of a table, in token order."""
    return [slot for run in table.runs(0, table.capacity) for slot in range(*run)]


@dataclass(eq=False)
class Served:
    """A request as `Engine` sees it, and what a naive observer writes down."""

    request: Request
    item: WorkItem
    arrived_ns: int
    token_ns: list[int] = field(default_factory=list)
    finished_ns: int | None = None
    first_table: object = None


class Naive:
    """`Engine.step` for every single step: all running requests looked at, one token each, and a
    clock that adds up.
    """

    def __init__(
        self,
        items,
        strategy,
        growth,
        oom_policy,
        num_blocks,
        block_size,
        max_seq_len,
        max_batch_size,
        max_step_tokens,
        prefix_caching,
        watermark,
        step_ns,
    ):
        self.blocks = BlockManager(
            strategy_of(strategy, growth), num_blocks, block_size, max_seq_len, prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_size=max_batch_size,
            max_step_tokens=max_step_tokens,
            oom_policy=oom_policy,
            watermark=watermark,
        )
        self.in_vain: dict[
            str, bool
        ] = {}  # who asked the pool and got nothing in this step: were there enough free blocks?
        self.blocks.allocate = self.watched(self.blocks.allocate)
        self.step_ns, self.now = step_ns, 0
        self.steps: list[Step] = []
        self.moves, self.written = [], 0
        self.sampled_before: set[str] = set()  # since it was last admitted
        self.final_extents: list[tuple[int, list]] = []  # (tokens, extents) of those that finished
        per_block = block_size // items[0].prefix_block
        self.served: list[Served] = []
        for index, it in enumerate(items):
            max_tokens = max(it.output_tokens, it.max_tokens or 0)
            request = Request(
                f"r{index}",
                tuple(range(it.prompt_tokens)),
                max_tokens,
                arrived_at=round(it.arrived_at * SECOND) / SECOND,
            )
            if prefix_caching:
                whole, part = divmod(it.prompt_tokens, block_size)
                request.prefix_ids = tuple(
                    it.prefix_ids[(b + 1) * per_block - 1] for b in range(whole)
                ) + it.prefix_ids[-1:] * bool(part)
            if self.blocks.could_ever_hold(it.prompt_tokens + max_tokens - 1):
                self.served.append(Served(request, it, round(it.arrived_at * SECOND)))
        self.refused = len(items) - len(self.served)
        self.served.sort(key=lambda each: each.arrived_ns)

    def run(self, limit: int = 20_000) -> "Naive":
        coming, by_id = list(self.served), {each.request.id: each for each in self.served}
        calls = 0
        while True:
            assert (calls := calls + 1) < limit, "no end in sight"
            while coming and coming[0].arrived_ns <= self.now:
                self.scheduler.add(coming.pop(0).request)
            if self.scheduler.running or self.scheduler.waiting:
                self.step(by_id)
            elif coming:
                self.now = coming[0].arrived_ns
            else:
                return self

    def watched(self, allocate):
        def watching(sequence, *sizes):
            enough = self.enough(*sizes)
            if not (got := allocate(sequence, *sizes)):
                self.in_vain[sequence] = enough
            return got

        return watching

    def enough(
        self, num_tokens: int, max_slots: int, prefix_ids: tuple = (), prompt_tokens: int = 0
    ) -> bool:
        """Whether no more blocks would be taken than are free. What a live sequence shares of its
        prefix needs no free block.
        """
        blocks, size = self.blocks, self.blocks.block_size
        wanted = ceil((max_slots if blocks.growth == "reserve" else num_tokens) / size)
        held = {block.prefix_id for table in blocks.tables.values() for block in table.shared}
        shared = list(
            takewhile(held.__contains__, prefix_ids[: prompt_tokens // size])
        )  # who holds a block holds all before it
        places = {place for table in blocks.tables.values() for place in slots_of(table)}
        return wanted - len(shared) <= blocks.num_blocks - len(places) // size

    def unusable_slots(self, plan) -> int:
        """X by the letter: all free slots where the queue's head was refused, though its blocks are
        no more than are free.
        """
        scheduler, blocks = self.scheduler, self.blocks
        refused = any(
            self.in_vain.get(request.id, False) for request in plan.failed
        )  # was the head, and is in no queue any more
        spent = sum(chunk.stop - chunk.start for chunk in plan.chunks) == scheduler.max_step_tokens
        if scheduler.waiting and len(scheduler.running) < scheduler.max_batch_size and not spent:
            head = scheduler.waiting[0]
            refused |= self.enough(
                head.num_tokens, head.max_slots, head.prefix_ids, len(head.prompt)
            )
        held = {place for table in blocks.tables.values() for place in slots_of(table)}
        return (blocks.num_blocks * blocks.block_size - len(held)) if refused else 0

    def step(self, by_id) -> None:
        self.in_vain.clear()
        plan = self.scheduler.schedule(self.now / SECOND)
        self.blocks.check()
        self.moves += self.blocks.moves
        self.blocks.moves.clear()
        self.sampled_before -= {request.id for request in plan.preempted}
        for request in plan.failed:
            request.state, by_id[request.id].finished_ns = RequestState.FAILED, self.now
        if not plan.chunks:
            return
        num_tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        base, token, sequence = self.step_ns
        ns = base + token * num_tokens + sequence * len(plan.chunks)
        self.written += num_tokens
        running = self.scheduler.running
        for request in running:
            if by_id[request.id].first_table is None:
                by_id[request.id].first_table = self.blocks.tables[request.id]
        held = []
        for request in running:
            table = self.blocks.tables[request.id]
            held.append((table, slots_of(table), table.num_tokens))
        decoded = [
            (c.stop, self.blocks.tables[c.request.id].capacity)
            for c in plan.chunks
            if c.request.id in self.sampled_before
        ]
        self.steps.append(
            Step(
                self.now,
                ns,
                held,
                decoded,
                self.unusable_slots(plan),
                self.blocks.num_held,
                len(running),
                len(self.scheduler.waiting),
                dict(self.blocks.stats()),
            )
        )
        self.now += ns
        for chunk in sorted(
            plan.chunks, key=lambda chunk: chunk.stop - chunk.start > 1
        ):  # as the engine feeds and ends them
            request, samples = chunk.request, chunk.samples
            request.num_computed = chunk.stop
            if samples:
                request.output_tokens.append(0)
                request.token_times.append(self.now / SECOND)
                request.state = RequestState.DECODING
                self.sampled_before.add(request.id)
                each = by_id[request.id]
                each.token_ns.append(self.now)
                if len(request.output_tokens) == each.item.output_tokens:
                    each.finished_ns, request.state = self.now, RequestState.FINISHED
                    self.final_extents.append(
                        (chunk.stop, list(self.blocks.tables[request.id].all_extents))
                    )
                    self.scheduler.remove(request)

    def row(self) -> dict:
        """By the definitions of the interface."""
        done = [each for each in self.served if each.request.state is RequestState.FINISHED]
        decoded = [pair for step in self.steps for pair in step.decoded]
        size, seconds = self.blocks.block_size, self.now / SECOND
        tokens, long_tokens = 0, 0
        for num_tokens, extents in self.final_extents:
            tokens += num_tokens
            lengths = [
                length
                for extent in extents
                for length in [extent.num_blocks * size] * (extent.num_blocks * size)
            ]
            long_tokens += sum(
                length >= LONG for length in lengths[:num_tokens]
            )  # the extent that each token lies in
        ids = []  # of the trace: (all of a prompt, those in the blocks that were found)
        for each in (each for each in self.served if each.first_table and each.request.prefix_ids):
            found = each.first_table.num_found * size // each.item.prefix_block
            ids.append((len(each.item.prefix_ids), min(len(each.item.prefix_ids), found)))
        inputs = sum(each.item.prompt_tokens for each in done)
        outputs = sum(len(each.token_ns) for each in done)
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
            "request_throughput": len(done) / seconds if seconds else None,
            "output_throughput": outputs / seconds if seconds else None,
            **metrics.shares((step.ns, step.shares()) for step in self.steps),
            "utilization": sum(t for t, _ in decoded) / sum(s for _, s in decoded)
            if decoded
            else None,
            "mean_live_tokens": sum(t for t, _ in decoded) / len(decoded) if decoded else None,
            "prefix_hit_rate": sum(f for _, f in ids) / sum(n for n, _ in ids)
            if sum(n for n, _ in ids)
            else None,
            "long_extent_share": long_tokens / tokens if tokens else None,
            "extents_per_sequence": sum(len(extents) for _, extents in self.final_extents)
            / len(done)
            if done
            else None,
            "peak_blocks": max((step.num_held for step in self.steps), default=0),
            "copied_blocks": sum(ceil(move.num_tokens / size) for move in self.moves),
            "copied_share": sum(move.num_tokens for move in self.moves) / self.written
            if self.written
            else None,
            "num_preemptions": self.scheduler.num_preemptions,
        }

    def gaps(self) -> Counter:
        return Counter(
            after - before for each in self.served for before, after in pairwise(each.token_ns)
        )

    def latencies(self) -> dict:
        return metrics.latency_summary(
            each.request for each in self.served if each.request.state is RequestState.FINISHED
        )


@st.composite
def loads(draw):
    """A tiny pool, limits of every kind, and requests that come whenever they like and stop before
    their max_tokens or at it.
    """
    batch = draw(st.integers(1, 4))
    caching = draw(st.booleans())
    prefix_block = draw(st.integers(1, 3))
    block_size = prefix_block * draw(st.integers(1, 2)) if caching else draw(st.integers(1, 5))
    options = {
        "strategy": draw(st.sampled_from(sorted(STRATEGIES))),
        "growth": draw(st.sampled_from([None, *GROWTHS])),
        "oom_policy": draw(st.sampled_from(OOM_POLICIES)),
        "num_blocks": draw(
            st.integers(1, 14) | st.integers(8, 40)
        ),  # of a large one a watermark keeps some
        "block_size": block_size,
        "max_batch_size": batch,
        "max_step_tokens": draw(st.integers(batch, batch + 10)),
        "max_seq_len": draw(st.none() | st.integers(1, 24)),
        "prefix_caching": caching,
        "watermark": draw(st.sampled_from([0, 0.1, 0.25, 0.5])),
    }
    unit = draw(
        st.sampled_from([1, 1, 50_000_000])
    )  # nanoseconds; the long one makes the replay take samples
    ns = tuple(
        unit * n
        for n in draw(
            st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 3)).filter(any)
        )
    )
    at, items, known = 0, [], {}
    for _ in range(draw(st.integers(1, 9))):
        at += unit * draw(st.sampled_from([0, 0, 1, 3, 10, 11, 40, 200]))
        prompt, output, more = (
            draw(st.integers(1, 12)),
            draw(st.integers(1, 14)),
            draw(st.sampled_from([None, 0, 1, 6])),
        )
        letters = draw(st.text("ab", min_size=12, max_size=12)) if caching else ""
        ends = (
            [min(prompt, end + prefix_block) for end in range(0, prompt, prefix_block)]
            if caching
            else []
        )
        ids = tuple(
            known.setdefault((letters[: ceil(end / prefix_block)], end), len(known)) for end in ends
        )
        items.append(
            item(
                at,
                prompt,
                output,
                prefix_ids=ids,
                prefix_block=prefix_block,
                max_tokens=more and output + more,
            )
        )
    return items, options, ns


def hands_out_single_blocks(options) -> bool:
    sizes = options["num_blocks"], options["block_size"], options["max_seq_len"]
    one = BlockManager(strategy_of(options["strategy"]), *sizes).allocator.allocate(1)
    return sum(extent.num_blocks for extent in one) == 1


def agree(items, options, ns) -> None:
    """Run both and compare everything."""
    if options["prefix_caching"] and not hands_out_single_blocks(options):
        with pytest.raises(BadInput, match="prefix caching"):
            Replay(**options)
        return
    naive = Naive(items, **options, step_ns=ns)
    done = Replay(**options, step_time=step_time(*ns))
    if not naive.served:
        with pytest.raises(BadInput, match="no request can be served"):
            done.run(items)
        return
    naive.run()
    with patch.object(replay_module, "LONG_EXTENT", LONG):
        row = done.run(items)
    assert [
        (r.id, r.first_ns, r.finished_ns, r.num_preemptions, str(r.state)) for r in done.requests
    ] == [
        (
            n.request.id,
            n.token_ns[0] if n.token_ns else None,
            n.finished_ns,
            n.request.num_preemptions,
            str(n.request.state),
        )
        for n in naive.served
    ]
    expected = naive.row()
    for name, value in expected.items():
        exact = isinstance(value, int | None) or name == "duration"
        assert row[name] == (value if exact else pytest.approx(value, rel=1e-9, abs=1e-9)), name
    if (
        row["failed"] == 0
        # a failed request's gaps are no other request's latency, so they are compared where there
        # is none
    ):
        assert +done.totals.gaps == naive.gaps()
    for name, value in naive.latencies().items():
        if row["failed"] == 0 or "itl" not in name:
            assert row[name] == (None if value is None else pytest.approx(value, rel=1e-9)), name
    if naive.steps:
        assert sum(row[f"{name}_share"] for name in metrics.SHARES) == pytest.approx(1, abs=1e-12)
    steps = {step.started_ns / SECOND: step for step in naive.steps}
    assert bool(done.samples) == bool(naive.steps)
    for sample in done.samples:
        step = steps[sample["started_at"]]
        slots = step.shares()
        assert sample["token_slots"] == slots["token"]
        assert (
            sample["reserved_slots"] + sample["internal_slots"]
            == slots["reserved"] + slots["internal"]
        )
        assert sample["external_slots"] == slots["external"]
        assert (sample["num_running"], sample["num_waiting"]) == (
            step.num_running,
            step.num_waiting,
        )
        assert {name: sample[name] for name in step.pool} == step.pool
    done.blocks.check()
    assert done.blocks.num_held == 0


@given(loads())
@settings(max_examples=1500, deadline=None)
def test_the_replay_is_the_engines_loop_taken_in_jumps(load):
    agree(*load)


# --- what the property found, one by one ----------------------------------------------------------


def test_blocks_held_behind_the_last_token_take_nothing_from_long_extents():
    """Two blocks are reserved, by paged one behind the other; a block in between makes them two
    extents, and one token is written.
    """
    blocks = [item(0, 1, 1), item(0, 1, 1, max_tokens=4)]
    done = Replay(
        "cortexstream", growth="reserve", num_blocks=9, block_size=128, step_time=step_time()
    )
    assert done.run(blocks)["long_extent_share"] == 1.0
    paged = Replay("paged", growth="reserve", num_blocks=9, block_size=128, step_time=step_time())
    paged.blocks.allocate("a", 128, 128)
    paged.blocks.allocate("b", 128, 128)
    paged.blocks.free("a")
    assert paged.run([item(0, 1, 1, max_tokens=200)])["long_extent_share"] == 1.0


def test_a_relocation_copies_all_the_tokens_there_are_then():
    """Blocks of two: a's place is full with its prompt, full again with four tokens, and b is right
    behind it at first.
    """
    done = replayed([item(0, 2, 5), item(0, 1, 2)], "best_fit", num_blocks=20, block_size=2)
    assert (done.totals.copied_tokens, done.row["copied_blocks"]) == (
        2,
        1,
    )  # a b . .  ->  . b a a, where it goes on growing
    done = replayed([item(0, 1, 4), item(2, 1, 4)], "best_fit", num_blocks=64, block_size=2)
    assert done.totals.copied_tokens == 2 + 2, (
        "each moves once, with two tokens, though its prompt had one"
    )


def test_those_who_end_in_one_step_give_their_blocks_back_oldest_first():
    """Blocks of four: r1 takes its last block at its fifth token, r0, which is older, at its ninth,
    with which both end.
    """
    done = Replay("paged", num_blocks=20, block_size=4, step_time=step_time())
    freed, free = [], done.blocks.free
    done.blocks.free = lambda sequence, ids=(): (freed.append(sequence), free(sequence, ids))[1]
    done.run([item(0, 5, 5), item(0, 2, 5)])
    assert [request.finished_ns for request in done.requests] == [50, 50]
    assert freed == ["r0", "r1"]


def test_blocks_are_unusable_only_in_the_step_whose_refused_request_failed():
    """. . b b b b . . .   c wants four of the five free, and fails at once: nobody waits in b's two
    steps behind that one.
    """
    row = replayed(
        [item(0, 2, 1), item(0, 1, 4), item(5, 4, 1)],
        "cortexstream",
        num_blocks=9,
        oom_policy="fail",
    ).row
    assert row["failed"] == 1
    assert row["external_share"] == pytest.approx((5 / 9) / 4)


def test_prefix_ids_that_end_before_a_block_does_share_nothing_of_it():
    """One id for a system prompt of two tokens: a block of four holds more than it, and the rest
    differs.
    """
    items = [
        item(0, 5, 1, prefix_ids=(0,), prefix_block=2),
        item(100, 5, 1, prefix_ids=(0,), prefix_block=2),
    ]
    assert [
        r.cached_tokens for r in replayed(items, block_size=2, prefix_caching=True).requests
    ] == [0, 2]
    assert [
        r.cached_tokens for r in replayed(items, block_size=4, prefix_caching=True).requests
    ] == [0, 0]


def test_a_scaled_prompt_may_have_more_ids_than_blocks():
    long = WorkItem(0.0, 1025, 3, (0, 1, 2), 512).scaled(0.3)
    assert (long.prompt_tokens, long.prefix_block, len(long.prefix_ids)) == (308, 154, 3)
    assert replayed([long], block_size=154, prefix_caching=True).row["completed"] == 1


# --- the same on every machine --------------------------------------------------------------------

ROWS = """
import json, sys
from cortexlab.replay import replay
from cortexlab.workloads import make_workload
items = make_workload("lognormal", 60, seed=3, request_rate=20.0)
strategies = ["paged", "cortexstream", "buddy", "segregated", "static"]
done = replay(items, strategies, num_blocks="60%", max_batch_size=8)
rows = [{name: value for name, value in each.row.items() if name != "seconds"} for each in done]
print(json.dumps([[row, each.samples] for row, each in zip(rows, done)]))
"""


def test_rows_and_samples_are_the_same_to_the_byte_whatever_the_hash_seed():
    def run(hash_seed: str) -> bytes:
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.run(
            [sys.executable, "-c", ROWS], check=True, capture_output=True, env=env
        ).stdout

    first = run("1")
    assert len(json.loads(first)) == 5
    assert first == run("1") == run("2")


def test_two_runs_in_one_process_are_the_same_to_the_byte():
    items = make_workload("lognormal", 40, seed=1, request_rate=30.0)
    first, second = (
        replay(items, ["paged", "buddy"], num_blocks="50%", max_batch_size=4) for _ in range(2)
    )
    assert json.dumps([[row_of(r), r.samples] for r in first]) == json.dumps(
        [[row_of(r), r.samples] for r in second]
    )
    assert all(r.row["seconds"] > 0 for r in first)


# --- stories --------------------------------------------------------------------------------------


def calls_of(monkeypatch) -> list[int]:
    """The clock of every call of the scheduler."""
    calls, schedule = [], Scheduler.schedule

    def counted(self, now, due=None):
        calls.append(round(now * SECOND))
        return schedule(self, now, due)

    monkeypatch.setattr(Scheduler, "schedule", counted)
    return calls


def test_quiet_steps_are_taken_in_one_jump(monkeypatch):
    """The prompt's step, and one jump over 99 steps of 10 ns, since a block of 200 has room for all
    of them.
    """
    calls = calls_of(monkeypatch)
    done = replayed([item(0, 4, 100)], block_size=200)
    assert calls == [0]
    assert (done.requests[0].first_ns, done.requests[0].finished_ns) == (10, 1000)
    assert done.row["utilization"] == pytest.approx(sum(range(5, 104)) / (99 * 200))


def test_an_arrival_ends_a_jump_before_the_first_step_that_starts_with_it_there(monkeypatch):
    """Steps start at 0, 10, 20 ...: who comes at 25 joins at 30, who comes at exactly 50 joins at
    50.
    """
    calls = calls_of(monkeypatch)
    done = replayed([item(0, 1, 50), item(25, 1, 1), item(50, 1, 1)], block_size=100)
    assert calls == [0, 30, 50]
    assert [request.first_ns for request in done.requests] == [10, 40, 60]
    assert done.row["mean_ttft_ms"] == pytest.approx((10 + 15 + 10) / 3 / 1e6)


def test_an_idle_pool_waits_for_the_next_arrival():
    done = replayed([item(0, 1, 2), item(1000, 1, 2)])
    assert [(request.first_ns, request.finished_ns) for request in done.requests] == [
        (10, 20),
        (1010, 1020),
    ]
    assert done.totals.time == 40, "nothing is weighted while nothing runs"


def test_a_step_takes_what_its_tokens_and_sequences_take():
    """Two prompts, of 3 and 2 tokens: 100 + 5 * 1 + 2 * 10; then two tokens of two sequences, one
    of one.
    """
    done = replayed([item(0, 3, 2), item(0, 2, 3)], step_time=step_time(100, 1, 10))
    assert [request.first_ns for request in done.requests] == [125, 125]
    assert [request.finished_ns for request in done.requests] == [125 + 122, 125 + 122 + 111]


def test_a_queue_is_served_in_order_of_arrival_and_ttft_counts_it():
    """One at a time: b, which came first, then a."""
    done = replayed([item(5, 1, 2), item(0, 1, 3)], max_batch_size=1)
    assert [(request.id, request.first_ns, request.finished_ns) for request in done.requests] == [
        ("r1", 10, 30),
        ("r0", 40, 50),
    ]
    assert done.row["p99_ttft_ms"] == pytest.approx((10 + 0.99 * 25) / 1e6)
    assert done.row["completed_by_last_arrival"] == 0


def two_in_a_pool_of_five(oom_policy: str) -> tuple[dict, list]:
    """Two prompts of two slots, each to grow by two: a a b b ."""
    done = replayed([item(0, 2, 3), item(0, 2, 3)], num_blocks=5, oom_policy=oom_policy)
    return done.row, [
        (str(request.state), request.finished_ns, request.num_preemptions)
        for request in done.requests
    ]


def test_wait_lets_the_younger_stand_still_until_all_would_wait_for_each_other():
    row, requests = two_in_a_pool_of_five("wait")
    assert requests == [
        ("finished", 30, 0),
        ("finished", 50, 1),
    ]  # b's three tokens are computed again at 30
    assert (row["num_preemptions"], row["failed"]) == (1, 0)


def test_fail_ends_who_wants_the_block_that_is_not_there():
    row, requests = two_in_a_pool_of_five("fail")
    assert requests == [("finished", 30, 0), ("failed", 10, 0)]
    assert (row["completed"], row["failed"], row["requests"], row["tokens"]) == (1, 1, 2, 5)


def test_preempt_sends_the_youngest_back_at_once():
    row, requests = two_in_a_pool_of_five("preempt")
    assert requests == [("finished", 30, 0), ("finished", 50, 1)]
    assert row["num_preemptions"] == 1


def test_static_holds_a_region_for_every_request_and_counts_the_rest_of_it_as_internal():
    """A region of 8: 3 then 4 tokens, 1 then 0 slots reserved, 4 never filled."""
    row = replayed([item(0, 3, 2)], "static", num_blocks=16, max_seq_len=8).row
    assert [row[f"{name}_share"] for name in metrics.SHARES] == pytest.approx(
        [3.5 / 8, 0.5 / 8, 4 / 8, 0]
    )
    assert (row["peak_blocks"], row["utilization"], row["extents_per_sequence"]) == (8, 4 / 8, 1)


def test_a_reservation_is_reserved_as_far_as_it_is_filled_and_internal_behind():
    """It asks for ten tokens and ends after two: 3 + 10 - 1 slots held, four filled."""
    row = replayed([item(0, 3, 2, max_tokens=10)], "cortexstream", num_blocks=16).row
    assert [row[f"{name}_share"] for name in metrics.SHARES] == pytest.approx(
        [3.5 / 12, 0.5 / 12, 8 / 12, 0]
    )


def test_free_blocks_that_are_not_together_are_external():
    """a a b b c c .  ->  . . b b . . .: d wants four blocks of the five free, and waits for b in
    one of three steps.
    """
    row = replayed(
        [item(0, 2, 1), item(0, 1, 2), item(0, 2, 1), item(5, 4, 1)], "cortexstream", num_blocks=7
    ).row
    assert row["external_share"] == pytest.approx((5 / 7) / 3)


def test_the_shares_of_any_workload_sum_to_one():
    items = make_workload("heavy-tail", 40, seed=2, request_rate=50.0)
    for done in replay(items, sorted(STRATEGIES), num_blocks="70%", max_batch_size=6):
        assert sum(done.row[f"{name}_share"] for name in metrics.SHARES) == pytest.approx(
            1, abs=1e-12
        ), done.strategy.name


def test_who_can_never_fit_is_refused_and_counted_and_the_run_goes_on():
    row = replayed([item(0, 2, 1), item(0, 9, 2), item(0, 3, 3, max_tokens=99)], num_blocks=9).row
    assert (row["requests"], row["completed"], row["refused"], row["tokens"]) == (3, 1, 2, 3)


def test_when_all_are_refused_the_pool_is_named():
    with pytest.raises(BadInput, match="none of 2 can ever fit the pool of 9 slots"):
        replayed([item(0, 10, 1), item(0, 9, 2)], num_blocks=9)


def test_a_request_that_an_empty_pool_cannot_hold_after_all_fails_and_the_row_says_so():
    """cortexstream_buddy hands out four of eight blocks at once for one: the other three requests
    have no room.
    """
    row = replayed(
        [item(0, 1, 3), item(0, 8, 1)], "cortexstream_buddy", num_blocks=8, oom_policy="fail"
    ).row
    assert (row["completed"], row["failed"]) == (1, 1)


def test_a_run_of_one_token_has_no_gap_and_no_decode_step():
    row = replayed([item(0, 3, 1)]).row
    assert [
        row[name]
        for name in (
            "mean_itl_ms",
            "mean_tpot_ms",
            "utilization",
            "mean_live_tokens",
            "prefix_hit_rate",
        )
    ] == [None] * 5
    assert row["mean_ttft_ms"] == row["mean_e2el_ms"] == pytest.approx(10e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks.*0"),
        ({"block_size": 0}, "block_size.*0"),
        ({"block_size": -1}, "block_size.*-1"),
        ({"max_batch_size": 0}, "max-batch-size.*0"),
        ({"max_batch_size": 2.5}, "max-batch-size.*2.5"),
        ({"max_seq_len": 0}, "max_seq_len.*0"),
        ({"max_batch_size": 4, "max_step_tokens": 3}, "max_step_tokens.*3"),
        ({"oom_policy": "hope"}, "oom_policy.*'hope'"),
        ({"strategy": "magic"}, "strategy.*'magic'"),
        ({"growth": "shrink"}, "growth.*'shrink'"),
        (
            {"strategy": "static", "num_blocks": 8, "max_seq_len": 4, "prefix_caching": True},
            "prefix caching.*'static'",
        ),
    ],
)
def test_an_argument_that_makes_no_sense_is_named_with_its_value(options, message):
    with pytest.raises(BadInput, match=message):
        Replay(**{"num_blocks": 9, "block_size": 1} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_sizes": [16, 0]}, "block-size.*0"),
        ({"num_blocks": "0%"}, "num-blocks.*'0%'"),
        ({"num_blocks": 0}, "num-blocks.*0"),
        ({"num_blocks": "most"}, "num-blocks.*'most'"),
        ({"max_batch_size": 0}, "max-batch-size.*0"),
        ({"strategies": ["magic"]}, "'magic'"),
    ],
)
def test_replay_names_what_is_wrong_before_anything_has_run(options, message):
    with pytest.raises(BadInput, match=message):
        replay([item(0, 3, 3)], **options)


def test_prefixes_are_shared_in_blocks_of_the_trace_or_a_multiple():
    items = [item(0, 5, 1, prefix_ids=(0, 1, 2), prefix_block=2)]
    for block_size in (1, 3, 5):
        with pytest.raises(BadInput, match=f"multiple of 2 .*not {block_size}"):
            replayed(items, block_size=block_size, prefix_caching=True)
    for block_size in (2, 4, 6):
        assert (
            replayed(items, block_size=block_size, prefix_caching=True).row["prefix_hit_rate"] == 0
        )


def test_prefix_hits_are_counted_in_blocks_and_in_tokens():
    """Five tokens in blocks of two; the same again; one with only the first block alike."""
    items = [
        item(at, 5, 1, prefix_ids=ids, prefix_block=2)
        for at, ids in ((0, (0, 1, 2)), (50, (0, 1, 2)), (100, (0, 3, 4)))
    ]
    done = replayed(items, block_size=2, prefix_caching=True)
    assert done.row["prefix_hit_rate"] == pytest.approx((0 + 3 + 1) / 9)
    assert done.row["prefix_hit_tokens_rate"] == pytest.approx((0 + 5 + 2) / 15)
    assert [request.cached_tokens for request in done.requests] == [0, 4, 2], (
        "the last token is always computed"
    )
    assert done.row["copied_blocks"] == 1, "the partial last block is copied, not shared"


def test_a_block_of_two_ids_counts_as_two_hits():
    """Ids of two tokens, blocks of four: [0 1] [2 .], the same again, [0 1] [3 4], and [0 5] [6 .],
    which shares no whole block.
    """
    prompts = [(6, (0, 1, 2)), (6, (0, 1, 2)), (8, (0, 1, 3, 4)), (5, (0, 5, 6))]
    items = [
        item(50 * n, length, 1, prefix_ids=ids, prefix_block=2)
        for n, (length, ids) in enumerate(prompts)
    ]
    row = replayed(items, block_size=4, prefix_caching=True).row
    assert row["prefix_hit_rate"] == pytest.approx((0 + 3 + 2 + 0) / (3 + 3 + 4 + 3))
    assert row["prefix_hit_tokens_rate"] == pytest.approx((0 + 6 + 4 + 0) / (6 + 6 + 8 + 5))


def test_a_trace_of_512_in_blocks_of_1024_by_hand():
    """1024 tokens found of the second prompt are two ids of its four, its last block was never
    there.
    """
    items = [
        item(0, 1600, 1, prefix_ids=(1, 2, 3, 4)),
        item(100, 1600, 1, prefix_ids=(1, 2, 9, 8)),
        item(200, 512, 1, prefix_ids=(7,)),
    ]
    row = replayed(items, block_size=1024, prefix_caching=True).row
    assert (row["prefix_hit_rate"], row["prefix_hit_tokens_rate"]) == (
        pytest.approx(2 / 9),
        pytest.approx(1024 / 3712),
    )


@pytest.mark.parametrize(
    "prompts",
    [
        [(1, 2), (3, 2)],
        [(1, 2), (2, 1)],
        [(1, 1)],
        [(1, 2, 1), (2, 2, 1)],
        [(1, 2), (3, 2), (1, 2)],
    ],
)
@pytest.mark.parametrize("gap", [0, 1, 100])
def test_ids_that_contradict_themselves_lose_no_block(prompts, gap):
    """By the definition an id stands for all before it, too; in a trace where it does not, nothing
    is lost but hits.
    """
    items = [
        item(gap * n, 4 * len(ids), 3, prefix_ids=ids, prefix_block=4)
        for n, ids in enumerate(prompts)
    ]
    for block_size in (4, 8):
        done = replayed(items, block_size=block_size, num_blocks=12, prefix_caching=True)
        done.blocks.check()
        assert (done.row["completed"], done.blocks.num_held) == (len(items), 0)
        assert done.blocks.stats().used_blocks == done.blocks.prefix.num_idle


@pytest.mark.parametrize("caching", [{}, {"num_blocks": "60%"}])
def test_prefix_caching_needs_a_workload_with_prefix_ids(caching):
    with pytest.raises(BadInput, match="prefix"):
        replay([item(0, 5, 2), item(0, 4, 2)], prefix_caching=True, **caching)


# --- the pool's state is sampled, not logged ------------------------------------------------------


@pytest.mark.parametrize(
    "items",
    [
        [item(0, 4, 500)] * 20,
        [item(0, 1, 200_000)],
        [item(0, 2, 3), item(10**9, 2, 100_000)],
        [item(at * 10**8, 1, 1) for at in range(3000)],
    ],
    ids=["all at once", "one answer", "a second and an hour", "many short ones"],
)
def test_samples_are_bounded_however_long_a_run_takes(items):
    done = replayed(
        items, block_size=512, num_blocks=2000, max_batch_size=1, step_time=replay_module.reference
    )
    at = [sample["started_at"] for sample in done.samples]
    assert 2 <= len(at) <= 2 * replay_module.NUM_SAMPLES + 1
    assert all(before < after for before, after in pairwise(at))
    end = done.now / SECOND
    assert at[0] < end / 50 and at[-1] > 0.95 * end, "from the beginning to the end"
    assert max(after - before for before, after in pairwise(at)) < end / 20, (
        "and no long time without any"
    )


# --- strategies of one's own that break their promises --------------------------------------------

BAD_STRATEGIES = r"""
import sys
from math import nan
from cortexlab import Extent
from cortexlab.allocators.paged import Paged

print("a module that talks")


class Talks(Paged):
    def __init__(self, num_blocks):
        print("making one")
        super().__init__(num_blocks)

    def allocate(self, num_blocks):
        print("allocating")
        return super().allocate(num_blocks)


class HandsOutTwice(Paged):
    def allocate(self, num_blocks):
        super().allocate(num_blocks)
        return (Extent(0, num_blocks),)


class Overlaps(Paged):
    "The first block of each allocation is the last one of another."

    def allocate(self, num_blocks):
        extents = super().allocate(num_blocks)
        if not extents:
            return extents
        return (Extent(max(0, extents[0].start - 1), extents[0].num_blocks), *extents[1:])


class Outside(Paged):
    def allocate(self, num_blocks):
        super().allocate(num_blocks)
        return (Extent(self.num_blocks, num_blocks),)


class Before(Paged):
    def allocate(self, num_blocks):
        super().allocate(num_blocks)
        return (Extent(-num_blocks, num_blocks),)


class Fewer(Paged):
    def allocate(self, num_blocks):
        return super().allocate(max(1, num_blocks // 2))


class None_(Paged):
    "Nothing at all, as if that were an allocation."

    def allocate(self, num_blocks):
        return ()


class NotExtents(Paged):
    def allocate(self, num_blocks):
        return super().allocate(num_blocks) and "blocks"


class ExtendsByNothing(Paged):
    def extend(self, extents, num_blocks):
        return extents


class ExtendsOverlapping(Paged):
    def extend(self, extents, num_blocks):
        return (*extents, Extent(extents[0].start, num_blocks))


class ExtendsOutside(Paged):
    def extend(self, extents, num_blocks):
        return (*extents, Extent(self.num_blocks, num_blocks))


class Leaks(Paged):
    def free(self, extents):
        pass


class LeaksSome(Paged):
    "Of what was ever extended."
    grown = 0

    def extend(self, extents, num_blocks):
        self.grown += 1
        return super().extend(extents, num_blocks)

    def free(self, extents):
        if self.grown % 2 == 0:
            super().free(extents)


class Raises(Paged):
    def allocate(self, num_blocks):
        raise RuntimeError("out of ideas")


class RaisesLate(Paged):
    calls = 0

    def allocate(self, num_blocks):
        self.calls += 1
        return super().allocate(num_blocks) if self.calls < 20 else {}["nothing"]


class RaisesOnExtend(Paged):
    def extend(self, extents, num_blocks):
        raise RuntimeError("out of\nideas")


class RaisesOnFree(Paged):
    def free(self, extents):
        raise ValueError("mine")


class RaisesOnStats(Paged):
    def stats(self):
        raise RuntimeError("out of ideas")


class RaisesWhenMade(Paged):
    def __init__(self, num_blocks):
        if num_blocks != 64:
            raise RuntimeError("out of ideas")
        super().__init__(num_blocks)


class LacksAKey(Paged):
    def stats(self):
        return {name: value for name, value in super().stats().items() if name != "num_holes"}


class LacksUsed(Paged):
    def stats(self):
        return {name: value for name, value in super().stats().items() if name != "used_blocks"}


class NoStats(Paged):
    def stats(self):
        return None


class NotANumber(Paged):
    def stats(self):
        return super().stats() | {"external_fragmentation": nan}


class Words(Paged):
    def stats(self):
        return super().stats() | {"num_holes": "three"}


class Lies(Paged):
    def stats(self):
        return super().stats() | {"used_blocks": 1}


class Exits(Paged):
    def allocate(self, num_blocks):
        sys.exit(0)


class ExitsWhenMade(Paged):
    def __init__(self, num_blocks):
        sys.exit()


class ExitsLate(Paged):
    def free(self, extents):
        sys.exit("good bye")
"""
TALK = "a module that talks"
BAD = [
    name for name in re.findall(r"^class (\w+)", BAD_STRATEGIES, re.MULTILINE) if name != "Talks"
]


@pytest.fixture
def bad(tmp_path, monkeypatch, capsys):
    """The folder with the module ``bad_strategies``; whoever takes half a minute is in an endless
    loop.
    """
    (tmp_path / "bad_strategies.py").write_text(BAD_STRATEGIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_strategies", raising=False)

    def late(*_):
        raise KeyboardInterrupt("no end in sight")  # which no strategy is blamed for

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    sys.modules.pop("bad_strategies", None)


def called(*words) -> int:
    try:
        return cli.main(
            [
                "replay",
                "--requests",
                "60",
                "--workload",
                "heavy-tail",
                "--request-rate",
                "40",
                "--out",
                "out",
                *words,
            ]
        )
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("pool", ["unlimited", "60%"])
@pytest.mark.parametrize("name", BAD)
def test_a_strategy_that_misbehaves_is_one_line_that_names_it(name, pool, bad, capsys):
    code = called("--strategies", f"bad_strategies:{name}", "--num-blocks", pool)
    stdout, stderr = capsys.readouterr()
    lines = [line for line in stderr.splitlines() if line != TALK]
    assert (code, len(lines), stdout.replace(TALK, "").strip()) == (2, 1, ""), stderr
    assert name in lines[0]
    assert not (bad / "out").exists()


@pytest.mark.parametrize("growth", [None, *GROWTHS])
@pytest.mark.parametrize("name", BAD)
def test_a_strategy_that_misbehaves_is_bad_input_of_replay(name, growth, bad):
    if growth == "reserve" and ("Extend" in name or name == "LeaksSome"):
        pytest.skip("never asked to extend")
    sys.path.insert(0, str(bad))
    try:
        broken = getattr(importlib.import_module("bad_strategies"), name)
        items = [item(n * 10**7, 40, 60) for n in range(40)]
        with pytest.raises(BadInput, match=f"^[^\n]*{name}[^\n]*$"):
            replay(
                items, [broken], block_sizes=[4], num_blocks=120, growth=growth, max_batch_size=8
            )
    finally:
        sys.path.remove(str(bad))


def test_a_good_strategy_before_a_bad_one_writes_nothing_either(bad, capsys):
    assert called("--strategies", "paged,bad_strategies:Fewer", "--json") == 2
    stdout, stderr = capsys.readouterr()
    (line,) = [line for line in stderr.splitlines() if line != TALK]
    assert stdout == "" and "Fewer" in line
    assert not (bad / "out").exists()


def test_a_strategy_that_prints_does_not_spoil_the_document(bad, capsys):
    assert (
        called("--strategies", "paged,bad_strategies:Talks", "--num-blocks", "60%", "--json") == 0
    )
    paged, talks = json.loads(capsys.readouterr().out)["rows"]
    assert (paged.pop("strategy"), talks.pop("strategy")) == ("paged", "Talks")
    assert {**paged, "seconds": 0} == {**talks, "seconds": 0}


def test_a_module_that_exits_when_it_is_imported_is_bad_input(bad, capsys):
    (bad / "exits_at_once.py").write_text("import sys\nsys.exit(0)\n")
    assert called("--strategies", "exits_at_once:Any") == 2
    stderr = capsys.readouterr().err
    assert "exits_at_once" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["paged,paged", "bad_strategies:Talks,bad_strategies:Talks", "paged,bad_named:paged"]
)
def test_two_strategies_of_one_name_are_bad_input(words, bad, capsys):
    (bad / "bad_named.py").write_text(
        "from cortexlab.allocators.paged import Paged\n\n\nclass paged(Paged):\n    pass\n"
    )
    assert called("--strategies", words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line != TALK]
    assert repr(words.split(",")[1].split(":")[-1]) in line
    assert not (bad / "out").exists()
    sys.modules.pop("bad_named", None)


def test_replay_refuses_two_strategies_of_one_name():
    mine = type("paged", (Paged,), {})
    for strategies in (
        ["paged", "paged"],
        ["paged", mine],
        [mine, mine],
        [Paged, type("Paged", (Paged,), {})],
    ):
        with pytest.raises(BadInput, match=r"(?i)'paged'"):
            replay([item(0, 3, 3)], strategies)


def test_prefix_caching_on_a_workload_without_ids_is_bad_input(bad, capsys):
    assert called("--prefix-caching", "--block-size", "512") == 2
    stderr = capsys.readouterr().err
    assert "prefix" in stderr and stderr.count("\n") == 1
    assert not (bad / "out").exists()


def test_a_pool_is_a_number_a_percentage_of_what_paged_holds_at_its_peak_or_unlimited():
    items = [item(0, 8, 3), item(0, 8, 3)]
    (unlimited,) = replay(items, block_sizes=[4], step_time=step_time())
    assert unlimited.row["peak_blocks"] == 6  # two times ten slots, in blocks of four
    assert [
        replay(items, block_sizes=[4], num_blocks=n, step_time=step_time())[0].row["num_blocks"]
        for n in (7, "50%", "75%")
    ] == [
        7,
        3,
        5,
    ]


@given(loads())
@settings(max_examples=200, deadline=None)
def test_unlimited_is_never_used_up(load):
    items, options, ns = load
    items = [
        replace(it, prefix_ids=() if not options["prefix_caching"] else it.prefix_ids)
        for it in items
    ]
    options["num_blocks"] = unlimited_blocks(
        items, options["block_size"], options["max_batch_size"], options["prefix_caching"]
    )
    if options["strategy"] in (
        "static",
        "cortexstream_buddy",
    ):  # by design these hold more than they are asked for
        return
    options["growth"] = (
        # a contiguous place that may neither move nor be reserved can be too small in any pool
        None
    )
    row = Replay(**options, step_time=step_time(*ns)).run(items)
    assert (row["refused"], row["failed"], row["num_preemptions"], row["external_share"]) == (
        0,
        0,
        0,
        0,
    )


def test_tables_have_a_row_a_run_a_request_and_a_sample():
    done = replay(
        [item(0, 3, 2), item(0, 2, 2)], ["paged", "static"], num_blocks=64, step_time=step_time()
    )
    found = tables(done)
    assert list(found["rows"]["strategy"]) == ["paged", "static"]
    assert list(found["requests"]["finished_at"]) == [20 * NS] * 4
    assert len(found["steps"]) == sum(len(each.samples) for each in done) >= 2
    assert (found["steps"]["ended_at"] > found["steps"]["started_at"]).all()


# --- step times -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, 0, 0), "base_s.*-1"),
        ((0, float("nan"), 0), "token_s.*nan"),
        ((0, 0, float("inf")), "sequence_s.*inf"),
        ((True, 0, 0), "True"),
        (("1", 0, 0), "base_s.*'1'"),
        ((None, 0, 0), "base_s.*None"),
        ((3601, 0, 0), "3601"),
        ((0, 0, 0), "nanosecond"),
    ],
)
def test_a_step_time_that_makes_no_sense_is_named_with_its_value(values, message):
    with pytest.raises(BadInput, match=message):
        StepTime(*values)


def test_a_step_time_that_rounds_to_no_nanosecond_is_refused():
    """The clock counts whole nanoseconds: with steps of none it would never come to the next
    arrival.
    """
    with pytest.raises(BadInput, match="nanosecond"):
        StepTime(4e-10, 4e-10, 4e-10)


def test_a_step_time_comes_back_from_its_file(tmp_path):
    path = tmp_path / "step_time.json"
    path.write_text(StepTime(0.25, 0.5, 0.125).to_json(machine="toy"))
    assert StepTime.load(path) == StepTime(0.25, 0.5, 0.125)
    assert StepTime.load(path).nanoseconds == (250_000_000, 500_000_000, 125_000_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2, 3]", "needs base_s"),
        ('{"base_s": 1, "token_s": 1}', "needs"),
        ('{"base_s": -1, "token_s": 0, "sequence_s": 0}', "base_s.*-1"),
        ('{"base_s": NaN, "token_s": 0, "sequence_s": 0}', "nan"),
        ('{"base_s": "1", "token_s": 0, "sequence_s": 0}', "'1'"),
        ('{"base_s": null, "token_s": 0, "sequence_s": 0}', "None"),
        ('{"base_s": 1' + "0" * 400 + ', "token_s": 0, "sequence_s": 0}', "base_s"),
    ],
)
def test_a_step_time_file_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "step_time.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as refused:
        StepTime.load(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_a_step_time_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "no such file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"no such file\.json"):
        StepTime.load(path)


# --- the real traces ------------------------------------------------------------------------------


def trace(name: str):
    folder, file = os.environ.get("CORTEXLAB_TRACES"), KNOWN[name][0]
    if not folder or not os.path.isfile(os.path.join(folder, file)):
        pytest.skip(f"no {file} in $CORTEXLAB_TRACES ({folder})")
    return load_trace(name)


@pytest.fixture(scope="module")
def azure():
    return trace("azure_2023_conv")


@pytest.fixture(scope="module")
def mooncake():
    return trace("mooncake_conversation")


def served(
    items, block_size: int, num_blocks: int | None = None, prefix_caching: bool = False
) -> dict:
    pool = num_blocks or unlimited_blocks(
        items, block_size, replay_module.MAX_BATCH_SIZE, prefix_caching
    )
    return Replay(
        "paged", num_blocks=pool, block_size=block_size, prefix_caching=prefix_caching
    ).run(items)


@pytest.mark.parametrize(("block_size", "utilization"), [(16, 0.994), (64, 0.975), (512, 0.836)])
def test_azure_lives_in_its_blocks_as_measured_on_the_trace_itself(azure, block_size, utilization):
    """Live tokens over slots held in every decode step of every request depend on the lengths
    alone.
    """
    row = served(azure, block_size)
    assert row["utilization"] == pytest.approx(utilization, abs=0.003)
    assert (row["requests"], row["completed"], row["tokens"]) == (19_366, 19_366, 26_450_535)
    live, held = 0, 0
    # by the definition: the decode steps of a request end with prompt + 1 ... prompt + output - 1
    # tokens
    for it in azure:
        for tokens in (
            range(it.prompt_tokens + 1, it.prompt_tokens + it.output_tokens)
            if block_size == 512
            else ()
        ):
            live, held = live + tokens, held + ceil(tokens / block_size) * block_size
    assert block_size != 512 or row["utilization"] == pytest.approx(live / held, abs=1e-12)


def test_mooncakes_prefixes_are_found_as_often_as_an_unlimited_cache_can(mooncake):
    assert served(mooncake, 512, prefix_caching=True)["prefix_hit_rate"] == pytest.approx(
        0.3664, abs=0.0005
    )


@pytest.mark.parametrize(
    ("num_blocks", "lru"), [(1_000, 0.0443), (10_000, 0.2108), (50_000, 0.3546)]
)
def test_mooncakes_prefixes_are_found_about_as_often_as_by_an_lru_cache_in_order_of_arrival(
    mooncake, num_blocks, lru
):
    """Not exactly: live sequences hold blocks for their answers, theirs are not evicted, and they
    are used until they end.
    """
    rate = served(mooncake, 512, num_blocks, prefix_caching=True)["prefix_hit_rate"]
    print(f"{num_blocks} blocks: prefix_hit_rate {rate:.4f}, an LRU of that size {lru}")
    assert rate == pytest.approx(lru, abs=0.01)


def test_the_first_minute_of_azure_step_by_step():
    """The property again on real lengths, with a pool too small for them."""
    items = [it for it in trace("azure_2023_conv") if it.arrived_at < 6]
    options = {
        "growth": None,
        "oom_policy": "wait",
        "num_blocks": 60,
        "block_size": 128,
        "max_batch_size": 16,
        "max_step_tokens": 512,
        "max_seq_len": 4096,
        "prefix_caching": False,
        "watermark": 0.1,
    }
    agree(items, {"strategy": "buddy"} | options, (30_000_000, 10_000, 100_000))


def test_a_sample_counts_who_arrives_while_a_full_batch_takes_many_steps_at_once():
    """Steps of 50 ms: r0 decodes in the batch of one, r1 waits, and r2 arrives in the middle of
    what is taken in one jump.
    """
    options = {
        "strategy": "best_fit",
        "num_blocks": 1,
        "block_size": 3,
        "max_batch_size": 1,
        "max_step_tokens": 1,
        "watermark": 0,
    }
    options |= {"growth": None, "oom_policy": "wait", "max_seq_len": None, "prefix_caching": False}
    agree(
        [WorkItem(0.0, 1, 3), WorkItem(0.05, 1, 1), WorkItem(0.1, 1, 1)],
        options,
        (0, 0, 50_000_000),
    )
