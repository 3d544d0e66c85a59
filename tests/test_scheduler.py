"""Continuous batching as bookkeeping: the scheduler driven by hand, with no model and no MLX behind
it.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlab import Request, RequestState
from cortexlab.allocators import GROWTHS, STRATEGIES, FirstFit, strategy_of
from cortexlab.scheduler.block_manager import BlockManager
from cortexlab.scheduler.scheduler import OOM_POLICIES, Schedule, Scheduler


def request(name: str, prompt: int, max_tokens: int) -> Request:
    return Request(name, tuple(range(prompt)), max_tokens)


@dataclass
class Simulation:
    """What an engine does with a schedule, without a model: compute the chunks, sample a dummy
    token, end what is done.
    """

    scheduler: Scheduler
    finished: list[Request] = field(default_factory=list)
    failed: list[Request] = field(default_factory=list)
    num_steps: int = 0

    def add(self, *requests: Request) -> None:
        for each in requests:
            self.scheduler.add(each)

    def step(self) -> Schedule:
        """One step; the schedule's chunks as ``(id, start, stop)`` are kept in ``last``."""
        self.num_steps += 1
        step = self.scheduler.schedule(now=float(self.num_steps))
        self.last = [(chunk.request.id, chunk.start, chunk.stop) for chunk in step.chunks]
        self.check(step)
        self.failed += step.failed
        for failed in step.failed:
            failed.state = RequestState.FAILED
        self.scheduler.blocks.moves.clear()  # made
        for chunk in step.chunks:
            samples = chunk.samples
            chunk.request.num_computed = chunk.stop
            if samples:
                chunk.request.output_tokens.append(0)
                chunk.request.state = RequestState.DECODING
                if len(chunk.request.output_tokens) == chunk.request.max_tokens:
                    self.scheduler.remove(chunk.request)
                    self.finished.append(chunk.request)
        return step

    def check(self, step: Schedule) -> None:
        """What holds of every step."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        blocks.check()
        assert len(scheduler.running) <= scheduler.max_batch_size
        assert sum(chunk.stop - chunk.start for chunk in step.chunks) <= scheduler.max_step_tokens
        scheduled = [chunk.request for chunk in step.chunks]
        assert len(set(scheduled)) == len(scheduled) and set(scheduled) <= set(scheduler.running)
        assert not set(scheduler.running) & set(scheduler.waiting)
        assert {each.id for each in scheduler.running} == set(blocks.tables), (
            "who runs holds blocks, and nobody else does"
        )
        for chunk in step.chunks:
            assert (
                chunk.request.num_computed == chunk.start < chunk.stop <= chunk.request.num_tokens
            )
            assert (
                blocks.tables[chunk.request.id].num_tokens
                == chunk.stop
                <= blocks.tables[chunk.request.id].capacity
            )
        if step.unusable_blocks:
            assert step.unusable_blocks == blocks.allocator.stats().free_blocks
            if not step.failed:  # else who was refused is not in the queue any more
                head = scheduler.waiting[0]
                assert step.unusable_blocks >= blocks.blocks_wanted(head.num_tokens, head.max_slots)

    def run(self, limit: int = 1000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            assert self.num_steps < limit, "no end in sight"
            self.step()


def simulation(
    strategy: str = "paged",
    num_blocks: int = 100,
    block_size: int = 1,
    growth: str | None = None,
    max_seq_len: int | None = None,
    **options,
) -> Simulation:
    blocks = BlockManager(strategy_of(strategy, growth), num_blocks, block_size, max_seq_len)
    return Simulation(Scheduler(blocks, **{"max_batch_size": 4, "max_step_tokens": 64} | options))


def names(requests) -> list[str]:
    return [each.id for each in requests]


# --- stories --------------------------------------------------------------------------------------


def test_a_request_joins_as_soon_as_another_leaves():
    sim = simulation(max_batch_size=2)
    sim.add(request("a", 3, 2), request("b", 2, 4), request("c", 2, 1))
    sim.step()
    assert sim.last == [("a", 0, 3), ("b", 0, 2)]  # both prompts whole, in one step
    sim.step()
    assert sim.last == [("a", 3, 4), ("b", 2, 3)]
    assert names(sim.finished) == ["a"]
    sim.step()
    assert sim.last == [("b", 3, 4), ("c", 0, 2)]  # c's prompt beside b's next token
    assert names(sim.finished) == ["a", "c"]


def test_a_long_prompt_is_computed_in_chunks_beside_a_decoding_request():
    sim = simulation(max_step_tokens=4)
    short, long = request("short", 2, 9), request("long", 9, 2)
    sim.add(short, long)
    chunks = []
    for _ in range(4):
        sim.step()
        chunks.append(sim.last)
    assert chunks == [
        [("short", 0, 2), ("long", 0, 2)],
        [("short", 2, 3), ("long", 2, 5)],
        [("short", 3, 4), ("long", 5, 8)],
        [("short", 4, 5), ("long", 8, 9)],
    ]
    assert (len(short.output_tokens), len(long.output_tokens)) == (4, 1), (
        "only the chunk that ends the prompt samples"
    )


def test_first_come_first_served_even_when_a_later_one_would_fit():
    sim = simulation("cortexstream", num_blocks=4)
    sim.add(request("a", 2, 1), request("large", 4, 1), request("small", 1, 1))
    sim.step()
    assert sim.last == [("a", 0, 2)]  # small would fit, but large came first
    sim.step()
    assert sim.last == [("large", 0, 4)]
    sim.step()
    assert sim.last == [("small", 0, 1)]


def test_scheduled_at_is_when_a_request_first_ran():
    sim = simulation(max_batch_size=1)
    a, b = request("a", 1, 2), request("b", 1, 1)
    sim.add(a, b)
    sim.run()
    assert (a.scheduled_at, b.scheduled_at) == (1.0, 3.0)


def test_wait_leaves_the_request_in_the_queue_until_there_is_room():
    sim = simulation("cortexstream", num_blocks=4, oom_policy="wait")
    sim.add(request("a", 2, 3), request("b", 2, 1))
    sim.step()
    assert names(sim.scheduler.waiting) == ["b"]
    sim.run()
    assert names(sim.finished) == ["a", "b"]
    assert (sim.failed, sim.scheduler.num_preemptions) == ([], 0)


def test_wait_lets_a_running_request_that_cannot_grow_sit_out_while_others_finish():
    sim = simulation(num_blocks=5, oom_policy="wait")
    a, b = request("a", 2, 2), request("b", 2, 3)
    sim.add(a, b)
    sim.step()  # a a b b .
    sim.step()
    assert sim.last == [("a", 2, 3)]  # a took the last block; b keeps what it has
    assert names(sim.scheduler.running) == ["b"]
    sim.run()
    assert b.num_preemptions == 0


def test_wait_sends_the_youngest_back_only_when_all_wait_for_each_other():
    sim = simulation(num_blocks=4, oom_policy="wait")
    a, b = request("a", 2, 3), request("b", 2, 3)
    sim.add(a, b)
    sim.step()  # a a b b: full
    sim.step()
    assert sim.last == [("a", 2, 3)]
    assert (b.state, b.num_computed, names(sim.scheduler.waiting)) == (
        RequestState.PREEMPTED,
        0,
        ["b"],
    )
    sim.run()
    assert (names(sim.finished), b.num_preemptions) == (["a", "b"], 1)


def test_fail_ends_a_queued_request_at_once_and_goes_on_with_the_next():
    sim = simulation("cortexstream", num_blocks=4, oom_policy="fail")
    sim.add(request("a", 3, 1), request("b", 2, 1), request("c", 1, 1))
    sim.step()
    assert names(sim.failed) == ["b"]
    assert (
        "'b'" in sim.failed[0].error
        and "2 blocks" in sim.failed[0].error
        and "1 are free" in sim.failed[0].error
    )
    assert names(sim.finished) == ["a", "c"]


def test_fail_ends_a_running_request_that_cannot_grow_and_takes_its_blocks_back():
    sim = simulation(num_blocks=3, oom_policy="fail")
    a, b = request("a", 2, 2), request("b", 1, 3)
    sim.add(a, b)
    sim.run()
    assert names(sim.failed) == ["a"]  # the older one asked first
    assert names(sim.finished) == ["b"]
    assert sim.scheduler.blocks.allocator.stats().free_blocks == 3


def test_preempt_makes_the_youngest_give_way_and_compute_its_tokens_again():
    sim = simulation(num_blocks=5, oom_policy="preempt")
    a, b = request("a", 2, 4), request("b", 2, 2)
    sim.add(a, b)
    sim.step()  # a a b b .
    sim.step()  # a takes the last block; b asks in vain and is itself the youngest
    assert sim.last == [("a", 2, 3)]
    assert (b.state, b.num_computed, b.output_tokens) == (RequestState.PREEMPTED, 0, [0])
    sim.step()
    assert sim.last == [("a", 3, 4)]
    sim.step()
    sim.step()
    assert sim.last == [("b", 0, 3)]  # the prompt and the token it had sampled, in one chunk
    assert (names(sim.finished), b.output_tokens, sim.scheduler.num_preemptions) == (
        ["a", "b"],
        [0, 0],
        1,
    )


def test_a_preempted_request_comes_before_those_that_never_ran():
    sim = simulation(num_blocks=5, max_batch_size=2, oom_policy="preempt")
    sim.add(request("a", 2, 4), request("b", 2, 2), request("c", 1, 1))
    sim.step()
    sim.step()
    assert names(sim.scheduler.waiting) == ["b", "c"]


def test_a_cancelled_request_leaves_queue_or_batch():
    sim = simulation(max_batch_size=1)
    a, b = request("a", 2, 5), request("b", 2, 5)
    sim.add(a, b)
    sim.step()
    sim.scheduler.remove(b)
    sim.scheduler.remove(a)
    assert (sim.scheduler.running, list(sim.scheduler.waiting)) == ([], [])
    assert sim.scheduler.blocks.allocator.stats().free_blocks == 100


# --- free, but not usable -------------------------------------------------------------------------


def fragmented() -> Simulation:
    """Six blocks, the middle two held: . . b b . ."""
    sim = simulation("cortexstream", num_blocks=6)
    sim.add(request("a", 2, 1), request("b", 2, 1), request("c", 2, 1))
    blocks, (a, b, c) = sim.scheduler.blocks, list(sim.scheduler.waiting)
    for each in (a, b, c):
        assert blocks.allocate(each.id, 2, 2)
    sim.scheduler.waiting.clear()
    sim.scheduler.running.append(b)
    b.max_tokens = 99
    blocks.free("a")
    blocks.free("c")
    return sim


@pytest.mark.parametrize(("wanted", "unusable"), [(3, 4), (4, 4), (5, 0), (6, 0)])
def test_free_blocks_are_unusable_only_when_there_are_enough_of_them(wanted, unusable):
    sim = fragmented()
    sim.add(request("d", wanted, 1))
    assert sim.scheduler.schedule(0.0).unusable_blocks == unusable


def test_nothing_is_unusable_while_the_head_of_the_queue_is_admitted():
    sim = fragmented()
    sim.add(request("d", 2, 1))
    assert sim.scheduler.schedule(0.0).unusable_blocks == 0


def test_paged_blocks_are_never_unusable():
    sim = simulation(num_blocks=4, max_batch_size=2)
    sim.add(request("a", 3, 1), request("b", 2, 1))
    assert sim.step().unusable_blocks == 0
    assert names(sim.finished) == ["a"]


def test_a_full_batch_is_no_reason_to_call_blocks_unusable():
    sim = simulation("cortexstream", num_blocks=8, max_batch_size=1)
    sim.add(request("a", 1, 3), request("b", 1, 1))
    assert sim.step().unusable_blocks == 0


# --- every request ends ---------------------------------------------------------------------------


@st.composite
def loads(draw):
    """A small pool, limits, and requests that could each be served alone, some of them coming
    later.
    """
    batch = draw(st.integers(1, 4))
    sim = simulation(
        draw(st.sampled_from(sorted(STRATEGIES))),
        num_blocks=draw(st.integers(1, 12)),
        block_size=draw(st.integers(1, 4)),
        growth=draw(st.sampled_from([None, *GROWTHS])),
        max_seq_len=draw(st.none() | st.integers(1, 24)),
        max_batch_size=batch,
        max_step_tokens=draw(st.integers(batch, batch + 8)),
        oom_policy=draw(st.sampled_from(OOM_POLICIES)),
    )
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=8))
    requests = [request(f"r{i}", *size) for i, size in enumerate(sizes)]
    coming = [each for each in requests if sim.scheduler.blocks.could_ever_hold(each.max_slots)]
    return sim, coming, draw(st.integers(0, 3))


@given(loads())
@settings(max_examples=500, deadline=None)
def test_every_request_ends_and_every_block_comes_back(load):
    sim, coming, gap = load
    requests, idle = list(coming), 0
    limit = (
        20
        + (gap + 1) * len(coming)
        + (len(coming) + 1) * sum(each.max_slots + 1 for each in coming)
    )
    while coming or sim.scheduler.running or sim.scheduler.waiting:
        if coming and (gap == 0 or sim.num_steps % gap == 0):
            sim.add(coming.pop(0))
        busy = bool(sim.scheduler.running or sim.scheduler.waiting)
        step = sim.step()
        idle = 0 if step.chunks or step.failed or not busy else idle + 1
        assert idle <= 1, "a step that does nothing makes room for the next"
        assert sim.num_steps < limit, "no end in sight"
    assert sorted(names([*sim.finished, *sim.failed])) == sorted(names(requests))
    assert all(len(each.output_tokens) == each.max_tokens for each in sim.finished)
    assert not sim.failed or sim.scheduler.oom_policy == "fail"
    assert sim.scheduler.blocks.allocator.stats().used_blocks == 0


@given(loads())
@settings(max_examples=200, deadline=None)
def test_requests_first_run_in_the_order_they_came(load):
    sim, coming, _ = load
    sim.add(*coming)
    sim.run(limit=2000)
    ran = [each.scheduled_at for each in coming if each.scheduled_at is not None]
    assert ran == sorted(ran)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 0},
        {"max_step_tokens": 0},
        {"oom_policy": "'hope'"},
        {"max_step_tokens": 3},
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name_and_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        simulation(**{name: value.strip("'") if isinstance(value, str) else value})


def test_blocks_that_are_free_but_not_together_count_as_unusable_under_every_policy():
    """Two holes of three, and a request for five."""
    for policy in OOM_POLICIES:
        blocks = BlockManager(strategy_of("cortexstream"), num_blocks=9, block_size=1)
        scheduler = Scheduler(blocks, max_batch_size=4, max_step_tokens=16, oom_policy=policy)
        for name in "abc":
            blocks.allocate(name, 3, 3)
        blocks.free("a")
        blocks.free("c")
        scheduler.add(Request("wide", (0,) * 5, 1))
        assert scheduler.schedule(0.0).unusable_blocks == 6, policy


def test_a_request_that_an_empty_pool_refuses_fails_instead_of_waiting_for_ever():
    """A strategy of one's own that never hands out anything twice."""

    class Miser(FirstFit):
        def free(self, extents):
            super().free(extents)
            self.allocate = lambda num_blocks: None

    blocks = BlockManager(strategy_of(Miser), num_blocks=4, block_size=1)
    sim = Simulation(Scheduler(blocks, max_batch_size=1, max_step_tokens=8))
    for name in "ab":
        sim.scheduler.add(request(name, 2, 1))
    sim.run(limit=10)
    assert [each.id for each in sim.finished] == ["a"] and [each.id for each in sim.failed] == ["b"]
    assert "the allocator refused" in sim.failed[0].error
