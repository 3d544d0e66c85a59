"""The replay equals the engine's loop taken step by step, yields equal rows on every machine, and
is right on the real traces.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import ceil
from unittest.mock import patch

import pytest
from conftest import real_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlab import BadInput, metrics
from cortexlab.allocators import GROWTHS, STRATEGIES, strategy_of
from cortexlab.allocators.paged import Paged
from cortexlab.cli import main as cli
from cortexlab.options import OOM_POLICIES, ReplayOptions
from cortexlab.replay import Replay, accounting, reference, replay, tables
from cortexlab.replay import naive as naive_replay
from cortexlab.replay.naive import NaiveReplay
from cortexlab.replay.simulation import NUM_SAMPLES, unlimited_blocks
from cortexlab.replay.step_time import SECOND, StepTime
from cortexlab.scheduler.block_manager import BlockManager
from cortexlab.scheduler.block_table import Need
from cortexlab.scheduler.scheduler import Scheduler
from cortexlab.workloads.synthetic import WorkItem, make_workload

NS = 1e-9
LONG = 6  # tokens of a long extent, in place of `LONG_EXTENT`, in toy pools


def step_time(base: int = 10, token: int = 0, sequence: int = 0) -> StepTime:
    """A step time in whole nanoseconds."""
    return StepTime(base * NS, token * NS, sequence * NS)


def item(at: int, prompt: int, output: int, **more) -> WorkItem:
    """A request that arrives at nanosecond ``at``."""
    return WorkItem(at * NS, prompt, output, **more)


def replayed(
    items, strategy: str = "paged", *, num_blocks: int = 100, block_size: int = 1, **options
) -> Replay:
    options = {"step_time": step_time()} | options
    done = Replay(strategy, num_blocks=num_blocks, block_size=block_size, **options)
    done.run(items)
    return done


def row_of(done: Replay) -> dict:
    return {name: value for name, value in done.row.items() if name != "seconds"}


# --- equal to the naive replay --------------------------------------------------------------------


@st.composite
def loads(draw):
    """Requests that arrive at any time and end at or before their max_tokens, in a tiny pool under
    limits of every kind.
    """
    batch = draw(st.integers(1, 4))
    caching = draw(st.booleans())
    prefix_block = draw(st.integers(1, 3))
    block_size = prefix_block * draw(st.integers(1, 2)) if caching else draw(st.integers(1, 5))
    num_blocks = draw(st.integers(1, 14) | st.integers(8, 40))  # a watermark shows in large pools
    options = {
        "strategy": draw(st.sampled_from(sorted(STRATEGIES))),
        "growth": draw(st.sampled_from([None, *GROWTHS])),
        "oom_policy": draw(st.sampled_from(OOM_POLICIES)),
        "num_blocks": num_blocks,
        "block_size": block_size,
        "max_batch_size": batch,
        "max_step_tokens": draw(st.integers(batch, batch + 10)),
        "max_seq_len": draw(st.none() | st.integers(1, 24)),
        "prefix_caching": caching,
        "watermark": draw(st.sampled_from([0, 0.1, 0.25, 0.5])),
    }
    unit = draw(st.sampled_from([1, 1, 50_000_000]))  # ns; samples are taken every 100 ms
    times = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 3)).filter(any)
    ns = tuple(unit * n for n in draw(times))
    at, items, known = 0, [], {}
    for _ in range(draw(st.integers(1, 9))):
        at += unit * draw(st.sampled_from([0, 0, 1, 3, 10, 11, 40, 200]))
        prompt, output = draw(st.integers(1, 12)), draw(st.integers(1, 14))
        more = draw(st.sampled_from([None, 0, 1, 6]))
        ids = []
        if caching:
            letters = draw(st.text("ab", min_size=12, max_size=12))
            for start in range(0, prompt, prefix_block):
                end = min(prompt, start + prefix_block)
                key = letters[: ceil(end / prefix_block)], end
                ids.append(known.setdefault(key, len(known)))
        prefix = {"prefix_ids": tuple(ids), "prefix_block": prefix_block}
        items.append(item(at, prompt, output, max_tokens=more and output + more, **prefix))
    return items, options, ns


def hands_out_single_blocks(options) -> bool:
    sizes = options["num_blocks"], options["block_size"], options["max_seq_len"]
    one = BlockManager(strategy_of(options["strategy"]), *sizes).allocator.allocate(1)
    return sum(extent.num_blocks for extent in one) == 1


def agree(items, options, ns) -> None:
    """Assert that the replay and the naive replay give equal requests, rows and samples."""
    if options["prefix_caching"] and not hands_out_single_blocks(options):
        with pytest.raises(BadInput, match="prefix_caching"):
            Replay(**options)
        return
    naive = NaiveReplay(items, **options, step_ns=ns)
    done = Replay(**options, step_time=step_time(*ns))
    if not naive.served:
        with pytest.raises(BadInput, match="no request can be served"):
            done.run(items)
        return
    naive.run()
    long_there = patch.object(naive_replay, "LONG_EXTENT", LONG)
    with patch.object(accounting, "LONG_EXTENT", LONG), long_there:
        row = done.run(items)
        expected = naive.row()
    assert len(done.requests) == len(naive.served)
    for ours, theirs in zip(done.requests, naive.served, strict=True):
        assert (ours.id, str(ours.state)) == (theirs.request.id, str(theirs.request.state))
        assert ours.num_preemptions == theirs.request.num_preemptions
        assert ours.first_ns == (theirs.token_ns[0] if theirs.token_ns else None)
        assert ours.finished_ns == theirs.finished_ns
    for name, value in expected.items():
        exact = isinstance(value, int | None) or name == "duration"
        assert row[name] == (value if exact else pytest.approx(value, rel=1e-9, abs=1e-9)), name
    if row["failed"] == 0:  # a failed request's gaps are no latencies
        assert +done.ledger.totals.gaps == naive.gaps()
    for name, value in naive.latencies().items():
        if row["failed"] == 0 or "itl" not in name:
            assert row[name] == (None if value is None else pytest.approx(value, rel=1e-9)), name
    if naive.steps:
        assert sum(shares(row)) == pytest.approx(1, abs=1e-12)
    samples_agree(done, naive)
    done.blocks.check()
    assert done.blocks.num_held == 0


def samples_agree(done: Replay, naive: NaiveReplay) -> None:
    """Assert that each sample shows the state of the naive step at its time."""
    steps = {step.started_ns / SECOND: step for step in naive.steps}
    assert bool(done.samples) == bool(naive.steps)
    for sample in done.samples:
        step = steps[sample["started_at"]]
        slots = step.shares()
        empty = sample["reserved_slots"] + sample["internal_slots"]
        assert sample["token_slots"] == slots["token"]
        assert empty == slots["reserved"] + slots["internal"]
        assert sample["external_slots"] == slots["external"]
        assert sample["num_running"] == step.num_running
        assert sample["num_waiting"] == step.num_waiting
        assert {name: sample[name] for name in step.pool} == step.pool


@given(loads())
@settings(max_examples=1500, deadline=None)
def test_the_replay_equals_the_naive_replay(load):
    agree(*load)


# --- errors that the comparison found -------------------------------------------------------------


def test_blocks_held_behind_the_last_token_take_nothing_from_long_extents():
    """Two blocks are reserved for one token: by cortexstream in one extent, by paged in two, around
    a held block.
    """
    items = [item(0, 1, 1), item(0, 1, 1, max_tokens=4)]
    options = {"growth": "reserve", "num_blocks": 9, "block_size": 128, "step_time": step_time()}
    assert Replay("cortexstream", **options).run(items)["long_extent_share"] == 1.0
    paged = Replay("paged", **options)
    first = paged.blocks.allocate(Need(128, 128))
    paged.blocks.allocate(Need(128, 128))
    paged.blocks.free(first)
    assert paged.run([item(0, 1, 1, max_tokens=200)])["long_extent_share"] == 1.0


def test_a_relocation_copies_the_tokens_written_so_far():
    """Blocks of two: a b . .  ->  . b a a when a's third token comes; a then grows in place."""
    done = replayed([item(0, 2, 5), item(0, 1, 2)], "best_fit", num_blocks=20, block_size=2)
    assert (done.ledger.totals.copied_tokens, done.row["copied_blocks"]) == (2, 1)
    done = replayed([item(0, 1, 4), item(2, 1, 4)], "best_fit", num_blocks=64, block_size=2)
    assert done.ledger.totals.copied_tokens == 2 + 2, "two moves of two tokens, prompts of one"


