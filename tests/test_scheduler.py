"""Continuous batching as bookkeeping: the scheduler driven by hand, without a model and MLX."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlab import Request, RequestState
from cortexlab.allocators import GROWTHS, STRATEGIES, FirstFit, strategy_of
from cortexlab.options import OOM_POLICIES
from cortexlab.scheduler.block_manager import BlockManager
from cortexlab.scheduler.block_table import Need
from cortexlab.scheduler.scheduler import Schedule, Scheduler


def request(name: str, prompt: int, max_tokens: int) -> Request:
    return Request(name, tuple(range(prompt)), max_tokens)


@dataclass
class Simulation:
    """An engine without a model: computes the chunks of a schedule, samples dummy tokens, ends
    requests.
    """

    scheduler: Scheduler
    finished: list[Request] = field(default_factory=list)
    failed: list[Request] = field(default_factory=list)
    num_steps: int = 0
    computed: dict[Request, int] = field(default_factory=dict)  # tokens whose K and V are kept

    def add(self, *requests: Request) -> None:
        for each in requests:
            self.scheduler.add(each)

    def step(self) -> Schedule:
        """Run one step; ``last`` keeps the schedule's chunks as ``(id, start, stop)``."""
        self.num_steps += 1
        step = self.scheduler.schedule(now=float(self.num_steps))
        self.last = [(chunk.request.id, chunk.start, chunk.stop) for chunk in step.chunks]
        self.check(step)
        self.failed += step.failed
        for failed in step.failed:
            failed.state = RequestState.FAILED
        self.scheduler.blocks.moves.clear()  # an engine makes them here
        for chunk in step.chunks:
            if chunk.samples:
                chunk.request.output_tokens.append(0)
                chunk.request.state = RequestState.DECODING
                if len(chunk.request.output_tokens) == chunk.request.max_tokens:
                    self.scheduler.remove(chunk.request)
                    self.finished.append(chunk.request)
        return step

    def check(self, step: Schedule) -> None:
        """Assert what holds for every step."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        blocks.check()
        assert len(scheduler.running) <= scheduler.max_batch_size
        assert sum(chunk.stop - chunk.start for chunk in step.chunks) <= scheduler.max_step_tokens
        scheduled = [chunk.request for chunk in step.chunks]
        assert len(set(scheduled)) == len(scheduled) and set(scheduled) <= set(scheduler.running)
        assert not set(scheduler.running) & set(scheduler.waiting)
        assert [each.table for each in scheduler.running if each.table not in blocks.tables] == []
        assert len(blocks.tables) == len(scheduler.running), "running requests alone hold blocks"
        for preempted in step.preempted:
            if preempted.swapped is None:
                self.computed.pop(preempted, None)
        for chunk in step.chunks:
            assert chunk.start == self.computed.get(chunk.request, 0), "a token is skipped"
            self.computed[chunk.request] = chunk.stop
            assert chunk.start < chunk.stop <= chunk.request.num_tokens
            assert chunk.request.num_computed == chunk.stop <= chunk.request.table.capacity
        if step.unusable_blocks:
            assert step.unusable_blocks == blocks.allocator.stats().free_blocks
            if not step.failed:  # a refused request that failed has left the queue
                head = scheduler.waiting[0]
                assert step.unusable_blocks >= blocks.blocks_wanted(head.need)

    def run(self, limit: int = 1000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            assert self.num_steps < limit, "the load does not end"
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
    limits = {"max_batch_size": 4, "max_step_tokens": 64} | options
    return Simulation(Scheduler(blocks, **limits))


def names(requests) -> list[str]:
    return [each.id for each in requests]


# --- stories --------------------------------------------------------------------------------------


def test_a_request_joins_as_soon_as_another_leaves():
    sim = simulation(max_batch_size=2)
    sim.add(request("a", 3, 2), request("b", 2, 4), request("c", 2, 1))
    sim.step()
    assert sim.last == [("a", 0, 3), ("b", 0, 2)]  # two whole prompts in one step
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
    num_sampled = len(short.output_tokens), len(long.output_tokens)
    assert num_sampled == (4, 1), "only the chunk that ends a prompt samples"


def test_a_request_is_not_admitted_before_an_earlier_one_that_does_not_fit():
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


def test_wait_stalls_a_running_request_that_cannot_grow_while_others_finish():
    sim = simulation(num_blocks=5, oom_policy="wait")
    a, b = request("a", 2, 2), request("b", 2, 3)
    sim.add(a, b)
    sim.step()  # a a b b .
    sim.step()
    assert sim.last == [("a", 2, 3)]  # a took the last block; b keeps its two
    assert names(sim.scheduler.running) == ["b"]
    sim.run()
    assert b.num_preemptions == 0


def test_wait_preempts_the_youngest_only_when_all_running_requests_stall():
    sim = simulation(num_blocks=4, oom_policy="wait")
    a, b = request("a", 2, 3), request("b", 2, 3)
    sim.add(a, b)
    sim.step()  # a a b b: full
    sim.step()
    assert sim.last == [("a", 2, 3)]
    assert (b.state, b.num_computed) == (RequestState.PREEMPTED, 0)
    assert names(sim.scheduler.waiting) == ["b"]
    sim.run()
    assert (names(sim.finished), b.num_preemptions) == (["a", "b"], 1)


def test_a_request_that_stalls_alone_gives_way_and_is_admitted_again_in_that_step():
    """x a a a .   x ends, a fills the last block, and only all five blocks would hold a's next."""
    sim = simulation("best_fit", num_blocks=5)
    sim.add(request("x", 1, 1), request("a", 3, 3))
    sim.step()
    sim.step()
    assert sim.last == [("a", 3, 4)]
    step = sim.step()
    assert (names(step.preempted), sim.last, step.unusable_blocks) == (["a"], [("a", 0, 5)], 0)


