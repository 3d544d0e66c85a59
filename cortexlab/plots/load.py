"""Figures of a server under load: curves, fronts, timelines."""

from itertools import cycle, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm

from ..errors import BadInput
from .style import (
    WIDTH,
    by_strategy,
    color,
    legend_above,
    legend_beside,
    log2_axis,
    plain_numbers,
    ticks_125,
)


def load_curve(rows: pd.DataFrame) -> list[Axes]:
    """Median and p99 TTFT against the throughput reached, a line a strategy, a point a
    ``request_rate``: right and down is better.
    """
    _, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True, layout="constrained")
    for panel, statistic in zip(axes, ("median", "p99"), strict=True):
        ttft = f"{statistic}_ttft_ms"
        for part, line in by_strategy(rows):
            at_rate = part.groupby("request_rate")[["output_throughput", ttft]].median()
            seconds = at_rate[ttft] / 1000
            panel.plot(at_rate["output_throughput"], seconds, "o-", markersize=4, **line)
        panel.set(
            xlabel="output tokens per second",
            ylabel=f"{statistic} time to first token (s, logarithmic)",
            yscale="log",
            xlim=(0, None),
        )
        plain_numbers(panel.yaxis)
        panel.tick_params(labelleft=True)
    legend_above(axes[0], 6)
    return list(axes)


def padding_curve(padding: pd.DataFrame) -> Axes:
    """Share of a padded batch that is padding against its number of sequences (the index), a line a
    workload (the columns).
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.6, 3.4), layout="constrained")
    grey = color("mlx-lm")
    for name, style in zip(padding, cycle(("o-", "s--", "D-.")), strict=False):
        axes.plot(padding.index, 100 * padding[name], style, color=grey, markersize=4, label=name)
    log2_axis(axes, padding.index)
    axes.set(xlabel="sequences in a padded batch", ylabel="padding (% of its slots)", ylim=(0, 100))
    axes.legend()
    return axes


def on_front(gains: np.ndarray) -> np.ndarray:
    """Which rows of ``gains [rows, measures]``, more being better, no other row equals or beats
    everywhere and beats somewhere.
    """
    as_good = (gains[None] >= gains[:, None]).all(axis=2)
    better = (gains[None] > gains[:, None]).any(axis=2)
    return ~(as_good & better).any(axis=1)


def pareto_front(rows: pd.DataFrame) -> Axes:
    """Memory that is tokens against mean TTFT, a point a row with its block size; the line joins
    those that no other row beats in both.
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.7, 4.4), layout="constrained")
    rows = rows.assign(share=100 * rows["token_share"], wait=rows["mean_ttft_ms"] / 1000)
    best = rows[on_front(np.column_stack([rows["share"], -rows["wait"]]))]
    best = best.sort_values(["share", "wait"])
    axes.plot(
        best["share"],
        best["wait"],
        color="#bbbbbb",
        linewidth=5,
        zorder=0,
        solid_capstyle="round",
        label="no other is better in both",
    )
    # Markers differ, since some points coincide.
    for (part, line), marker in zip(by_strategy(rows), cycle("o^sD"), strict=False):
        axes.scatter(
            part["share"],
            part["wait"],
            s=20 + 22 * np.log2(part["block_size"]),
            facecolors="none",
            edgecolors=line["color"],
            linewidths=1.8,
            marker=marker,
            label=line["label"],
        )
    axes.set(
        xlabel="memory tied up that is tokens (%)",
        ylabel="mean time to first token (s, logarithmic)",
        yscale="log",
        xlim=(0, 102),
    )
    plain_numbers(axes.yaxis)
    smallest, largest = rows["block_size"].min(), rows["block_size"].max()
    legend_beside(axes, title=f"small to large:\nblocks of {smallest} to {largest} slots")
    return axes


def request_timeline(requests: pd.DataFrame) -> list[Axes]:
    """A line a request in order of arrival: grey until its first token, then a piece a token,
    coloured by its gap; a panel a strategy.

    ``requests`` as `bench.summary.Bench.requests`: times in seconds, ``itl_ms`` the gaps of each
    request. One scale of colour for all; first repeat.
    """
    requests = requests[(requests["repeat"] == 0) & (requests["state"] == "finished")]
    strategies = list(dict.fromkeys(requests["strategy"]))
    if not strategies:
        raise BadInput("no request has finished: there is no timeline to draw")
    figure, axes = plt.subplots(
        1,
        len(strategies),
        figsize=(WIDTH, 2.0 + 0.13 * len(requests) / len(strategies)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    norm = _gap_scale(requests)
    for panel, strategy in zip(axes[0], strategies, strict=True):
        part = requests[requests["strategy"] == strategy]
        lines = _timeline_panel(panel, part, norm)
        panel.set_title(strategy, loc="left", color=color(strategy))
        panel.set(xlabel="time (s)", xlim=(0, requests["finished_at"].max()))
    axes[0][0].set_ylabel("request, in order of admission")
    bar = figure.colorbar(lines, ax=axes[0], label="ms between two tokens")
    bar.minorticks_off()
    ticks = ticks_125(max(1, norm.vmin), norm.vmax)
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    return list(axes[0])


def _gap_scale(requests: pd.DataFrame) -> LogNorm:
    """Milliseconds to colours, from the 2 % quantile of all gaps to the longest."""
    gaps = np.concatenate([np.asarray(each, float) for each in requests["itl_ms"]])
    low, high = np.quantile(gaps, [0.02, 1]) if len(gaps) else (1, 2)
    return LogNorm(max(0.1, low), max(0.2, 1.01 * high))


def _timeline_panel(panel: Axes, requests: pd.DataFrame, norm: LogNorm) -> LineCollection:
    """One strategy's requests; the coloured pieces of the last one."""
    requests = requests.sort_values(["arrived_at", "scheduled_at"], kind="stable")
    for row, request in enumerate(requests.to_dict("records")):
        first, gaps = request["first_token_at"], np.asarray(request["itl_ms"], float)
        panel.hlines(row, request["arrived_at"], first, color="#dddddd", linewidth=2)
        at = first + np.concatenate([[0.0], np.cumsum(gaps)]) / 1000
        pieces = [[(begin, row), (end, row)] for begin, end in pairwise(at)]
        lines = LineCollection(pieces, array=gaps, cmap="viridis", norm=norm, linewidth=5)
        panel.add_collection(lines)
    panel.set_ylim(len(requests) - 0.3, -0.7)
    panel.grid(axis="y", visible=False)
    return lines
