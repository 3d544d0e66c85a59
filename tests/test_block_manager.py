"""Block tables: where a sequence's tokens lie, and how a sequence outgrows its blocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from named_blocks import NamedBlocks

from cortexlab import Extent
from cortexlab.allocators import STRATEGIES, Paged, strategy_of
from cortexlab.scheduler.block_table import BlockTable, Move


def manager(strategy: str, num_blocks=8, block_size=2, growth=None, **options) -> NamedBlocks:
    return NamedBlocks(strategy_of(strategy, growth), num_blocks, block_size, **options)


def hold(
    blocks: NamedBlocks, sequence: str, num_tokens: int, max_tokens: int | None = None
) -> BlockTable:
    """Admit a sequence and count all its tokens as written."""
    assert blocks.allocate(sequence, num_tokens, max_tokens or num_tokens)
    blocks.tables[sequence].num_tokens = num_tokens
    return blocks.tables[sequence]


# --- reserve, chain, relocate ---------------------------------------------------------------------


def test_reserve_takes_room_for_max_tokens_at_once_and_never_extends():
    blocks = manager("cortexstream")
    table = hold(blocks, "a", 3, max_tokens=7)
    assert (table.extents, table.capacity) == ((Extent(0, 4),), 8)
    assert blocks.grow("a", 8)  # within the four blocks
    assert not blocks.grow("a", 9)
    assert blocks.allocator.stats().free_blocks == 4
    blocks.check()


def test_chain_takes_blocks_for_the_tokens_at_hand_and_adds_extents_later():
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


def test_relocate_extends_in_place_while_there_is_a_hole_behind():
    blocks = manager("cortexstream", growth="relocate")
    a = hold(blocks, "a", 3)
    assert blocks.grow("a", 9)
    assert (a.extents, blocks.moves) == ((Extent(0, 5),), [])


def test_relocate_moves_a_blocked_sequence_and_records_the_copy():
    blocks = manager("cortexstream", growth="relocate")
    a = hold(blocks, "a", 3)  # a a b . . . . .
    hold(blocks, "b", 2)
    assert blocks.grow("a", 5)  # . . b a a a . .
    assert a.extents == (Extent(3, 3),)
    assert blocks.moves == [Move((Extent(0, 2),), (Extent(3, 3),), num_tokens=3)]
    assert blocks.allocator.stats().free_blocks == 4
    blocks.check()


def test_moves_are_recorded_in_the_order_of_the_copies():
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


GROWTHS_OF = {
    "static": ("reserve", "chain"),
    "cortexstream": ("reserve", "chain", "relocate"),
    "paged": ("chain", "reserve", "relocate"),
}


@pytest.mark.parametrize(
    ("strategy", "growth"), [(name, growth) for name in GROWTHS_OF for growth in GROWTHS_OF[name]]
)
def test_a_sequence_that_cannot_grow_keeps_its_blocks_and_tokens(strategy, growth):
    blocks = manager(strategy, num_blocks=4, growth=growth, max_seq_len=4)
    a = hold(blocks, "a", 4)
    hold(blocks, "b", 4)

    def state():
        table = a.extents, a.num_tokens, a.num_blocks
        return table, list(blocks.moves), blocks.allocator.stats()

    before = state()
    assert not blocks.grow("a", 5)
    assert state() == before
    blocks.check()


def test_a_refused_sequence_takes_no_block():
    blocks = manager("cortexstream")
    hold(blocks, "a", 12)
    before = blocks.allocator.stats()
    assert not blocks.allocate("b", 5, 5)
    assert blocks.allocator.stats() == before
    assert "b" not in blocks.tables


def test_a_freed_sequence_leaves_no_block_and_its_table_keeps_the_token_count():
    blocks = manager("paged")
    a = hold(blocks, "a", 3)
    blocks.free("a")
    assert blocks.allocator.stats().free_blocks == 8
    assert (blocks.tables, a.num_tokens) == ({}, 3)


class Plain:
    """Paging by the five required methods alone."""

    def __init__(self, num_blocks: int):
        own = Paged(num_blocks)
        self.num_blocks, self.num_asked = num_blocks, 0
        self.allocate, self.extend, self.free = own.allocate, own.extend, own.free
        self.check, self._stats = own.check, own.stats

    def stats(self):
        self.num_asked += 1
        return self._stats()


def test_an_allocator_without_a_count_of_free_blocks_is_asked_for_its_statistics_once():
    blocks = NamedBlocks(strategy_of(Plain), 8, 2)
    hold(blocks, "a", 3)
    hold(blocks, "b", 2)
    assert blocks.grow("a", 7)
    blocks.free("b")
    assert (blocks.num_held, blocks.free_blocks, blocks.allocator.num_asked) == (4, 4, 1)
    blocks.check()


# --- requests that could ever fit -----------------------------------------------------------------


def test_could_ever_hold_answers_for_the_empty_pool():
    blocks = manager("cortexstream")
    hold(blocks, "a", 16)
    assert blocks.could_ever_hold(16)
    assert not blocks.could_ever_hold(17)
    assert blocks.could_ever_hold(16), "the question itself took blocks"
    assert blocks.allocator.stats().free_blocks == 0


def test_a_static_sequence_is_at_most_as_long_as_a_region():
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
def test_a_request_could_ever_fit_if_and_only_if_it_fits_an_empty_pool(
    strategy, num_tokens, num_blocks, block_size
):
    blocks = manager(strategy, num_blocks, block_size)
    assert blocks.could_ever_hold(num_tokens) == blocks.allocate("only", num_tokens, num_tokens)


BELOW_ONE = [("num_blocks", 0), ("block_size", 0), ("max_seq_len", 0), ("num_blocks", -3)]


@pytest.mark.parametrize(("name", "value"), BELOW_ONE)
def test_a_size_below_one_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        manager("static", **{name: value})


# --- from tokens to slots -------------------------------------------------------------------------


@st.composite
def tables(draw) -> BlockTable:
    """A table of extents of any size in any order, none overlapping."""
    block_size, at, extents = draw(st.integers(1, 4)), 0, []
    gaps_and_sizes = st.tuples(st.integers(0, 3), st.integers(1, 4))
    for gap, size in draw(st.lists(gaps_and_sizes, min_size=1, max_size=6)):
        extents.append(Extent(at + gap, size))
        at = extents[-1].end
    return BlockTable(tuple(draw(st.permutations(extents))), block_size)


@given(table=tables(), data=st.data())
@settings(deadline=None)
def test_tokens_map_one_to_one_onto_the_tables_slots_in_order(table, data):
    size = table.block_size
    slots = [slot for e in table.extents for slot in range(e.start * size, e.end * size)]
    start = data.draw(st.integers(0, table.capacity))
    stop = data.draw(st.integers(start, table.capacity))
    runs = list(table.runs(start, stop))
    assert [slot for first, last in runs for slot in range(first, last)] == slots[start:stop]
    assert all(first < last for first, last in runs) or start == stop
    assert len(set(slots)) == table.capacity


def test_runs_of_a_table_by_hand():
    table = BlockTable((Extent(4, 1), Extent(0, 2)), block_size=2)  # slots 8 9 0 1 2 3
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
        runs = [run for table in blocks.tables.values() for run in table.runs(0, table.capacity)]
        slots = [slot for run in runs for slot in range(*run)]
        assert len(slots) == len(set(slots))
