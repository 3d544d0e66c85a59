"""Figures of a server under load, and of where its blocks lie: curves, fronts, timelines,
histograms, heat map. They never measure.
"""

import json
from itertools import cycle, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm

from ..errors import BadInput
from .run import WIDTH, block_owners, color, plain_numbers

NUM_TIMES = 200  # columns of a heat map
NUM_BINS = 12  # lengths up to 2^12 blocks


def load_curve(rows: pd.DataFrame) -> list[Axes]:
    """Median and p99 TTFT against the throughput reached, a line a strategy, a point a
    ``request_rate``: right and down is better.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True, layout="constrained")
    for panel, (statistic, words) in zip(
        axes, {"median_ttft_ms": "median", "p99_ttft_ms": "p99"}.items(), strict=True
    ):
        for strategy, part in rows.groupby("strategy", sort=False):
            at_rate = part.groupby("request_rate")[["output_throughput", statistic]].median()
            panel.plot(
                at_rate["output_throughput"],
                at_rate[statistic] / 1000,
                "o-",
                color=color(strategy),
                markersize=4,
                label=strategy,
            )
        panel.set(
            xlabel="output tokens per second",
            ylabel=f"{words} time to first token (s, logarithmic)",
            yscale="log",
            xlim=(0, None),
        )
        plain_numbers(panel.yaxis)
        panel.tick_params(labelleft=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return list(axes)


def padding_curve(padding: pd.DataFrame) -> Axes:
    """Share of a padded batch that is padding against its number of sequences (the index), a line a
    workload (the columns).
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.6, 3.4), layout="constrained")
    for name, style in zip(padding, cycle(("o-", "s--", "D-.")), strict=False):
        axes.plot(
            padding.index,
            100 * padding[name],
            style,
            color=color("mlx-lm"),
            markersize=4,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(padding.index, [str(size) for size in padding.index])
    axes.minorticks_off()
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
    share, wait = 100 * rows["token_share"], rows["mean_ttft_ms"] / 1000
    front = on_front(np.column_stack([share, -wait]))
    best = rows.assign(share=share, wait=wait)[front].sort_values(["share", "wait"])
    axes.plot(
        best["share"],
        best["wait"],
        color="#bbbbbb",
        linewidth=5,
        zorder=0,
        solid_capstyle="round",
        label="no other is better in both",
    )
    for (strategy, part), marker in zip(
        rows.groupby("strategy", sort=False), cycle("o^sD"), strict=False
    ):  # some lie on each other
        style = {
            "facecolors": "none",
            "edgecolors": color(strategy),
            "linewidths": 1.8,
            "marker": marker,
        }
        axes.scatter(
            share[part.index],
            wait[part.index],
            s=20 + 22 * np.log2(part["block_size"]),
            label=strategy,
            **style,
        )
    axes.set(
        xlabel="memory tied up that is tokens (%)",
        ylabel="mean time to first token (s, logarithmic)",
        yscale="log",
        xlim=(0, 102),
    )
    plain_numbers(axes.yaxis)
    smallest, largest = rows["block_size"].min(), rows["block_size"].max()
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        title=f"small to large:\nblocks of {smallest} to {largest} slots",
    )
    return axes


def request_timeline(requests: pd.DataFrame) -> list[Axes]:
    """A line a request in order of arrival: grey until its first token, then a piece a token,
    coloured by its gap; a panel a strategy.

    ``requests`` as `bench.Bench.requests`: times in seconds, ``itl_ms`` the gaps of each. One scale
    of colour for all; first repeat.
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
    gaps = np.concatenate([np.asarray(each, float) for each in requests["itl_ms"]])
    low, high = np.quantile(gaps, [0.02, 1]) if len(gaps) else (1, 2)
    norm = LogNorm(max(0.1, low), max(0.2, 1.01 * high))
    for panel, strategy in zip(axes[0], strategies, strict=True):
        part = requests[requests["strategy"] == strategy].sort_values(
            ["arrived_at", "scheduled_at"], kind="stable"
        )
        for row, request in enumerate(part.to_dict("records")):
            panel.hlines(
                row, request["arrived_at"], request["first_token_at"], color="#dddddd", linewidth=2
            )
            at = (
                request["first_token_at"]
                + np.concatenate([[0.0], np.cumsum(request["itl_ms"])]) / 1000
            )
            pieces = [[(begin, row), (end, row)] for begin, end in pairwise(at)]
            lines = LineCollection(
                pieces,
                array=np.asarray(request["itl_ms"], float),
                cmap="viridis",
                norm=norm,
                linewidth=5,
            )
            panel.add_collection(lines)
        panel.set_title(strategy, loc="left", color=color(strategy))
        panel.set(
            xlabel="time (s)", xlim=(0, requests["finished_at"].max()), ylim=(len(part) - 0.3, -0.7)
        )
        panel.grid(axis="y", visible=False)
    axes[0][0].set_ylabel("request, in order of admission")
    bar = figure.colorbar(lines, ax=axes[0], label="ms between two tokens")
    bar.minorticks_off()
    ticks = [
        tick
        for decade in (1, 10, 100, 1000, 10000)
        for tick in (decade, 2 * decade, 5 * decade)
        if norm.vmin <= tick <= norm.vmax
    ]
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    return list(axes[0])


# --- where blocks lie -----------------------------------------------------------------------------


def lengths_of_runs(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True, in order."""
    return np.diff(np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]))))[::2]