def test_fail_ends_a_queued_request_at_once_and_admits_the_next():
    sim = simulation("cortexstream", num_blocks=4, oom_policy="fail")
    sim.add(request("a", 3, 1), request("b", 2, 1), request("c", 1, 1))
    sim.step()
    assert names(sim.failed) == ["b"]
    error = sim.failed[0].error
    assert "'b'" in error and "2 blocks" in error and "1 are free" in error
    assert names(sim.finished) == ["c", "a"], "chunks of one row stand first"


def test_fail_ends_a_running_request_that_cannot_grow_and_frees_its_blocks():
    sim = simulation(num_blocks=3, oom_policy="fail")
    a, b = request("a", 2, 2), request("b", 1, 3)
    sim.add(a, b)
    sim.run()
    assert names(sim.failed) == ["a"]  # the older request asks first
    assert names(sim.finished) == ["b"]
    assert sim.scheduler.blocks.allocator.stats().free_blocks == 3


def test_preempt_takes_the_blocks_of_the_youngest_which_computes_its_tokens_again():
    sim = simulation(num_blocks=5, oom_policy="preempt")
    a, b = request("a", 2, 4), request("b", 2, 2)
    sim.add(a, b)
    sim.step()  # a a b b .
    sim.step()  # a takes the last block; b finds none and is itself the youngest
    assert sim.last == [("a", 2, 3)]
    assert (b.state, b.num_computed, b.output_tokens) == (RequestState.PREEMPTED, 0, [0])
    sim.step()
    assert sim.last == [("a", 3, 4)]
    sim.step()
    sim.step()
    assert sim.last == [("b", 0, 3)]  # b's prompt and its sampled token, in one chunk
    assert (names(sim.finished), b.output_tokens) == (["a", "b"], [0, 0])
    assert sim.scheduler.num_preemptions == 1


def test_a_preempted_request_waits_before_requests_that_never_ran():
    sim = simulation(num_blocks=5, max_batch_size=2, oom_policy="preempt")
    sim.add(request("a", 2, 4), request("b", 2, 2), request("c", 1, 1))
    sim.step()
    sim.step()
    assert names(sim.scheduler.waiting) == ["b", "c"]


