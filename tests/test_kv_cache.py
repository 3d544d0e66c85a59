"""KVCache: CortexStream's API, and reading and writing without a copy.

Each array of the arena is ``[num_kv_heads, num_slots, head_dim]``: slot s of head h begins at
element ``(h * num_slots + s) * head_dim``.
"""

import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import address

import cortexlab as cl

LAYERS, HEADS, DIM = 2, 2, 8
SLOT_BYTES = 2 * LAYERS * HEADS * DIM * 4  # K and V of one token in all layers, float32
MIB = 1 << 20


def cache(
    max_total_tokens: int = 128, block_size: int = 4, strategy: str = "cortexstream", **options
) -> cl.KVCache:
    return cl.KVCache(LAYERS, HEADS, DIM, max_total_tokens, block_size, strategy, **options)


def tokens(n: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    """Random K and V of n tokens, ``[HEADS, n, DIM]`` each."""
    keys = mx.random.split(mx.random.key(seed))
    return tuple(mx.random.normal((HEADS, n, DIM), key=key) for key in keys)


def filled(
    kv: cl.KVCache, sequence: str, n: int, max_tokens: int | None = None, seed: int = 0
) -> tuple[mx.array, mx.array]:
    """Allocate a sequence and write n tokens in every layer; returns the last layer's K and V."""
    assert kv.allocate_for(sequence, n, max_tokens)
    for layer in range(LAYERS):
        k, v = tokens(n, seed=100 * seed + layer)
        kv.write(sequence, layer, k, v, 0)
    return k, v


def equal(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and bool(mx.array_equal(a, b))


# --- sequences ------------------------------------------------------------------------------------


def test_512_tokens_fill_their_blocks_of_16_so_no_token_can_follow():
    kv = cache(1024, block_size=16)
    assert kv.allocate_for("req1", 512)
    assert kv.used_tokens("req1") == 512
    assert not kv.append_token("req1")
    assert kv.used_tokens("req1") == 512


def test_a_reservation_is_rounded_up_to_a_whole_block():
    kv = cache()
    assert kv.allocate_for("a", 5)
    assert [kv.append_token("a") for _ in range(4)] == [True, True, True, False]
    assert kv.used_tokens("a") == 8


def test_max_tokens_reserves_room_to_grow():
    kv = cache()
    assert kv.allocate_for("a", 2, max_tokens=7)
    assert kv.get_total_allocated() == 8 * SLOT_BYTES
    assert sum(kv.append_token("a") for _ in range(10)) == 6


@pytest.mark.parametrize(
    ("strategy", "growth"),
    [("paged", "chain"), ("cortexstream", "relocate"), ("cortexstream", "chain")],
)
def test_relocate_and_chain_grow_until_the_pool_is_full(strategy, growth):
    kv = cache(16, strategy=strategy, growth=growth)
    assert kv.allocate_for("a", 4)
    assert sum(kv.append_token("a") for _ in range(20)) == 12
    assert kv.is_full()


def test_an_unknown_sequence_has_no_tokens_and_no_offset():
    kv = cache()
    assert (kv.used_tokens("nobody"), kv.get_token_offset_in_block("nobody")) == (0, -1)
    kv.free_for("nobody")


def test_the_offset_is_the_next_tokens_place_in_its_block():
    kv = cache()
    assert kv.allocate_for("a", 3, max_tokens=9)
    offsets = [kv.get_token_offset_in_block("a")]
    while kv.used_tokens("a") < 6:
        kv.append_token("a")
        offsets.append(kv.get_token_offset_in_block("a"))
    assert offsets == [3, 0, 1, 2]


def test_one_name_is_one_sequence():
    kv = cache()
    assert kv.allocate_for("a", 3)
    before = kv.stats()
    with pytest.raises(ValueError, match="'a' already holds blocks"):
        kv.allocate_for("a", 1)
    assert kv.stats() == before


def test_freeing_twice_is_safe_and_forgets_the_sequence():
    kv = cache()
    assert kv.allocate_for("a", 5)
    kv.free_for("a")
    kv.free_for("a")
    assert (kv.used_tokens("a"), kv.get_token_offset_in_block("a"), kv.get_total_allocated()) == (
        0,
        -1,
        0,
    )
    assert kv.allocate_for("a", 128)


def test_allocate_for_without_room_returns_false_and_takes_nothing():
    kv = cache(16)
    assert kv.allocate_for("a", 9)
    assert not kv.allocate_for("b", 5)
    assert (kv.used_tokens("b"), kv.get_num_allocated_sequences(), kv.get_total_free()) == (
        0,
        1,
        4 * SLOT_BYTES,
    )


def test_bytes_count_k_and_v_of_every_layer():
    kv = cache(30)  # 30 tokens take 8 blocks of 4
    assert (
        kv.get_total_free()
        == 32 * SLOT_BYTES
        == kv.stats()["arena_bytes"]
        == sum(a.nbytes for a in kv.arena.arrays())
    )
    kv.allocate_for("a", 5)
    assert (kv.get_total_allocated(), kv.get_total_free()) == (8 * SLOT_BYTES, 24 * SLOT_BYTES)
    half = cache(32, dtype=mx.float16)
    assert half.get_total_free() == 16 * SLOT_BYTES


def test_two_separate_free_blocks_of_a_full_pool_are_half_fragmented():
    kv = cache(16)
    for sequence in "abcd":
        assert kv.allocate_for(sequence, 4)
    assert kv.is_full() and kv.get_fragmentation() == 0
    kv.free_for("a")
    kv.free_for("c")
    assert not kv.is_full() and kv.get_fragmentation() == 0.5
    assert kv.get_num_allocated_sequences() == 2


def test_stats_is_a_dict():
    kv = cache(16)
    kv.allocate_for("a", 5)
    stats = kv.stats()
    assert isinstance(stats, dict)
    assert (stats["used_blocks"], stats["free_blocks"], stats["copied_bytes"]) == (2, 2, 0)


def test_warmup_changes_nothing():
    kv = cache(16)
    k, _ = filled(kv, "a", 3)
    kv.warmup()
    assert equal(kv.get_k_view("a", 1), k)


# --- reading and writing --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["static", "cortexstream", "paged"])
def test_a_view_shows_the_tokens_of_its_own_sequence_and_layer(strategy):
    kv = cache(strategy=strategy)
    written = {
        sequence: filled(kv, sequence, n, seed=n) for sequence, n in (("a", 5), ("b", 4), ("c", 11))
    }
    for sequence, (k, v) in written.items():
        assert equal(kv.get_k_view(sequence, 1), k)
        assert equal(kv.get_v_view(sequence, 1), v)
        assert not equal(kv.get_k_view(sequence, 0), k)


def test_a_sequence_can_be_written_in_parts():
    kv = cache()
    k, v = tokens(6)
    kv.allocate_for("a", 6)
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        kv.write("a", 0, k[:, start:stop], v[:, start:stop], start)
    assert equal(kv.get_k_view("a", 0), k) and equal(kv.get_v_view("a", 0), v)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_a_view_of_one_extent_points_into_the_arena(dtype):
    kv = cache(dtype=dtype)
    filled(kv, "before", 9)
    filled(kv, "a", 6)
    start = kv.extents("a")[0].start * 4
    assert start == 12
    for view, arena in (
        (kv.get_k_view("a", 1), kv.arena.keys[1]),
        (kv.get_v_view("a", 1), kv.arena.values[1]),
    ):
        assert address(view) - address(arena) == start * DIM * dtype.size
        strides = np.array(view, copy=False).strides
        assert strides == (kv.arena.num_slots * DIM * dtype.size, DIM * dtype.size, dtype.size)


def test_a_copy_of_a_view_does_not_point_into_the_arena():
    kv = cache()
    filled(kv, "a", 6)
    copy = mx.contiguous(kv.get_k_view("a", 1)) + 0
    assert not 0 <= address(copy) - address(kv.arena.keys[1]) < kv.arena.keys[1].nbytes


def scattered() -> tuple[cl.KVCache, mx.array, mx.array]:
    """A cache with sequence a in blocks 0 and 2 and b in block 1; K and V of a's last layer."""
    kv = cache(strategy="paged")
    kv.allocate_for("a", 4)
    kv.allocate_for("b", 4)
    for _ in range(3):
        assert kv.append_token("a")
    assert kv.extents("a") == (cl.Extent(0, 1), cl.Extent(2, 1))
    k, v = tokens(7)
    kv.write("a", 1, k, v, 0)
    return kv, k, v


def test_several_extents_have_no_single_view():
    kv, _, _ = scattered()
    for view in (kv.get_k_view, kv.get_v_view):
        with pytest.raises(cl.NotContiguous, match=r"'a'.*2 extents"):
            view("a", 1)


def test_several_extents_are_read_as_a_tuple_of_views_into_the_arena():
    kv, k, v = scattered()
    views = kv.get_k_views("a", 1)
    assert [view.shape for view in views] == [(HEADS, 4, DIM), (HEADS, 3, DIM)]
    assert equal(mx.concatenate(views, axis=1), k)
    assert equal(mx.concatenate(kv.get_v_views("a", 1), axis=1), v)
    assert [address(view) - address(kv.arena.keys[1]) for view in views] == [0, 8 * DIM * 4]


def test_one_extent_is_read_as_a_tuple_of_one_view():
    kv = cache()
    k, _ = filled(kv, "a", 3)
    (view,) = kv.get_k_views("a", 1)
    assert equal(view, k)


# --- writing is in place --------------------------------------------------------------------------


def rise_of(kv: cl.KVCache, sequence: str, positions) -> int:
    """Bytes by which peak memory rises while one token at each position is written."""
    heads, dim, _ = kv.arena.layers[0]
    k = mx.ones((heads, 1, dim))
    mx.eval(k, kv.arena.arrays())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for position in positions:
        kv.write(sequence, 0, k, k, position)
        mx.eval(kv.arena.arrays())
    return max(0, mx.get_peak_memory() - before)


def large(strategy: str) -> cl.KVCache:
    """A cache of 64 MiB: K and V of 32 MiB each."""
    kv = cl.KVCache(1, 4, 64, 32768, 16, strategy)
    assert kv.arena.nbytes == 64 * MIB
    kv.warmup()
    return kv


@pytest.mark.cpu  # a GPU's command buffer may hold an array after its evaluation
@pytest.mark.parametrize("strategy", ["cortexstream", "paged"])
def test_writing_a_token_does_not_copy_the_arena(strategy):
    kv = large(strategy)
    kv.allocate_for("a", 100)
    before = address(kv.arena.keys[0])
    assert rise_of(kv, "a", [5, 6, 99]) < MIB
    assert address(kv.arena.keys[0]) == before


@pytest.mark.cpu  # a GPU's command buffer may hold an array after its evaluation
def test_writing_over_several_extents_does_not_copy_the_arena():
    kv = large("paged")
    kv.allocate_for("a", 16)
    kv.allocate_for("b", 16)
    for _ in range(4):
        kv.append_token("a")
    assert len(kv.extents("a")) == 2
    before = address(kv.arena.keys[0])
    k = mx.ones((4, 20, 64))
    mx.eval(k)
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    kv.write("a", 0, k, k, 0)
    mx.eval(kv.arena.arrays())
    assert mx.get_peak_memory() - active < MIB
    assert address(kv.arena.keys[0]) == before


@pytest.mark.cpu  # a GPU's command buffer may hold an array after its evaluation
def test_a_write_while_a_view_lives_copies_the_arena_and_raises_the_peak():
    kv = large("cortexstream")
    kv.allocate_for("a", 100)
    view = kv.get_k_view("a", 0)
    mx.eval(view)
    assert rise_of(kv, "a", [5]) >= 32 * MIB
    assert float(view.sum()) == 0, "the view still shows the old tokens"
    del view
    assert rise_of(kv, "a", [6]) < MIB


def test_reading_a_view_does_not_copy_the_arena():
    kv = large("cortexstream")
    kv.allocate_for("a", 16384)  # half of the arena
    kv.warmup()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(kv.get_k_view("a", 0), kv.get_v_view("a", 0))
    assert mx.get_peak_memory() - before < MIB


# --- relocation -----------------------------------------------------------------------------------


def test_relocation_moves_the_tokens_and_counts_their_bytes():
    kv = cache(strategy="cortexstream", growth="relocate")
    k, v = filled(kv, "a", 8, seed=1)
    kb, _ = filled(kv, "b", 4, seed=2)
    old = kv.get_k_view("a", 0) + 0
    assert kv.extents("a") == (cl.Extent(0, 2),)
    assert kv.append_token("a")  # b lies right behind a, so a moves
    assert kv.extents("a") == (cl.Extent(3, 3),)
    assert equal(kv.get_k_view("a", 1)[:, :8], k) and equal(kv.get_v_view("a", 1)[:, :8], v)
    assert equal(kv.get_k_view("a", 0)[:, :8], old)
    assert equal(kv.get_k_view("b", 1), kb)
    assert kv.stats()["copied_bytes"] == 8 * SLOT_BYTES


def test_growing_in_place_or_by_chaining_copies_nothing():
    for kv in (cache(growth="relocate"), cache(strategy="paged")):
        filled(kv, "a", 4)
        assert kv.append_token("a")
        assert kv.stats()["copied_bytes"] == 0


def test_a_sequence_may_move_to_blocks_that_another_sequence_left():
    kv = cache(32, strategy="cortexstream", growth="relocate")  # a pool of 8 blocks
    ka, _ = filled(kv, "a", 8, seed=1)
    kb, _ = filled(kv, "b", 4, seed=2)  # a a b . . . . .
    assert kv.append_token("a")  # . . b a a a . .
    filled(kv, "c", 8, seed=3)  # c c b a a a . .
    kv.free_for("c")
    assert kv.append_token("b")  # b b . a a a . .
    assert kv.extents("b") == (cl.Extent(0, 2),)
    assert equal(kv.get_k_view("a", 1)[:, :8], ka)
    assert equal(kv.get_k_view("b", 1)[:, :4], kb)
    assert kv.stats()["copied_bytes"] == 12 * SLOT_BYTES


# --- the dump -------------------------------------------------------------------------------------


def test_the_dump_has_configuration_totals_and_every_sequence():
    kv, _, _ = scattered()
    text = kv.dump_cache_stats()
    for part in (
        f"Layers: {LAYERS}",
        f"Heads: {HEADS}",
        f"HeadDim: {DIM}",
        "BlockSize: 4",
        "TotalBlocks: 32",
        "Strategy: paged",
        "Allocated sequences: 2",
        "Total allocated: ",
        "Total free: ",
        "Fragmentation: 0.00",
    ):
        assert part in text
    sequences = [line.strip() for line in text.splitlines() if "tokens, blocks" in line]
    assert sequences == ["a: 7/8 tokens, blocks [0, +1] [2, +1]", "b: 4/4 tokens, blocks [1, +1]"]
    assert all(
        re.fullmatch(r"\w+: \d+/\d+ tokens, blocks( \[\d+, \+\d+\])+", line) for line in sequences
    )


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["num_layers", "num_kv_heads", "head_dim", "max_total_tokens", "block_size"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_size_below_one_is_refused_by_name_and_value(name, value):
    sizes = dict(num_layers=1, num_kv_heads=1, head_dim=8, max_total_tokens=16, block_size=4) | {
        name: value
    }
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        cl.KVCache(**sizes)


def test_an_unknown_strategy_or_growth_is_refused_by_name():
    with pytest.raises(ValueError, match="'fancy'"):
        cache(strategy="fancy")
    with pytest.raises(ValueError, match="'sideways'"):
        cache(growth="sideways")


@pytest.mark.parametrize(
    "attempt",
    [
        lambda kv: kv.allocate_for("a", 1),  # a holds blocks already
        lambda kv: kv.allocate_for("b", 0),
        lambda kv: kv.allocate_for("b", 5, max_tokens=4),
        lambda kv: kv.write("nobody", 0, *tokens(1), 0),
        lambda kv: kv.write("a", LAYERS, *tokens(1), 0),
        lambda kv: kv.write("a", -1, *tokens(1), 0),
        lambda kv: kv.write("a", 0, *tokens(1), 3),  # a has tokens 0, 1, 2
        lambda kv: kv.write("a", 0, *tokens(1), -1),
        lambda kv: kv.write("a", 0, *tokens(4), 0),
        lambda kv: kv.write("a", 0, tokens(2)[0], tokens(3)[1], 0),
        lambda kv: kv.write(
            "a", 0, mx.zeros((HEADS + 1, 1, DIM)), mx.zeros((HEADS + 1, 1, DIM)), 0
        ),
        lambda kv: kv.write("a", 0, mx.zeros((HEADS, 1, 1)), mx.zeros((HEADS, 1, 1)), 0),
        lambda kv: kv.write("a", 0, mx.zeros((HEADS, 0, DIM)), mx.zeros((HEADS, 0, DIM)), 0),
        lambda kv: kv.get_k_view("nobody", 0),
        lambda kv: kv.get_v_views("a", LAYERS),
        lambda kv: kv.append_token("nobody"),
    ],
)
def test_a_call_with_wrong_arguments_is_refused_and_changes_nothing(attempt):
    kv = cache()
    k, _ = filled(kv, "a", 3)
    before = (kv.stats(), kv.dump_cache_stats())
    with pytest.raises(cl.CortexLabError) as caught:
        attempt(kv)
    assert isinstance(caught.value, ValueError)
    assert (kv.stats(), kv.dump_cache_stats()) == before
    assert equal(kv.get_k_view("a", 1), k)


@pytest.mark.cpu  # a GPU's command buffer may hold an array after its evaluation
def test_relocation_copies_the_tokens_and_not_the_arena():
    """64 KB move in an arena of 32 MB: its arrays keep their places, and peak memory stays low."""
    cache = cl.KVCache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=64,
        max_total_tokens=65536,
        strategy="cortexstream",
        growth="relocate",
    )
    assert cache.allocate_for("a", 128) and cache.allocate_for("b", 16)
    cache.warmup()
    before = [address(array) for array in cache.arena.arrays()]
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    assert cache.append_token("a"), "a moves, because b lies right behind"
    assert cache.arena.copied_bytes == 128 * 64 * 4 * 2
    assert [address(array) for array in cache.arena.arrays()] == before
    assert mx.get_peak_memory() - base < 4 << 20