def run_lengths(steps: pd.DataFrame) -> pd.DataFrame:
    """How many free runs and how many extents of each length there are, on average over time.

    A row a strategy, kind (``free runs``, ``extents``) and power of two: lengths from ``blocks`` to
    less than twice as many.
    """
    found = []
    for strategy, part in _mapped(steps).groupby("strategy", sort=False):
        counts = {"free runs": np.zeros(NUM_BINS), "extents": np.zeros(NUM_BINS)}
        seconds = part["ended_at"] - part["started_at"]
        for (_, step), weight in zip(part.iterrows(), seconds / seconds.sum(), strict=True):
            extents = [length for _, held in _extents(step) for _, length in held]
            for kind, lengths in (
                ("free runs", lengths_of_runs(block_owners(step) < 0)),
                ("extents", extents),
            ):
                if len(lengths):
                    counts[kind] += weight * np.bincount(
                        np.log2(lengths).astype(int).clip(max=NUM_BINS - 1), minlength=NUM_BINS
                    )
        for kind, each in counts.items():
            found += [
                {"strategy": strategy, "kind": kind, "blocks": 2**n, "count": count}
                for n, count in enumerate(each)
            ]
    return pd.DataFrame(found)


def run_length_histograms(steps: pd.DataFrame) -> list[Axes]:
    """`run_lengths` as stairs, a line a strategy: free runs left, extents right."""
    lengths = run_lengths(steps)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), layout="constrained")
    longest = lengths["blocks"][lengths["count"] > 0].max()
    for panel, kind in zip(axes, ("free runs", "extents"), strict=True):
        for strategy, part in lengths[
            (lengths["kind"] == kind) & (lengths["blocks"] <= longest)
        ].groupby("strategy", sort=False):
            edges = [*part["blocks"], 2 * longest]
            panel.stairs(part["count"], edges, color=color(strategy), linewidth=2, label=strategy)
        panel.set_xscale("log", base=2)
        ticks = [2**n for n in range(int(np.log2(longest)) + 2)]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set(
            xlabel=f"length of {kind} (blocks)", ylabel=f"{kind} at a time, average", ylim=(0, None)
        )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return list(axes)


def address_heat(steps: pd.DataFrame) -> np.ndarray:
    """``[blocks, NUM_TIMES]``: the share of each slice of time in which each block was held, of one
    strategy's steps.
    """
    begin, end = steps["started_at"].min(), steps["ended_at"].max()
    edges = np.linspace(begin, end, NUM_TIMES + 1)
    heat = np.zeros((int(steps["used_blocks"].iloc[0] + steps["free_blocks"].iloc[0]), NUM_TIMES))
    for _, step in steps.iterrows():
        inside = np.clip(
            np.minimum(step["ended_at"], edges[1:]) - np.maximum(step["started_at"], edges[:-1]),
            0,
            None,
        )
        heat += np.outer(block_owners(step) >= 0, inside)
    return heat / (edges[1] - edges[0])


def address_heat_map(steps: pd.DataFrame) -> list[Axes]:
    """Which addresses are in use when: a panel a strategy, block address upwards, time to the
    right, dark where held.
    """
    steps = _mapped(steps)
    parts = list(steps.groupby("strategy", sort=False))
    figure, axes = plt.subplots(
        1, len(parts), figsize=(WIDTH, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (strategy, part) in zip(axes[0], parts, strict=True):
        heat = address_heat(part)
        extent = (part["started_at"].min(), part["ended_at"].max(), 0, len(heat))
        image = panel.imshow(
            heat,
            aspect="auto",
            origin="lower",
            extent=extent,
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        panel.set_title(strategy, loc="left", color=color(strategy))
        panel.set_xlabel("time (s)")
        panel.grid(False)
    axes[0][0].set_ylabel("block address")
    figure.colorbar(image, ax=axes[0], label="share of the time held")
    return list(axes[0])


def _mapped(steps: pd.DataFrame) -> pd.DataFrame:
    return steps[(steps["repeat"] == 0) & steps["extents"].notna()]


def _extents(step: pd.Series) -> list:
    return json.loads(step["extents"])
