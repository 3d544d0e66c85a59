"""Figures of load, of addresses and of sweeps draw what their tables say."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from cortexlab import plots
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.errors import BadInput
from cortexlab.metrics import median_interval
from cortexlab.plots import load as plots_load
from cortexlab.plots import widgets
from cortexlab.plots.block_map import NUM_TIMES
from cortexlab.replay import tables
from cortexlab.results.store import read, write_tables
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
    runs = widgets.record(items, ("cortexstream", "paged"), 16, "60%")
    return tables(runs)["steps"]


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


def test_the_front_is_the_rows_that_no_other_beats():
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


def test_a_timeline_has_one_piece_for_each_gap(bench):
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


# --- where blocks lie -----------------------------------------------------------------------------


def toy(extents: list, pool: int, at: float) -> dict:
    used = sum(blocks for _, _, blocks in extents)
    return {
        "strategy": "paged",
        "repeat": 0,
        "started_at": at,
        "ended_at": at + 1,
        "used_blocks": used,
        "free_blocks": pool - used,
        "extents": extents,
    }


def test_run_lengths_on_a_toy_pool():
    """Request 0 holds blocks 0-1 and 5, request 1 block 3: free are 2, 4 and 6-9. A second later
    request 1 alone is left: free are 0-2 and 4-9.
    """
    steps = pd.DataFrame(
        [
            toy([[0, 0, 2], [0, 5, 1], [1, 3, 1]], 10, 0.0),
            toy([[1, 3, 1]], 10, 1.0),
        ]
    )
    counts = plots.run_lengths(steps).set_index(["kind", "blocks"])["count"]
    assert counts["free runs"][[1, 2, 4, 8]].tolist() == [1.0, 0.5, 1.0, 0.0]
    assert counts["extents"][[1, 2, 4]].tolist() == [1.5, 0.5, 0.0]
    free, extents = plots.run_length_histograms(steps)
    assert free.patches[0].get_data().values[:3].tolist() == [1.0, 0.5, 1.0]
    assert "free runs at a time" in free.get_ylabel() and "extents" in extents.get_xlabel()
    heat = plots.address_heat(steps)
    half = NUM_TIMES // 2
    assert (
        (heat[[0, 1, 5], :half] == pytest.approx(1))
        and not heat[[0, 1, 5], half:].any()
        and heat[3] == pytest.approx(1)
    )


@pytest.mark.parametrize("columns", [{}, {"extents": None}])
@pytest.mark.parametrize(
    "draw",
    [
        plots.block_map,
        plots.address_heat_map,
        plots.run_length_histograms,
        widgets.block_map_slider,
    ],
)
def test_steps_without_a_block_map_are_refused(draw, columns):
    steps = pd.DataFrame([{"strategy": "mlx-lm", "repeat": 0, "ended_at": 1.0} | columns])
    with pytest.raises(BadInput, match="no step has a block map"):
        draw(steps)


def test_a_figure_without_an_interval_has_no_error_bar():
    row = {"strategy": "paged", "repeats": 2}
    for name, low in (("median_ttft_ms", np.nan), ("output_throughput", 9.0)):
        row |= {name: 10.0, f"{name}_low": low, f"{name}_high": low + 2}
    (bar,) = plots.throughput_against_ttft(pd.DataFrame([row])).containers
    assert (bar.has_xerr, bar.has_yerr) == (False, True)


def test_a_written_bench_result_has_the_owners_it_was_written_with(bench, tmp_path):
    written = bench.steps()
    write_tables(tmp_path, {}, steps=written)
    read_back = read(tmp_path)["steps"]
    assert (written["extents"].notna() == read_back["extents"].notna()).all()
    ours = written["strategy"] == "paged"
    assert written["extents"].notna().tolist() == ours.tolist() and ours.any()
    held = set()
    for (_, before), (_, after) in zip(
        written[ours].iterrows(), read_back[ours].iterrows(), strict=True
    ):
        owners = plots.block_owners(before)
        assert plots.block_owners(after).tolist() == owners.tolist()
        assert (owners >= 0).sum() == before["used_blocks"]
        held |= set(owners.tolist())
    assert held == {-1, *range(8)}, "every request by its place in order of submission"
    pd.testing.assert_frame_equal(plots.run_lengths(written), plots.run_lengths(read_back))


def test_a_result_with_block_maps_as_text_is_read_as_nested_lists_and_drawn():
    folder = Path(__file__).parent.parent / "results" / "reference"
    text = pd.read_parquet(folder / "steps.parquet")["extents"]
    steps = read(folder)["steps"]
    assert (text.notna() == steps["extents"].notna()).all()
    for before, extents in zip(text.dropna(), steps["extents"].dropna(), strict=True):
        assert [[f"r{number}", [start, blocks]] for number, start, blocks in extents] == [
            [request, piece] for request, held in json.loads(before) for piece in held
        ]
    strategies = steps.dropna(subset="extents")["strategy"].unique()
    panels = plots.block_map(steps)
    assert [panel.get_title(loc="left").split()[0] for panel in panels] == list(strategies)
    assert all(panel.images for panel in panels)


def test_recorded_replays_have_the_holes_their_allocator_counts(steps):
    for _, step in steps.iterrows():
        owners = plots.block_owners(step)
        assert (owners >= 0).sum() == step["used_blocks"]
        assert (
            len(plots.lengths_of_runs(owners < 0)) == step["num_holes"]
            or step["strategy"] == "paged"
        )
    panels = plots.address_heat_map(steps)
    for panel, (_, part) in zip(panels, steps.groupby("strategy", sort=False), strict=True):
        held = np.average(part["used_blocks"], weights=part["ended_at"] - part["started_at"])
        assert panel.images[0].get_array().mean() * len(
            panel.images[0].get_array()
        ) == pytest.approx(held, rel=1e-6)


# --- a sweep --------------------------------------------------------------------------------------


def swept(**columns) -> pd.DataFrame:
    """Six seeds of two strategies at three sizes; ``slow`` is 1000 * size + 10 * seed."""
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


def test_a_swept_figure_names_what_its_repeats_differ_in():
    rows = swept()
    seeds = [i % 6 for i in range(len(rows))]
    panel, _ = plots.sweep_figure(
        rows.assign(param_seed=seeds, param_rate=3),
        "param_block_size",
        "strategy",
        ["slow", "share"],
    )
    title = "36 points, median of 6 over seed and its 95 % interval"
    assert panel.get_title(loc="left") == title


def test_axes_are_logarithmic_for_sizes_and_distant_figures_linear_for_words_and_shares():
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
