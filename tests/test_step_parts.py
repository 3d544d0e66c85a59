"""Where a step's time goes, and what extents cost: measured on toys, drawn as measured."""

import matplotlib
import mlx.core as mx
import pandas as pd
import pytest

matplotlib.use("Agg")

from cortexlab.bench import doctor
from cortexlab.bench.environment import environment
from cortexlab.bench.measure import in_turn
from cortexlab.bench.step_profile import (
    ACTIVATION,
    ATTENTION,
    NORMS,
    PARTS,
    PRODUCTS,
    REST,
    ROPE,
    WRITES,
    filled_arena,
    measure_extents,
    measure_steps,
    record_step,
)
from cortexlab.bench.step_profile import _neighbours as neighbours
from cortexlab.engine.arena import LayerShape
from cortexlab.engine.mlx_lm_hook import LayerCache
from cortexlab.engine.model_runner import ModelRunner
from cortexlab.errors import BadInput
from cortexlab.options import ATTENTION_METHODS
from cortexlab.plots import engine as plots_engine


@pytest.fixture(autouse=True)
def close():
    yield
    matplotlib.pyplot.close("all")


def test_works_take_turns_after_one_turn_that_is_not_counted():
    done = []
    seconds = in_turn({name: lambda name=name: done.append(name) for name in "ab"}, 2)
    assert "".join(done) == "ababab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def test_a_step_is_recorded_call_by_call_and_the_model_unchanged_afterwards(tiny):
    runner, before = ModelRunner(tiny), LayerCache.attend
    arena = filled_arena(runner.layers, runner.dtype, 64, 0)
    calls = record_step(runner, neighbours(3, 5, 1), arena)
    counts = {part: sum(call.part == part for call in calls) for part in PARTS}
    layers = len(runner.layers)
    assert counts[PRODUCTS] == 7 * layers + 1, "q, k, v, o, gate, up, down, and the head"
    assert (
        counts[ATTENTION] == counts[WRITES] == counts[ACTIVATION] == layers
        and counts[ROPE] == 2 * layers
        and counts[NORMS] == 2 * layers + 1
    )
    shapes = [call.args[1].shape for call in calls if call.part == PRODUCTS]
    assert all(shape[0] == 3 or shape[1] == 3 for shape in shapes), "three rows"
    assert LayerCache.attend is before
    assert record_step(runner, neighbours(1, 0, 4), arena), "a model can be recorded twice"


def test_parts_and_the_rest_add_up_to_the_step(tiny):
    steps = measure_steps(tiny, [1, 4], [8], context=16, repeats=2)
    assert list(steps["step"]) == ["decode, 1 row", "decode, 4 rows", "prefill, 8 rows"] and list(
        steps["num_rows"]
    ) == [1, 4, 8]
    assert (steps[[*PARTS, REST]].sum(axis=1) - steps["step_ms"]).abs().max() < 1e-9
    assert (steps[list(PARTS)] > 0).all(axis=None) and (steps["products_gflops"] > 0).all()
    axes = plots_engine.where_a_step_goes(steps)
    products = axes.containers[0]
    assert [bar.get_width() for bar in products] == pytest.approx([1, 1, 1])
    assert len(axes.containers) == len(PARTS) + 1 and "matrix products" in axes.get_xlabel()


def test_extents_are_measured_for_each_method_and_drawn_as_measured():
    found = measure_extents(
        [LayerShape(1, 8, 8)] * 2, 2, [4, 100, 256], num_sequences=2, context=256, repeats=1
    )
    assert list(found["num_extents"].unique()) == [64, 3, 1]
    assert len(found) == 3 * len(ATTENTION_METHODS) and (found["ms"] > 0).all()
    axes = plots_engine.attention_against_extents(found)
    for line, method in zip(axes.lines, ATTENTION_METHODS, strict=True):
        assert line.get_label() == method
        assert list(line.get_ydata()) == list(found[found["method"] == method]["ms"])
    assert axes.get_xticklabels()[0].get_text() == "4\n(64)" and "ms" in axes.get_ylabel()


@pytest.mark.parametrize("wrong", [{"extent_slots": [0]}, {"num_sequences": 0}, {"context": 0}])
def test_a_measurement_of_nothing_is_refused(wrong):
    given = {"extent_slots": [4], "num_sequences": 1, "context": 8} | wrong
    with pytest.raises(BadInput, match="0"):
        measure_extents([LayerShape(1, 8, 8)], 1, **given)


def test_lines_against_the_batch_limit_are_the_rows():
    rows = pd.DataFrame(
        {
            "strategy": s,
            "batch_size": b,
            "output_throughput": 10.0 * b,
            "median_ttft_ms": 2000.0,
            "p99_itl_ms": 5.0,
        }
        for b in (1, 8)
        for s in ("runs", "mlx-lm")
    )
    throughput, ttft, gaps = plots_engine.against_batch_limit(rows)
    assert [line.get_label() for line in throughput.lines] == ["runs", "mlx-lm"]
    assert list(throughput.lines[0].get_ydata()) == [10, 80] and list(
        ttft.lines[0].get_ydata()
    ) == [2, 2]
    assert "(s)" in ttft.get_ylabel() and "(ms)" in gaps.get_ylabel()


def test_doctor_prints_what_each_way_of_attention_takes_here(monkeypatch):
    monkeypatch.setattr(doctor, "EXTENT_SLOTS", (64, 512))
    measured = doctor.attention_ms(repeats=1)
    lines = doctor._attention_lines(measured)
    assert (
        lines[0].split()[-len(ATTENTION_METHODS) :] == list(ATTENTION_METHODS)
        and len({len(line) for line in lines}) == 1
    )
    assert [float(word) for word in lines[2].split()[-len(ATTENTION_METHODS) :]] == [
        round(row["ms"], 2) for row in measured[len(ATTENTION_METHODS) :]
    ]
    assert mx.default_device() == mx.cpu or environment()["attention"]["streams"] == 1
