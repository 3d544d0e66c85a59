"""Theory against the real allocators and the replay: theorems for all that Hypothesis finds, other
formulas within a stated distance.
"""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from named_blocks import NamedBlocks

from cortexlab import make_allocator
from cortexlab.allocators import STRATEGIES
from cortexlab.lab import theory
from cortexlab.replay import Replay
from cortexlab.workloads.synthetic import WorkItem, make_workload

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=30)
lengths = st.lists(
    st.tuples(st.integers(1, 200), st.integers(2, 120)), min_size=1, max_size=12
)  # prompt, output
block_sizes = st.sampled_from([1, 2, 5, 16, 64])


def row_of(strategy: str, lengths, block_size: int) -> dict:
    items = [WorkItem(0.0, prompt, output) for prompt, output in lengths]
    return Replay(strategy, num_blocks=1 << 14, block_size=block_size).run(items)


# --- buddies --------------------------------------------------------------------------------------


@given(sizes)
def test_buddies_hand_out_less_than_twice_the_request_and_waste_exactly_what_theory_says(sizes):
    pool = make_allocator("buddy", 1 << 14)
    for size in sizes:
        (extent,) = pool.allocate(size)
        assert size <= extent.num_blocks == theory.buddy_size(size) < 2 * size
    assert 1 - sum(sizes) / pool.stats().used_blocks == pytest.approx(theory.buddy_waste(sizes))
    assert theory.buddy_waste(sizes) < 1 / 2


@pytest.mark.parametrize("order", [1, 2, 3, 8, 14])
def test_sizes_spread_evenly_between_two_powers_of_two_waste_a_quarter_in_the_limit(order):
    evenly = range(2 ** (order - 1) + 1, 2**order + 1)
    # each is handed 2^k, k = order; their mean (3 * 2^(k-1) + 1) / 2 is 2^k (3/4 + 1/2^(k+1))
    expected = 1 / 4 - 1 / 2 ** (order + 1)
    assert theory.buddy_waste(evenly) == pytest.approx(expected, abs=1e-12)
    assert theory.buddy_waste(range(1, 2**order + 1)) == pytest.approx(1 / 4, abs=1 / 2**order), (
        "all sizes up to a power of two waste a quarter too"
    )


@given(lengths, block_sizes)
def test_utilization_of_growing_buddies_follows_from_the_lengths(lengths, block_size):
    assert row_of("buddy", lengths, block_size)["utilization"] == pytest.approx(
        theory.buddy_utilization(lengths, block_size)
    )


# --- paging ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), max_size=40), block_sizes)
def test_paging_leaves_less_than_a_block_of_each_sequence_empty(steps, block_size):
    blocks = NamedBlocks(STRATEGIES["paged"], 1 << 14, block_size)
    tokens: dict[str, int] = {}
    for number, more in steps:  # five sequences begin and grow in any order
        name = str(number)
        tokens[name] = tokens.get(name, 0) + more
        assert (
            blocks.grow(name, tokens[name])
            if name in blocks.tables
            else blocks.allocate(name, tokens[name], tokens[name])
        )
        empty = {name: blocks.tables[name].capacity - count for name, count in tokens.items()}
        assert all(0 <= slots < block_size for slots in empty.values())
        num_empty = blocks.num_held * block_size - sum(tokens.values())
        assert num_empty <= len(tokens) * (block_size - 1)


@given(lengths, block_sizes)
def test_paged_utilization_is_off_by_no_more_than_an_eighth_of_a_block_squared_a_request(
    lengths, block_size
):
    row = row_of("paged", lengths, block_size)
    steps = sum(output - 1 for _, output in lengths)
    live = row["mean_live_tokens"] * steps
    empty = live / row["utilization"] - live
    assert abs(empty - steps * (block_size - 1) / 2) <= len(lengths) * block_size**2 / 8 + 1e-6


@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 8)), min_size=1, max_size=12),
    block_sizes,
)
def test_paged_utilization_is_exact_where_decode_steps_are_whole_blocks(
    prompts_and_blocks, block_size
):
    row = row_of(
        "paged",
        [(prompt, 1 + blocks * block_size) for prompt, blocks in prompts_and_blocks],
        block_size,
    )
    assert row["utilization"] == pytest.approx(
        theory.paged_utilization(row["mean_live_tokens"], block_size)
    )


@pytest.mark.parametrize("workload", ["chat", "heavy-tail"])
@pytest.mark.parametrize(
    ("block_size", "within"), [(8, 0.001), (16, 0.001), (64, 0.005), (512, 0.05)]
)
def test_paged_utilization_on_the_workloads(workload, block_size, within):
    items = make_workload(workload, 300, seed=3)
    row = Replay("paged", num_blocks=1 << 17, block_size=block_size).run(items)
    assert row["utilization"] == pytest.approx(
        theory.paged_utilization(row["mean_live_tokens"], block_size), abs=within
    )


# --- Knuth's fifty-percent rule -------------------------------------------------------------------


def in_equilibrium(
    placement: str, sizes: Sequence[int], next_freed, num_live: int = 400, steps: int = 12_000
) -> tuple[float, float]:
    """Mean holes, and the share of allocations that leave a remainder, over ``steps`` steps that
    free one and allocate one; as many steps before them settle the pool.
    """
    rng = random.Random(5)
    pool = make_allocator(placement, 2 * num_live * sum(sizes) // len(sizes))
    live = [pool.allocate(rng.choice(sizes)) for _ in range(num_live)]
    holes, remainders = 0, 0
    for step in range(2 * steps):
        pool.free(live.pop(next_freed(rng, len(live))))
        before = pool.stats().num_holes
        live.append(pool.allocate(rng.choice(sizes)))
        if step >= steps:
            holes += pool.stats().num_holes
            remainders += pool.stats().num_holes == before
    return holes / steps, remainders / steps


@pytest.mark.parametrize("placement", ["first_fit", "best_fit"])
@pytest.mark.parametrize("sizes", [range(1, 200), range(50, 150), (3, 5, 7, 11), (2, 3)], ids=str)
def test_half_as_many_holes_as_allocations_where_any_may_be_freed_next(placement, sizes):
    holes, remainder_share = in_equilibrium(placement, sizes, lambda rng, n: rng.randrange(n))
    assert holes == pytest.approx(theory.fifty_percent_rule(400, remainder_share), rel=0.05, abs=1)


def test_the_rule_fails_where_the_newest_is_always_freed_next():
    holes, remainder_share = in_equilibrium("first_fit", range(1, 200), lambda rng, n: n - 1)
    assert holes < 0.05 * theory.fifty_percent_rule(400, remainder_share), (
        "last in, first out leaves one hole at the end"
    )


def test_kv_bytes_of_a_token_and_how_many_sequences_they_leave_room_for():
    """Llama-3.1-8B: 128 KiB in 16 bits; 8 bits are 8.5 with a scale and a bias for 64 numbers."""
    assert theory.kv_bytes_per_token(32, 8, 128) == 131072
    assert theory.kv_bytes_per_token(32, 8, 128, bits=8) == 131072 * 8.5 / 16
    assert theory.kv_bytes_per_token(32, 8, 128, bits=32) == 2 * 131072
    assert theory.sequences_that_fit(1000, 1, [10, 300]).tolist() == [100, 3]
    assert theory.sequences_that_fit(1000, 1, 10, block_size=5) == 83, (
        "two slots a sequence stay empty"
    )