def test_requests_that_end_in_one_step_give_their_blocks_back_oldest_first():
    """Blocks of four: r1 takes its last block at its fifth token, the older r0 at its ninth; both
    requests end with that step.
    """
    done = Replay("paged", num_blocks=20, block_size=4, step_time=step_time())
    freed, free = [], done.blocks.free
    done.blocks.free = lambda table, ids=(): (freed.append(table.num_blocks), free(table, ids))
    done.run([item(0, 5, 5), item(0, 2, 5)])
    assert [request.finished_ns for request in done.requests] == [50, 50]
    assert freed == [3, 2], "blocks of r0, then blocks of r1"


def test_blocks_are_unusable_only_in_the_step_whose_refused_request_failed():
    """. . b b b b . . .   c wants four of the five free and fails at once; the queue is empty
    in b's two later steps.
    """
    items = [item(0, 2, 1), item(0, 1, 4), item(5, 4, 1)]
    row = replayed(items, "cortexstream", num_blocks=9, oom_policy="fail").row
    assert row["failed"] == 1
    assert row["external_share"] == pytest.approx((5 / 9) / 4)


def test_a_block_whose_tokens_have_an_id_only_in_part_is_not_shared():
    """One id for a system prompt of two tokens: a block of four holds two more tokens, and these
    differ.
    """
    items = [item(at, 5, 1, prefix_ids=(0,), prefix_block=2) for at in (0, 100)]
    for block_size, cached in ((2, [0, 2]), (4, [0, 0])):
        done = replayed(items, block_size=block_size, prefix_caching=True)
        assert [request.cached_tokens for request in done.requests] == cached


