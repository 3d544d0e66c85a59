"""Figures of fragmentation show the data they are given."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from cortexlab.lab import theory
from cortexlab.metrics import SHARES
from cortexlab.plots import fragmentation as plots_fragmentation
from cortexlab.replay import replay, tables
from cortexlab.workloads.synthetic import make_workload

STRATEGIES = ["cortexstream", "buddy", "paged"]


@pytest.fixture(scope="module")
def found():
    items = make_workload("lognormal", 120, seed=1, request_rate=40)
    return tables(replay(items, STRATEGIES, num_blocks="60%"))


@pytest.fixture(autouse=True)
def close():
    yield
    matplotlib.pyplot.close("all")


def test_bars_are_the_shares_with_the_time_to_first_token_beside_them(found):
    rows = found["rows"]
    shares, latency = plots_fragmentation.shares_beside_ttft(rows)
    for bars, share in zip(shares.containers, SHARES, strict=True):
        assert [bar.get_width() for bar in bars] == pytest.approx(100 * rows[f"{share}_share"])
    assert [bar.get_width() for bar in latency.containers[0]] == pytest.approx(
        rows["mean_ttft_ms"] / 1000
    )
    assert "(%)" in shares.get_xlabel() and "(s" in latency.get_xlabel()


def test_knuths_rule_is_drawn_for_the_strategy_it_applies_to(found):
    _, holes = plots_fragmentation.holes_over_time(found["steps"], "cortexstream")
    *lines, rule = holes.lines
    assert [line.get_label() for line in lines] == STRATEGIES and rule.get_linestyle() == "--"
    part = found["steps"].query("strategy == 'cortexstream'")
    assert np.nanmax(rule.get_ydata()) <= theory.fifty_percent_rule(part["num_running"].max())


def test_empty_slots_stand_beside_what_theory_says(found):
    axes = plots_fragmentation.empty_beside_theory(found["rows"], {"paged": 0.05})
    assert [bar.get_width() for bar in axes.containers[0]] == pytest.approx(
        100 * (1 - found["rows"]["utilization"])
    )
    (line,) = axes.lines
    assert set(line.get_xdata()) == {5.0} and np.mean(line.get_ydata()) == pytest.approx(2), (
        "the line stands at the third bar"
    )


def test_theory_of_strategies_that_are_not_shown_draws_nothing(found):
    axes = plots_fragmentation.empty_beside_theory(found["rows"], {"mine": 0.2})
    assert list(axes.lines) == [] and axes.get_legend() is None


FRONTIER = (
    "strategy",
    "label",
    "watermark",
    "empty_share",
    "long_extent_share",
    "copied_share",
    "extents_per_sequence",
    "mean_ttft_ms",
)


def test_a_frontier_is_a_point_a_setting_in_every_panel():
    settings = [
        ("paged", "paged", 0.02, 0.04, 0.1, 0.0, 70, 8000),
        ("runs", "runs, 2 %", 0.0, 0.02, 0.7, 0.01, 20, 9000),
        ("runs", "runs, 2 %", 0.02, 0.04, 0.9, 0.01, 6, 8000),
    ]
    panels = plots_fragmentation.run_length_frontier(
        pd.DataFrame(settings, columns=FRONTIER), chosen=0.02
    )
    for panel, (paged, *runs) in zip(
        panels, ((10, 70, 90), (0, 1, 1), (70, 20, 6), (8, 9, 8)), strict=True
    ):
        lines = {line.get_label(): line.get_xydata() for line in panel.lines}
        assert lines["paged"] == pytest.approx(np.array([(4, paged)]))
        assert lines["runs, 2 %"] == pytest.approx(np.array([(2, runs[0]), (4, runs[1])]))
        assert panel.lines[-1].get_xdata() == [4, 4], "a band marks the chosen watermark"
    assert [text.get_text() for text in panels[-1].texts] == ["0 %", "2 %"]


def test_rows_without_waiting_draw_no_frontier():
    panels = plots_fragmentation.run_length_frontier(
        pd.DataFrame([("runs", "a", 0.0, None, 1.0, 0.0, 1, 50)], columns=FRONTIER), 0.0
    )
    assert all(not panel.lines for panel in panels)
    panels[0].figure.canvas.draw()


def test_published_and_replayed_bars_each_fill_the_pool():
    published = pd.DataFrame(
        {"token": [0.2, 0.9], "reserved": [0.1, 0], "internal": [0.3, 0], "others": [0.4, 0.1]},
        index=["a", "b"],
    )
    ours = published.drop(columns="others").assign(rounding=[0.3, 0], free=[0.1, 0.1])
    axes = plots_fragmentation.published_beside_ours(published, ours)
    paper, replayed = axes.containers[:4], axes.containers[4:]
    for bars in (paper, replayed):
        assert np.sum(
            [[bar.get_width() for bar in part] for part in bars], axis=0
        ) == pytest.approx([100, 100])
    assert {label.get_text() for label in axes.get_yticklabels()} == {
        "a: paper",
        "b: paper",
        "replay",
    }
