"""Block tables: where a sequence's tokens lie, and what happens when it outgrows its blocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlab import Extent
from cortexlab.allocators import STRATEGIES, strategy_of
from cortexlab.scheduler.block_manager import BlockManager, BlockTable, Move


def manager(
    strategy: str, num_blocks: int = 8, block_size: int = 2, growth: str | None = None, **options
) -> BlockManager:
    return BlockManager(strategy_of(strategy, growth), num_blocks, block_size, **options)


def hold(
    blocks: BlockManager, sequence: str, num_tokens: int, max_tokens: int | None = None
) -> BlockTable:
    """Admit a sequence whose tokens are all written."""
    assert blocks.allocate(sequence, num_tokens, max_tokens or num_tokens)
    blocks.tables[sequence].num_tokens = num_tokens
    return blocks.tables[sequence]


# --- reserve, chain, relocate ---------------------------------------------------------------------


def test_reserve_takes_room_for_the_last_token_at_once_and_never_grows():
    blocks = manager("cortexstream")
    table = hold(blocks, "a", 3, max_tokens=7)
    assert (table.extents, table.capacity) == ((Extent(0, 4),), 8)
    assert blocks.grow("a", 8)  # within what was reserved
    assert not blocks.grow("a", 9)
    assert blocks.allocator.stats().free_blocks == 4
    blocks.check()


def test_chain_takes_what_the_tokens_need_and_adds_extents_later():
    blocks = manager("paged")
    a = hold(blocks, "a", 3, max_tokens=16)
    b = hold(blocks, "b", 2)
    assert (a.extents, b.extents) == ((Extent(0, 2),), (Extent(2, 1),))
    assert blocks.grow("a", 4)
    assert a.extents == (Extent(0, 2),)  # the fourth token fits the second block
    assert blocks.grow("a", 5)
    assert a.extents == (Extent(0, 2), Extent(3, 1))
    assert (a.num_blocks, a.capacity, blocks.moves) == (3, 6, [])
    blocks.check()


def test_relocate_extends_in_place_while_the_hole_behind_allows():
    blocks = manager("cortexstream", growth="relocate")
    a = hold(blocks, "a", 3)
    assert blocks.grow("a", 9)
    assert (a.extents, blocks.moves) == ((Extent(0, 5),), [])


def test_relocate_moves_a_blocked_sequence_and_writes_down_the_copy():
    blocks = manager("cortexstream", growth="relocate")
    a = hold(blocks, "a", 3)  # a a b . . . . .
    hold(blocks, "b", 2)
    assert blocks.grow("a", 5)  # . . b a a a . .
    assert a.extents == (Extent(3, 3),)
    assert blocks.moves == [Move((Extent(0, 2),), (Extent(3, 3),), num_tokens=3)]
    assert blocks.allocator.stats().free_blocks == 4
    blocks.check()


def test_moves_stand_in_the_order_they_must_be_made():
    blocks = manager("cortexstream", growth="relocate")
    hold(blocks, "a", 2)  # a b b . . . . .
    hold(blocks, "b", 4)
    assert blocks.grow("a", 4)  # . b b a a . . .
    assert blocks.grow("b", 6)  # . . . a a b b b
    assert blocks.moves == [
        Move((Extent(0, 1),), (Extent(3, 2),), num_tokens=2),
        Move((Extent(1, 2),), (Extent(5, 3),), num_tokens=4),
    ]
    blocks.check()


@pytest.mark.parametrize(
    ("strategy", "growth"),
    [
        ("static", "reserve"),
        ("static", "chain"),
        ("cortexstream", "reserve"),
        ("cortexstream", "chain"),
        ("cortexstream", "relocate"),
        ("paged", "chain"),
        ("paged", "reserve"),
        ("paged", "relocate"),
    ],
)
def test_a_sequence_that_cannot_grow_keeps_exactly_what_it_had(strategy, growth):
    blocks = manager(strategy, num_blocks=4, growth=growth, max_seq_len=4)
    a = hold(blocks, "a", 4)
    hold(blocks, "b", 4)
    before = (a.extents, a.num_tokens, a.num_blocks, list(blocks.moves), blocks.allocator.stats())
    assert not blocks.grow("a", 5)
    assert (a.extents, a.num_tokens, a.num_blocks, blocks.moves, blocks.allocator.stats()) == before
    blocks.check()


def test_a_refused_sequence_takes_nothing():
    blocks = manager("cortexstream")
    hold(blocks, "a", 12)
    before = blocks.allocator.stats()
    assert not blocks.allocate("b", 5, 5)
    assert blocks.allocator.stats() == before
    assert "b" not in blocks.tables


def test_a_freed_sequence_leaves_nothing_and_its_table_remembers_its_tokens():
    blocks = manager("paged")
    a = hold(blocks, "a", 3)
    blocks.free("a")
    assert blocks.allocator.stats().free_blocks == 8
    assert (blocks.tables, a.num_tokens) == ({}, 3)


def test_one_name_is_one_sequence():
    blocks = manager("paged")
    hold(blocks, "a", 3)
    before = blocks.allocator.stats()
    with pytest.raises(ValueError, match="'a'"):
        blocks.allocate("a", 1, 1)
    assert blocks.allocator.stats() == before


# --- what could ever fit --------------------------------------------------------------------------


def test_could_ever_hold_asks_an_empty_pool_not_this_one():
    blocks = manager("cortexstream")
    hold(blocks, "a", 16)
    assert blocks.could_ever_hold(16)
    assert not blocks.could_ever_hold(17)
    assert blocks.could_ever_hold(16), "asking takes nothing"
    assert blocks.allocator.stats().free_blocks == 0


def test_a_static_sequence_can_only_be_as_long_as_a_region():
    blocks = manager("static", max_seq_len=5)  # regions of three blocks
    assert blocks.could_ever_hold(6)
    assert not blocks.could_ever_hold(7)


@given(
    strategy=st.sampled_from(sorted(STRATEGIES)),
    num_tokens=st.integers(1, 40),
    num_blocks=st.integers(1, 12),
    block_size=st.integers(1, 4),
)
@settings(deadline=None)
def test_what_could_ever_fit_does_fit_an_empty_pool(strategy, num_tokens, num_blocks, block_size):
    blocks = manager(strategy, num_blocks, block_size)
    assert blocks.could_ever_hold(num_tokens) == blocks.allocate("only", num_tokens, num_tokens)


@pytest.mark.parametrize(
    "sizes", [{"num_blocks": 0}, {"block_size": 0}, {"max_seq_len": 0}, {"num_blocks": -3}]
)
def test_a_size_below_one_is_refused_by_name_and_value(sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        manager("static", **sizes)


# --- token -> slot --------------------------------------------------------------------------------


@st.composite
def tables(draw) -> BlockTable:
    """Extents of any size in any order, none overlapping."""
    block_size, at, extents = draw(st.integers(1, 4)), 0, []
    for gap, size in draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6)
    ):
        extents.append(Extent(at + gap, size))
        at = extents[-1].end
    return BlockTable(tuple(draw(st.permutations(extents))), block_size)


@given(table=tables(), data=st.data())
@settings(deadline=None)
def test_tokens_map_one_to_one_onto_the_tables_slots_in_order(table, data):
    slots = [
        slot
        for e in table.extents
        for slot in range(e.start * table.block_size, e.end * table.block_size)
    ]
    start = data.draw(st.integers(0, table.capacity))
    stop = data.draw(st.integers(start, table.capacity))
    runs = list(table.runs(start, stop))
    assert [slot for first, last in runs for slot in range(first, last)] == slots[start:stop]
    assert all(first < last for first, last in runs) or start == stop
    assert len(set(slots)) == table.capacity


def test_runs_of_a_table_by_hand():
    table = BlockTable(
        (Extent(4, 1), Extent(0, 2)), block_size=2
    )  # token 0..5 in slots 8 9 0 1 2 3
    assert list(table.runs(0, 6)) == [(8, 10), (0, 4)]
    assert list(table.runs(1, 3)) == [(9, 10), (0, 1)]
    assert list(table.runs(4, 5)) == [(2, 3)]


@given(
    data=st.data(),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    growth=st.sampled_from(["reserve", "relocate", "chain"]),
)
@settings(deadline=None)
def test_no_slot_ever_belongs_to_two_sequences(data, strategy, growth):
    blocks = manager(strategy, num_blocks=10, growth=growth, max_seq_len=6)
    for sequence in data.draw(st.lists(st.sampled_from("abcd"), max_size=20)):
        if sequence not in blocks.tables:
            blocks.allocate(sequence, 1, data.draw(st.integers(1, 6)))
        elif data.draw(st.booleans()):
            blocks.grow(sequence, blocks.tables[sequence].capacity + data.draw(st.integers(0, 3)))
        else:
            blocks.free(sequence)
        blocks.check()
        slots = [
            slot
            for t in blocks.tables.values()
            for run in t.runs(0, t.capacity)
            for slot in range(*run)
        ]
        assert len(slots) == len(set(slots))