def test_ids_behind_the_end_of_a_scaled_prompt_do_not_count():
    long = WorkItem(0.0, 1025, 3, (0, 1, 2), 512).scaled(0.3)
    assert (long.prompt_tokens, long.prefix_block, long.prefix_ids) == (308, 154, (0, 1))
    row = replayed([long, replace(long, arrived_at=100.0)], block_size=154, prefix_caching=True).row
    assert (row["completed"], row["prefix_hit_rate"]) == (2, 0.5)


# --- equal rows on every machine ------------------------------------------------------------------

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


def test_rows_and_samples_are_equal_to_the_byte_whatever_the_hash_seed():
    def run(hash_seed: str) -> bytes:
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.run(
            [sys.executable, "-c", ROWS], check=True, capture_output=True, env=env
        ).stdout

    first = run("1")
    assert len(json.loads(first)) == 5
    assert first == run("1") == run("2")


def test_two_runs_in_one_process_are_equal_to_the_byte():
    items = make_workload("lognormal", 40, seed=1, request_rate=30.0)
    documents = []
    for _ in range(2):
        done = replay(items, ["paged", "buddy"], num_blocks="50%", max_batch_size=4)
        documents.append(json.dumps([[row_of(each), each.samples] for each in done]))
        assert all(each.row["seconds"] > 0 for each in done)
    assert documents[0] == documents[1]


# --- stories --------------------------------------------------------------------------------------


def calls_of(monkeypatch) -> list[int]:
    """Nanosecond of every call of the scheduler."""
    calls, schedule = [], Scheduler.schedule

    def counted(self, now, due=None):
        calls.append(round(now * SECOND))
        return schedule(self, now, due)

    monkeypatch.setattr(Scheduler, "schedule", counted)
    return calls


