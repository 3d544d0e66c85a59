"""Every method of attention over extents equals the definition, to float32 rounding."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlab.bench.environment import attention_rule
from cortexlab.engine.arena import Arena, LayerShape
from cortexlab.engine.attention import WINDOW, Plan, RowRun, windows
from cortexlab.host.fast_math import SWITCH
from cortexlab.options import ATTENTION_METHODS

KV_HEADS, GROUP, DIM, SLOTS = 2, 3, 8, 600
SHAPE = LayerShape(KV_HEADS, DIM, DIM)
TOLERANCE = 2e-6


@st.composite
def sequences(draw):
    """Sequences in extents of any length and order: ``(slot runs, number of rows)`` of each."""
    cuts = sorted(draw(st.sets(st.integers(1, SLOTS - 1), min_size=1, max_size=14)))
    extents = [(a, b) for a, b in zip([0, *cuts], [*cuts, SLOTS], strict=True)]
    order = draw(st.permutations(extents))
    found, start = [], 0
    for size in draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)):
        runs = order[start : start + size]
        start += size
        if runs:
            length = sum(b - a for a, b in runs)
            found.append((runs, draw(st.one_of(st.just(1), st.integers(1, length)))))
    return found


@settings(max_examples=100, deadline=None)
@given(
    sequences(),
    st.sampled_from(ATTENTION_METHODS),
    st.sampled_from([None, 1, 7, 100, 1000]),
    st.booleans(),
    st.sampled_from([DIM, DIM - 3]),
    st.sampled_from("01"),
    st.sampled_from([1, 200]),
)
def test_every_method_gives_the_attention_of_one_contiguous_sequence(
    found, method, sliding, with_sinks, value_dim, fast, products_a_stream
):
    rng = np.random.default_rng(0)
    arena = Arena([LayerShape(KV_HEADS, DIM, value_dim)], SLOTS)
    for arrays, dim in ((arena.keys, DIM), (arena.values, value_dim)):
        arrays[0] = mx.array(rng.normal(size=(KV_HEADS, SLOTS, dim)).astype(np.float32))
    sinks = mx.array(rng.normal(size=KV_HEADS * GROUP).astype(np.float32)) if with_sinks else None
    rows = [RowRun(sum(b - a for a, b in runs) - n, n, runs) for runs, n in found]
    rows.sort(key=lambda row: row.num_rows > 1)
    queries = mx.array(
        rng.normal(size=(sum(row.num_rows for row in rows), KV_HEADS * GROUP, DIM)).astype(
            np.float32
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, fast)
        patch.setattr(windows, "PRODUCTS_A_STREAM", products_a_stream)
        got = np.array(Plan(rows, arena, method).attend(queries, 0, DIM**-0.5, sliding, sinks))
    np.testing.assert_allclose(
        got, by_hand(rows, arena, np.array(queries), sliding, sinks), atol=TOLERANCE, rtol=1e-5
    )


def by_hand(rows, arena, queries, sliding, sinks):
    """Attention by its definition in float64: softmax(q K^T / sqrt(d)) V over the last ``sliding``
    tokens that end with the row's token.

    A sink is the score of one more token, whose value is zero.
    """
    keys, values = (np.array(array[0]).astype(np.float64) for array in (arena.keys, arena.values))
    outputs, first = [], 0
    for row in rows:
        slots = np.concatenate([np.arange(a, b) for a, b in row.runs])
        for i in range(row.num_rows):
            seen = slots[: row.start + i + 1][-(sliding or SLOTS) :]
            for head in range(KV_HEADS * GROUP):
                scores = keys[head // GROUP][seen] @ queries[first + i, head] * DIM**-0.5
                weights = np.exp(scores)
                sink = 0.0 if sinks is None else np.exp(float(sinks[head]))
                outputs.append(weights @ values[head // GROUP][seen] / (weights.sum() + sink))
        first += row.num_rows
    return np.array(outputs).reshape(*queries.shape[:2], -1)


def test_an_arena_shorter_than_a_window_is_not_read_by_windows():
    arena = Arena([SHAPE], WINDOW - 1)
    assert Plan([RowRun(0, 1, [(0, 1)])] * 9, arena, "windows")._num_by_windows == 0


def test_views_and_windows_copy_nothing_and_gather_counts_its_bytes():
    arena = Arena([SHAPE], SLOTS)
    queries = mx.zeros((2, KV_HEADS * GROUP, DIM))
    rows = [RowRun(99, 1, [(0, 100)]), RowRun(49, 1, [(200, 230), (300, 320)])]
    for method in ATTENTION_METHODS:
        arena.copied_bytes = 0
        mx.eval(Plan(rows, arena, method).attend(queries, 0, 1.0))
        assert arena.copied_bytes == (150 * 2 * KV_HEADS * DIM * 4 if method == "gather" else 0)


def test_gather_copies_no_token_that_a_sliding_window_hides():
    arena = Arena([SHAPE], SLOTS)
    rows = [RowRun(99, 1, [(0, 60), (100, 140)]), RowRun(40, 10, [(200, 230), (300, 320)])]
    mx.eval(Plan(rows, arena, "gather").attend(mx.zeros((11, KV_HEADS * GROUP, DIM)), 0, 1.0, 7))
    seen = 7 + (6 + 10)  # the first of ten rows sees itself and six tokens before
    assert arena.copied_bytes == seen * 2 * KV_HEADS * DIM * 4


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'magic'"):
        Plan([RowRun(0, 1, [(0, 1)])], Arena([LayerShape(1, 8, 8)], 16), "magic")


SHORT, LONG = [(8 * i, 8 * i + 3) for i in range(30)], [(0, 200), (300, 400)]


@pytest.mark.parametrize(
    ("rows", "ways"),
    [
        ([RowRun(99, 1, [(0, 100)])], ["views"]),
        ([RowRun(99, 1, [(0, 100)]), RowRun(99, 1, [(100, 200)])], ["views"] * 2),
        ([RowRun(9, 1, [(10 * i, 10 * i + 10)]) for i in range(3)], ["windows"] * 3),
        ([RowRun(299, 1, LONG)], ["windows"]),
        ([RowRun(89, 1, SHORT)], ["gather"]),
        ([RowRun(280, 20, LONG)], ["views"]),
        ([RowRun(80, 10, SHORT)], ["gather"]),
        (
            [RowRun(299, 1, LONG), RowRun(80, 10, SHORT), RowRun(0, 50, [(450, 500)])],
            ["windows", "gather", "views"],
        ),
    ],
)
def test_auto_chooses_the_method_by_its_rule(rows, ways):
    assert Plan(rows, Arena([SHAPE], SLOTS)).ways == ways


@pytest.mark.cpu  # gather_mm takes 16 bits on other devices, so windows are possible there
def test_without_windows_auto_gathers_short_extents_and_views_long_ones():
    arena = Arena([SHAPE], SLOTS, mx.bfloat16)
    assert Plan([RowRun(299, 1, LONG)], arena).ways == ["views"]
    assert Plan([RowRun(89, 1, SHORT)], arena).ways == ["gather"]


def test_the_record_of_autos_rule_has_all_its_numbers():
    rule = attention_rule()
    assert (
        rule["window_slots"] == WINDOW
        and rule["streams"] >= 1
        and all(value is not None for value in rule.values())
    )