def test_a_removed_request_leaves_queue_or_batch():
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
    """A pool of six blocks, the middle two held: . . b b . ."""
    sim = simulation("cortexstream", num_blocks=6)
    sim.add(request("a", 2, 1), request("b", 2, 1), request("c", 2, 1))
    blocks, (a, b, c) = sim.scheduler.blocks, list(sim.scheduler.waiting)
    for each in (a, b, c):
        each.table = blocks.allocate(Need(2, 2))
    sim.scheduler.waiting.clear()
    sim.scheduler.running.append(b)
    b.max_tokens = 99
    blocks.free(a.table)
    blocks.free(c.table)
    return sim


@pytest.mark.parametrize(("wanted", "unusable"), [(3, 4), (4, 4), (5, 0), (6, 0)])
def test_free_blocks_are_unusable_only_if_they_are_as_many_as_wanted(wanted, unusable):
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


def test_blocks_are_not_unusable_because_the_batch_is_full():
    sim = simulation("cortexstream", num_blocks=8, max_batch_size=1)
    sim.add(request("a", 1, 3), request("b", 1, 1))
    assert sim.step().unusable_blocks == 0


# --- every request ends ---------------------------------------------------------------------------


@st.composite
def loads(draw):
    """A simulation with a small pool, requests that each fit the empty pool, and the steps between
    two arrivals.
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
    num_slots = sum(each.max_slots + 1 for each in coming)
    limit = 20 + (gap + 1) * len(coming) + (len(coming) + 1) * num_slots
    while coming or sim.scheduler.running or sim.scheduler.waiting:
        if coming and (gap == 0 or sim.num_steps % gap == 0):
            sim.add(coming.pop(0))
        busy = bool(sim.scheduler.running or sim.scheduler.waiting)
        step = sim.step()
        idle = 0 if step.chunks or step.failed or not busy else idle + 1
        assert idle <= 1, "two steps in a row did nothing"
        assert sim.num_steps < limit, "the load does not end"
    assert sorted(names([*sim.finished, *sim.failed])) == sorted(names(requests))
    assert all(len(each.output_tokens) == each.max_tokens for each in sim.finished)
    assert not sim.failed or sim.scheduler.oom_policy == "fail"
    assert sim.scheduler.blocks.allocator.stats().used_blocks == 0


@given(loads())
@settings(max_examples=200, deadline=None)
def test_requests_first_run_in_order_of_arrival(load):
    sim, coming, _ = load
    sim.add(*coming)
    sim.run(limit=2000)
    ran = [each.scheduled_at for each in coming if each.scheduled_at is not None]
    assert ran == sorted(ran)


LIMITS = [("max_batch_size", 0), ("max_step_tokens", 0), ("max_step_tokens", 3)]


@pytest.mark.parametrize(("name", "value"), [*LIMITS, ("oom_policy", "hope")])
def test_a_limit_out_of_range_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value!r}"):
        simulation(**{name: value})


def test_free_blocks_in_holes_too_small_are_unusable_under_every_policy():
    """Two holes of three blocks, and a request for five."""
    for policy in OOM_POLICIES:
        blocks = BlockManager(strategy_of("cortexstream"), num_blocks=9, block_size=1)
        scheduler = Scheduler(blocks, max_batch_size=4, max_step_tokens=16, oom_policy=policy)
        a, _, c = (blocks.allocate(Need(3, 3)) for _ in range(3))
        blocks.free(a)
        blocks.free(c)
        scheduler.add(Request("wide", (0,) * 5, 1))
        assert scheduler.schedule(0.0).unusable_blocks == 6, policy


def test_a_request_that_an_empty_pool_refuses_fails_instead_of_waiting_for_ever():
    class Miser(FirstFit):  # hands out nothing after the first free
        def free(self, extents):
            super().free(extents)
            self.allocate = lambda num_blocks: None

    blocks = BlockManager(strategy_of(Miser), num_blocks=4, block_size=1)
    sim = Simulation(Scheduler(blocks, max_batch_size=1, max_step_tokens=8))
    for name in "ab":
        sim.scheduler.add(request(name, 2, 1))
    sim.run(limit=10)
    assert (names(sim.finished), names(sim.failed)) == (["a"], ["b"])
    assert "the allocator refused" in sim.failed[0].error