def test_quiet_steps_are_taken_in_one_jump(monkeypatch):
    """The prompt's step, and one jump over 99 steps of 10 ns: a block of 200 has room for all
    tokens.
    """
    calls = calls_of(monkeypatch)
    done = replayed([item(0, 4, 100)], block_size=200)
    assert calls == [0]
    assert (done.requests[0].first_ns, done.requests[0].finished_ns) == (10, 1000)
    assert done.row["utilization"] == pytest.approx(sum(range(5, 104)) / (99 * 200))


def test_a_jump_ends_before_the_first_step_that_starts_at_or_after_an_arrival(monkeypatch):
    """Steps start at 0, 10, 20 ...: the request of 25 joins at 30, the request of 50 at 50."""
    calls = calls_of(monkeypatch)
    done = replayed([item(0, 1, 50), item(25, 1, 1), item(50, 1, 1)], block_size=100)
    assert calls == [0, 30, 50]
    assert [request.first_ns for request in done.requests] == [10, 40, 60]
    assert done.row["mean_ttft_ms"] == pytest.approx((10 + 15 + 10) / 3 / 1e6)


def test_an_idle_pool_waits_for_the_next_arrival():
    done = replayed([item(0, 1, 2), item(1000, 1, 2)])
    times = [(request.first_ns, request.finished_ns) for request in done.requests]
    assert times == [(10, 20), (1010, 1020)]
    assert done.ledger.totals.time == 40, "time in which nothing runs has no weight"


def test_the_time_of_a_step_is_affine_in_its_tokens_and_sequences():
    """Prompts of 3 and 2 tokens: 100 + 5 * 1 + 2 * 10; then two tokens of two sequences; then one
    token of one sequence.
    """
    done = replayed([item(0, 3, 2), item(0, 2, 3)], step_time=step_time(100, 1, 10))
    assert [request.first_ns for request in done.requests] == [125, 125]
    assert [request.finished_ns for request in done.requests] == [125 + 122, 125 + 122 + 111]


def test_a_queue_is_served_in_order_of_arrival_and_ttft_counts_it():
    """One at a time: r1 arrives at 0, r0 at 5."""
    done = replayed([item(5, 1, 2), item(0, 1, 3)], max_batch_size=1)
    found = [(request.id, request.first_ns, request.finished_ns) for request in done.requests]
    assert found == [("r1", 10, 30), ("r0", 40, 50)]
    assert done.row["p99_ttft_ms"] == pytest.approx((10 + 0.99 * 25) / 1e6)
    assert done.row["completed_by_last_arrival"] == 0


def two_in_a_pool_of_five(oom_policy: str) -> tuple[dict, list]:
    """Row and ends of two prompts of two slots, each to grow by two: a a b b ."""
    done = replayed([item(0, 2, 3), item(0, 2, 3)], num_blocks=5, oom_policy=oom_policy)
    return done.row, [(str(r.state), r.finished_ns, r.num_preemptions) for r in done.requests]


def test_wait_stalls_the_younger_request_and_preempts_it_when_both_stall():
    row, requests = two_in_a_pool_of_five("wait")
    # b's three tokens are computed again at 30.
    assert requests == [("finished", 30, 0), ("finished", 50, 1)]
    assert (row["num_preemptions"], row["failed"]) == (1, 0)


def test_fail_ends_the_request_that_wants_a_block_when_none_is_free():
    row, requests = two_in_a_pool_of_five("fail")
    assert requests == [("finished", 30, 0), ("failed", 10, 0)]
    assert (row["completed"], row["failed"], row["requests"], row["tokens"]) == (1, 1, 2, 5)


def test_preempt_sends_the_youngest_back_at_once():
    row, requests = two_in_a_pool_of_five("preempt")
    assert requests == [("finished", 30, 0), ("finished", 50, 1)]
    assert row["num_preemptions"] == 1


def shares(row: dict) -> list[float]:
    return [row[f"{name}_share"] for name in metrics.SHARES]


