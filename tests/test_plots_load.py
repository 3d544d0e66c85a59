"""Figures of load and of addresses: what they draw is what the tables say."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from cortexlab import plots
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.metrics import median_interval
from cortexlab.plots import load as plots_load
from cortexlab.plots import widgets
from cortexlab.replay.simulation import tables
from cortexlab.workloads.synthetic import make_workload


@pytest.fixture(autouse=True)
def close():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture(scope="module")
def bench(tiny):
    return run_bench(
        tiny,
        make_workload("lognormal", 8, seed=1, scale_lengths=0.3),
        ["paged", "mlx-lm"],
        Setting(batch_size=4),
    )


@pytest.fixture(scope="module")
def steps():
    items = make_workload("lognormal", 60, seed=1, request_rate=10.0)
    return tables(widgets.record(items, ("cortexstream", "paged"), 16, "60%"))["steps"]


def test_a_load_curve_goes_through_its_rows():
    rows = pd.DataFrame(
        [
            (name, rate, 10.0 * rate, 100.0 * rate, 900.0 * rate)
            for name in ("paged", "runs")
            for rate in (1.0, 2.0, 4.0)
        ],
        columns=["strategy", "request_rate", "output_throughput", "median_ttft_ms", "p99_ttft_ms"],
    )
    median, tail = plots_load.load_curve(rows)
    assert [line.get_label() for line in median.lines] == ["paged", "runs"]
    assert median.lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.2], [40, 0.4]]
    assert tail.lines[1].get_ydata().tolist() == pytest.approx([0.9, 1.8, 3.6])
    assert "(s, log" in tail.get_ylabel()


def test_the_front_is_what_nothing_beats():
    gains = np.array([[1.0, 5.0], [2.0, 4.0], [2.0, 3.0], [0.5, 5.0], [3.0, 1.0], [3.0, 1.0]])
    assert plots_load.on_front(gains).tolist() == [True, True, False, False, True, True]
    rows = pd.DataFrame(
        {
            "strategy": list("abc"),
            "block_size": 16,
            "token_share": [0.5, 0.9, 0.8],
            "mean_ttft_ms": [10, 20, 30],
        }
    )
    axes = plots_load.pareto_front(rows)
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([[50, 0.01], [90, 0.02]]))
    assert [points.get_offsets().tolist()[0][0] for points in axes.collections] == pytest.approx(
        [50, 90, 80]
    )


def test_a_timeline_has_a_piece_a_gap(bench):
    requests = bench.requests()
    panels = plots_load.request_timeline(requests)
    assert [panel.get_title(loc="left") for panel in panels] == ["paged", "mlx-lm"]
    for panel, (_, part) in zip(panels, requests.groupby("strategy", sort=False), strict=True):
        pieces = [lines for lines in panel.collections if lines.get_array() is not None]
        gaps = sorted(gap for each in part["itl_ms"] for gap in each)
        assert sorted(np.concatenate([lines.get_array() for lines in pieces])) == pytest.approx(
            gaps
        )
        ends = [lines.get_segments()[-1][1][0] for lines in pieces if len(lines.get_segments())]
        assert sorted(ends) == pytest.approx(
            sorted(part["finished_at"][part["output_tokens"] > 1]), abs=0.05
        )


def toy(extents: list, pool: int, at: float) -> dict:
    used = sum(blocks for _, held in extents for _, blocks in held)
    return {
        "strategy": "paged",
        "repeat": 0,
        "started_at": at,
        "ended_at": at + 1,
        "used_blocks": used,
        "free_blocks": pool - used,
        "extents": json.dumps(extents),
    }


def test_run_lengths_on_a_toy_pool():
    """Blocks 0-1 and 5 are a's, 3 is b's: free are 2, 4 and 6-9; a second later only b's is held:
    free are 0-2 and 4-9.
    """
    steps = pd.DataFrame(
        [
            toy([("r0", [(0, 2), (5, 1)]), ("r1", [(3, 1)])], 10, 0.0),
            toy([("r1", [(3, 1)])], 10, 1.0),
        ]
    )
    counts = plots_load.run_lengths(steps).set_index(["kind", "blocks"])["count"]
    assert counts["free runs"][[1, 2, 4, 8]].tolist() == [1.0, 0.5, 1.0, 0.0]
    assert counts["extents"][[1, 2, 4]].tolist() == [1.5, 0.5, 0.0]
    free, extents = plots_load.run_length_histograms(steps)
    assert free.patches[0].get_data().values[:3].tolist() == [1.0, 0.5, 1.0]
    assert "free runs at a time" in free.get_ylabel() and "extents" in extents.get_xlabel()
    heat = plots_load.address_heat(steps)
    half = plots_load.NUM_TIMES // 2
    assert (
        (heat[[0, 1, 5], :half] == pytest.approx(1))
        and not heat[[0, 1, 5], half:].any()
        and heat[3] == pytest.approx(1)
    )


def test_recorded_replays_tell_the_same_holes_as_their_allocator(steps):
    for _, step in steps.iterrows():
        owners = plots_load.block_owners(step)
        assert (owners >= 0).sum() == step["used_blocks"]
        assert (
            len(plots_load.lengths_of_runs(owners < 0)) == step["num_holes"]
            or step["strategy"] == "paged"
        )
    panels = plots_load.address_heat_map(steps)
    for panel, (_, part) in zip(panels, steps.groupby("strategy", sort=False), strict=True):
        held = np.average(part["used_blocks"], weights=part["ended_at"] - part["started_at"])
        assert panel.images[0].get_array().mean() * len(
            panel.images[0].get_array()
        ) == pytest.approx(held, rel=1e-6)


# --- a sweep --------------------------------------------------------------------------------------


def swept(**columns) -> pd.DataFrame:
    """Six seeds of two strategies at three sizes; a seed is ten times its number from the first."""
    rows = [
        {
            "param_block_size": size,
            "strategy": strategy,
            "seed": seed,
            "slow": 1000.0 * size + 10 * seed,
            "share": 0.5,
        }
        for size in (1, 16, 256)
        for strategy in ("paged", "runs")
        for seed in range(6)
    ]
    return pd.DataFrame(rows).assign(**columns)


def test_a_swept_line_is_the_median_of_its_repeats_and_the_band_their_interval():
    slow, _ = plots.sweep_figure(swept(), "param_block_size", "strategy", ["slow", "share"])
    assert [line.get_label() for line in slow.lines] == ["paged", "runs"]
    assert slow.lines[0].get_xydata().tolist() == [[1, 1025], [16, 16025], [256, 256025]]
    heights = slow.collections[0].get_paths()[0].vertices[:, 1]
    low, high = median_interval([1000.0 + 10 * seed for seed in range(6)])
    assert heights.min() == low < 1025 and high in heights
    assert "median of 6" in slow.get_title(loc="left") and slow.get_xlabel() == "block size (slots)"


def test_figures_far_apart_and_sizes_are_drawn_on_logarithms_words_and_shares_are_not():
    slow, share = plots.sweep_figure(swept(), "param_block_size", "strategy", ["slow", "share"])
    assert (slow.get_xscale(), slow.get_yscale(), share.get_yscale()) == ("log", "log", "linear")
    assert "logarithmic" in slow.get_ylabel() and share.get_ylim()[0] == 0
    words = swept(param_block_size=["chat", "lognormal", "heavy-tail"] * 12)
    (share,) = plots.sweep_figure(words, "param_block_size", "strategy", ["share"])
    assert share.get_xscale() == "linear" and [
        tick.get_text() for tick in share.get_xticklabels()
    ] == ["chat", "heavy-tail", "lognormal"]


def test_one_measure_under_two_promises_has_one_scale():
    rows = swept(goodput_1=np.arange(36) / 10, goodput_2=np.arange(36) / 100)
    axes = plots.sweep_figure(rows, "param_block_size", "strategy", ["goodput_1", "goodput_2"])
    assert axes[0].get_ylim() == axes[1].get_ylim() == pytest.approx((0, 3.85))


def test_waste_waiting_and_pieces_by_block_size():
    rows = pd.DataFrame(
        {
            "strategy": "paged",
            "block_size": [64, 16],
            "utilization": [0.9, 0.98],
            "mean_ttft_ms": [3000.0, 2000.0],
            "extents_per_sequence": [2.0, 8.0],
            "mean_live_tokens": 320.0,
        }
    )
    waste, waiting, pieces = plots.block_size_curves(rows)
    assert np.allclose(waste.lines[0].get_xydata(), [[16, 2], [64, 10]])
    assert np.allclose(
        waste.lines[1].get_ydata(), 100 * (1 - 320 / (320 + np.array([7.5, 31.5])))
    ), "half a block a sequence"
    assert waiting.lines[0].get_ydata().tolist() == [2, 3] and pieces.lines[
        0
    ].get_ydata().tolist() == [8, 2]
    assert all("(" in axes.get_xlabel() for axes in (waste, waiting, pieces))