def test_static_holds_a_region_a_request_and_the_slots_never_filled_are_internal():
    """A region of 8: 3 then 4 tokens, 1 then 0 slots reserved, 4 never filled."""
    row = replayed([item(0, 3, 2)], "static", num_blocks=16, max_seq_len=8).row
    assert shares(row) == pytest.approx([3.5 / 8, 0.5 / 8, 4 / 8, 0])
    assert (row["peak_blocks"], row["utilization"], row["extents_per_sequence"]) == (8, 4 / 8, 1)


def test_slots_filled_later_are_reserved_and_slots_never_filled_internal():
    """A request for ten tokens that ends after two: 3 + 10 - 1 slots held, four filled."""
    row = replayed([item(0, 3, 2, max_tokens=10)], "cortexstream", num_blocks=16).row
    assert shares(row) == pytest.approx([3.5 / 12, 0.5 / 12, 8 / 12, 0])


def test_free_blocks_that_are_not_together_are_external():
    """a a b b c c .  ->  . . b b . . .: d wants four of the five free blocks, and waits for b in
    one of three steps.
    """
    items = [item(0, 2, 1), item(0, 1, 2), item(0, 2, 1), item(5, 4, 1)]
    row = replayed(items, "cortexstream", num_blocks=7).row
    assert row["external_share"] == pytest.approx((5 / 7) / 3)


def test_the_shares_of_any_workload_sum_to_one():
    items = make_workload("heavy-tail", 40, seed=2, request_rate=50.0)
    for done in replay(items, sorted(STRATEGIES), num_blocks="70%", max_batch_size=6):
        assert sum(shares(done.row)) == pytest.approx(1, abs=1e-12), done.strategy.name


def test_a_request_that_can_never_fit_is_refused_and_counted_and_the_run_goes_on():
    row = replayed([item(0, 2, 1), item(0, 9, 2), item(0, 3, 3, max_tokens=99)], num_blocks=9).row
    assert (row["requests"], row["completed"], row["refused"], row["tokens"]) == (3, 1, 2, 3)


def test_when_all_are_refused_the_pool_is_named():
    with pytest.raises(BadInput, match="none of 2 can ever fit the pool of 9 slots"):
        replayed([item(0, 10, 1), item(0, 9, 2)], num_blocks=9)


def test_a_request_that_fails_for_want_of_blocks_is_counted_as_failed():
    """cortexstream_buddy hands out four of eight blocks for a token; eight tokens have no room."""
    items = [item(0, 1, 3), item(0, 8, 1)]
    row = replayed(items, "cortexstream_buddy", num_blocks=8, oom_policy="fail").row
    assert (row["completed"], row["failed"]) == (1, 1)


def test_a_request_of_one_token_has_no_gap_and_no_decode_step():
    row = replayed([item(0, 3, 1)]).row
    of_decode_steps = ("mean_itl_ms", "mean_tpot_ms", "utilization", "mean_live_tokens")
    assert [row[name] for name in (*of_decode_steps, "prefix_hit_rate")] == [None] * 5
    assert row["mean_ttft_ms"] == row["mean_e2el_ms"] == pytest.approx(10e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks.*0"),
        ({"block_size": 0}, "block_size.*0"),
        ({"block_size": -1}, "block_size.*-1"),
        ({"max_batch_size": 0}, "max_batch_size.*0"),
        ({"max_batch_size": 2.5}, "max_batch_size.*2.5"),
        ({"max_seq_len": 0}, "max_seq_len.*0"),
        ({"max_batch_size": 4, "max_step_tokens": 3}, "max_step_tokens.*3"),
        ({"oom_policy": "hope"}, "oom_policy.*'hope'"),
        ({"strategy": "magic"}, "strategy.*'magic'"),
        ({"growth": "shrink"}, "growth.*'shrink'"),
        (
            {"strategy": "static", "num_blocks": 8, "max_seq_len": 4, "prefix_caching": True},
            "prefix_caching.*'static'",
        ),
    ],
)
def test_an_argument_out_of_range_is_named_with_its_value(options, message):
    with pytest.raises(BadInput, match=message):
        Replay(**{"num_blocks": 9, "block_size": 1} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_sizes": [16, 0]}, "block_size.*0"),
        ({"num_blocks": "0%"}, "num_blocks.*'0%'"),
        ({"num_blocks": 0}, "num_blocks.*0"),
        ({"num_blocks": "most"}, "num_blocks.*'most'"),
        ({"max_batch_size": 0}, "max_batch_size.*0"),
        ({"strategies": ["magic"]}, "'magic'"),
    ],
)
def test_replay_names_what_is_wrong_before_anything_has_run(options, message):
    with pytest.raises(BadInput, match=message):
        replay([item(0, 3, 3)], **options)


def test_prefixes_are_shared_in_blocks_of_the_traces_size_or_a_multiple():
    items = [item(0, 5, 1, prefix_ids=(0, 1, 2), prefix_block=2)]
    for block_size in (1, 3, 5):
        with pytest.raises(BadInput, match=f"multiple of 2 .*not {block_size}"):
            replayed(items, block_size=block_size, prefix_caching=True)
    for block_size in (2, 4, 6):
        done = replayed(items, block_size=block_size, prefix_caching=True)
        assert done.row["prefix_hit_rate"] == 0


def test_prefix_hits_are_counted_in_blocks_and_in_tokens():
    """Blocks of two: two equal prompts of five tokens, one with an equal first block."""
    items = [
        item(at, 5, 1, prefix_ids=ids, prefix_block=2)
        for at, ids in ((0, (0, 1, 2)), (50, (0, 1, 2)), (100, (0, 3, 4)))
    ]
    done = replayed(items, block_size=2, prefix_caching=True)
    assert done.row["prefix_hit_rate"] == pytest.approx((0 + 3 + 1) / 9)
    assert done.row["prefix_hit_tokens_rate"] == pytest.approx((0 + 5 + 2) / 15)
    cached = [request.cached_tokens for request in done.requests]
    assert cached == [0, 4, 2], "the last token is always computed"
    assert done.row["copied_blocks"] == 1, "the partial last block is copied, not shared"


def test_a_block_of_two_ids_counts_as_two_hits():
    """Ids of two tokens, blocks of four: [0 1] [2 .] twice, [0 1] [3 4], and [0 5] [6 .], which
    shares no whole block.
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
    """1,024 tokens of the second prompt are found, two of its four ids; nothing of the third."""
    items = [
        item(0, 1600, 1, prefix_ids=(1, 2, 3, 4)),
        item(100, 1600, 1, prefix_ids=(1, 2, 9, 8)),
        item(200, 512, 1, prefix_ids=(7,)),
    ]
    row = replayed(items, block_size=1024, prefix_caching=True).row
    assert row["prefix_hit_rate"] == pytest.approx(2 / 9)
    assert row["prefix_hit_tokens_rate"] == pytest.approx(1024 / 3712)


CONTRADICTIONS = [[(1, 2), (3, 2)], [(1, 2), (2, 1)], [(1, 1)], [(1, 2, 1), (2, 2, 1)]]
CONTRADICTIONS += [[(1, 2), (3, 2), (1, 2)]]


@pytest.mark.parametrize("prompts", CONTRADICTIONS)
@pytest.mark.parametrize("gap", [0, 1, 100])
def test_ids_that_contradict_each_other_lose_no_block(prompts, gap):
    """An id stands for its block and all before it; a trace that breaks this loses hits only."""
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


# --- samples of the pool's state ------------------------------------------------------------------


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
def test_a_run_of_any_length_has_a_bounded_number_of_samples_evenly_in_time(items):
    done = replayed(items, block_size=512, num_blocks=2000, max_batch_size=1, step_time=reference)
    at = [sample["started_at"] for sample in done.samples]
    assert 2 <= len(at) <= 2 * NUM_SAMPLES + 1
    assert all(before < after for before, after in pairwise(at))
    end = done.clock.now / SECOND
    assert at[0] < end / 50 and at[-1] > 0.95 * end, "samples do not span the run"
    longest = max(after - before for before, after in pairwise(at))
    assert longest < end / 20, "a long time has no sample"


# --- strategies of a user's own that break the allocator's contract -------------------------------

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
    "Hands out no blocks."

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
    "Keeps the blocks freed after an odd number of extensions."
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
_, *BAD = re.findall(r"^class (\w+)", BAD_STRATEGIES, re.MULTILINE)  # all but `Talks`


@pytest.fixture
def bad(tmp_path, monkeypatch, capsys):
    """Folder with the module ``bad_strategies``. A test that takes half a minute is interrupted: it
    is in an endless loop.
    """
    (tmp_path / "bad_strategies.py").write_text(BAD_STRATEGIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_strategies", raising=False)

    def late(*_):
        raise KeyboardInterrupt("the replay does not end")  # not caught as a strategy's error

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    sys.modules.pop("bad_strategies", None)


def called(*words) -> int:
    """Exit code of `cortexlab replay`."""
    command = "replay --requests 60 --workload heavy-tail --request-rate 40 --out out"
    try:
        return cli.main([*command.split(), *words])
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
        pytest.skip("a reservation is never extended")
    sys.path.insert(0, str(bad))
    try:
        broken = getattr(importlib.import_module("bad_strategies"), name)
        items = [item(n * 10**7, 40, 60) for n in range(40)]
        options = {"block_sizes": [4], "num_blocks": 120, "growth": growth, "max_batch_size": 8}
        with pytest.raises(BadInput, match=f"^[^\n]*{name}[^\n]*$"):
            replay(items, [broken], **options)
    finally:
        sys.path.remove(str(bad))


def test_a_bad_strategy_behind_a_good_one_leaves_no_result(bad, capsys):
    assert called("--strategies", "paged,bad_strategies:Fewer", "--json") == 2
    stdout, stderr = capsys.readouterr()
    (line,) = [line for line in stderr.splitlines() if line != TALK]
    assert stdout == "" and "Fewer" in line
    assert not (bad / "out").exists()


def test_a_strategy_that_prints_does_not_spoil_the_document(bad, capsys):
    words = "--strategies paged,bad_strategies:Talks --num-blocks 60% --json"
    assert called(*words.split()) == 0
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
    mine, other = type("paged", (Paged,), {}), type("Paged", (Paged,), {})
    for strategies in (["paged", "paged"], ["paged", mine], [mine, mine], [Paged, other]):
        with pytest.raises(BadInput, match=r"(?i)'paged'"):
            replay([item(0, 3, 3)], strategies)


def test_prefix_caching_on_a_workload_without_ids_is_bad_input(bad, capsys):
    assert called("--prefix-caching", "--block-size", "512") == 2
    stderr = capsys.readouterr().err
    assert "prefix" in stderr and stderr.count("\n") == 1
    assert not (bad / "out").exists()


def test_a_pool_is_a_number_a_percentage_of_pageds_peak_or_unlimited():
    items = [item(0, 8, 3), item(0, 8, 3)]
    (unlimited,) = replay(items, block_sizes=[4], step_time=step_time())
    assert unlimited.row["peak_blocks"] == 6  # two times ten slots, in blocks of four
    for asked, num_blocks in ((7, 7), ("50%", 3), ("75%", 5)):
        (done,) = replay(items, block_sizes=[4], num_blocks=asked, step_time=step_time())
        assert done.row["num_blocks"] == num_blocks


@given(loads())
@settings(max_examples=200, deadline=None)
def test_an_unlimited_pool_is_never_used_up(load):
    items, options, ns = load
    if options["strategy"] in ("static", "cortexstream_buddy"):
        return  # these two hand out more blocks than they are asked for
    if not options["prefix_caching"]:
        items = [replace(it, prefix_ids=()) for it in items]
    options["num_blocks"] = unlimited_blocks(
        items, options["block_size"], options["max_batch_size"], options["prefix_caching"]
    )
    # Under `chain`, a contiguous sequence with neighbours cannot grow in a pool of any size.
    options["growth"] = None
    row = Replay(**options, step_time=step_time(*ns)).run(items)
    for name in ("refused", "failed", "num_preemptions", "external_share"):
        assert row[name] == 0, name


def test_tables_have_a_row_a_run_a_request_and_a_sample():
    items = [item(0, 3, 2), item(0, 2, 2)]
    done = replay(items, ["paged", "static"], num_blocks=64, step_time=step_time())
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
def test_a_step_time_out_of_range_is_named_with_its_value(values, message):
    with pytest.raises(BadInput, match=message):
        StepTime(*values)


def test_a_step_time_that_rounds_to_no_nanosecond_is_refused():
    """The clock counts whole nanoseconds: steps of 0 ns would never reach the next arrival."""
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
def test_a_file_without_a_valid_step_time_is_refused_in_one_line(tmp_path, text, message):
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


@pytest.fixture(scope="module")
def azure():
    return real_trace("azure_2023_conv")


@pytest.fixture(scope="module")
def mooncake():
    return real_trace("mooncake_conversation")


def served(
    items, block_size: int, num_blocks: int | None = None, prefix_caching: bool = False
) -> dict:
    """Row of ``paged``; without ``num_blocks`` in an unlimited pool."""
    batch = ReplayOptions.max_batch_size
    pool = num_blocks or unlimited_blocks(items, block_size, batch, prefix_caching)
    options = {"block_size": block_size, "prefix_caching": prefix_caching}
    return Replay("paged", num_blocks=pool, **options).run(items)


@pytest.mark.parametrize(("block_size", "utilization"), [(16, 0.994), (64, 0.975), (512, 0.836)])
def test_azure_has_the_utilization_that_its_lengths_imply(azure, block_size, utilization):
    """Utilization, live tokens over slots held in every decode step of every request, depends on
    the lengths alone.
    """
    row = served(azure, block_size)
    assert row["utilization"] == pytest.approx(utilization, abs=0.003)
    assert (row["requests"], row["completed"], row["tokens"]) == (19_366, 19_366, 26_450_535)
    if block_size == 512:
        live, held = 0, 0
        for it in azure:  # a decode step ends with prompt + 1 ... prompt + output - 1 tokens
            for tokens in range(it.prompt_tokens + 1, it.prompt_tokens + it.output_tokens):
                live, held = live + tokens, held + ceil(tokens / block_size) * block_size
        assert row["utilization"] == pytest.approx(live / held, abs=1e-12)


def test_mooncakes_prefix_hit_rate_is_that_of_an_unlimited_cache(mooncake):
    row = served(mooncake, 512, prefix_caching=True)
    assert row["prefix_hit_rate"] == pytest.approx(0.3664, abs=0.0005)


@pytest.mark.parametrize(
    ("num_blocks", "lru"), [(1_000, 0.0443), (10_000, 0.2108), (50_000, 0.3546)]
)
def test_mooncakes_prefix_hit_rate_is_near_that_of_an_lru_cache(mooncake, num_blocks, lru):
    """The LRU cache sees the prompts in order of arrival. In the replay, live sequences also hold
    blocks for answers, keep their blocks from eviction, and use them until they end.
    """
    rate = served(mooncake, 512, num_blocks, prefix_caching=True)["prefix_hit_rate"]
    print(f"{num_blocks} blocks: prefix_hit_rate {rate:.4f}, an LRU of that size {lru}")
    assert rate == pytest.approx(lru, abs=0.01)


def test_the_first_seconds_of_azure_equal_the_naive_replay():
    """Six seconds of real lengths in a pool too small for them."""
    items = [it for it in real_trace("azure_2023_conv") if it.arrived_at < 6]
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


def test_a_sample_counts_requests_that_arrive_during_a_jump():
    """Steps of 50 ms: r0 decodes in the batch of one, r1 waits, and r2 arrives in the middle of a
    jump.
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
    items = [WorkItem(0.0, 1, 3), WorkItem(0.05, 1, 1), WorkItem(0.1, 1, 1)]
    agree(items, options, (0, 0, 50_000_000))
