"""Figures: functions from a data frame to Axes. They never measure; one colour a strategy, mlx-lm
grey, units on every axis.
"""

import json
from collections.abc import Sequence
from itertools import cycle

import matplotlib
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import BadInput
from ..lab.theory import paged_utilization
from ..metrics import SHARES, median_interval, shares

COLORS = {
    "static": "#c44e52",
    "cortexstream": "#dd8452",
    "cortexstream_buddy": "#c79fef",
    "best_fit": "#937860",
    "segregated": "#8c8c00",
    "buddy": "#8172b3",
    "paged": "#4c72b0",
    "runs": "#2a8c5a",
    "mlx-lm": "#8a8a8a",
}
SPARE_COLORS = (
    "#da8bc3",
    "#64b5cd",
    "#ccb974",
    "#e377c2",
    "#7a5195",
)  # for strategies of one's own, in order of name
SHARE_COLORS = {
    "token": "#2a6f97",
    "reserved": "#a9d6e5",
    "internal": "#f4a261",
    "external": "#d1495b",
}
SHARE_WORDS = {
    "token": "token: holds a token",
    "reserved": "reserved: filled later",
    "internal": "internal: never filled",
    "external": "external: free, not usable",
}
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "cortexlab",
}
SWEEP_WORDS = {
    "output_throughput": "output tokens per second",
    "token_share": "share of the memory that is tokens",
    "block_size": "block size (slots)",
    "mean_ttft_ms": "mean time to first token (ms)",
    "extents_per_sequence": "extents a sequence",
    "goodput_2000_100": "requests/s in time (2 s, 100 ms a token)",
    "goodput_500_30": "requests/s in time (500 ms, 30 ms a token)",
    "request_rate": "requests arriving per second",
    "max_batch_size": "requests run at once, at most",
}
WIDTH = 10.0  # inches
FAR_APART = 100  # times the least: such figures are drawn on a logarithmic axis
IDLE_S = 0.05  # a longer gap between two steps means that nothing was running
# Eighteen hues in an order that sets neighbours apart; tab20's two greys are left out, since grey
# means free.
SEQUENCE_COLORS = np.array(
    [c for i, c in enumerate(matplotlib.colormaps["tab20"].colors) if i not in (14, 15)]
)[np.arange(18) * 5 % 18]


def use_style() -> None:
    """The one style of every figure."""
    matplotlib.rcParams.update(STYLE)


def color(strategy: str) -> str:
    """The strategy's colour, the same everywhere."""
    return COLORS.get(strategy) or SPARE_COLORS[sum(map(ord, strategy)) % len(SPARE_COLORS)]


def memory_over_time(steps: pd.DataFrame) -> list[Axes]:
    """KV memory by share over time, one panel a strategy, the same scales in all (first repeat)."""
    of = f", first of {steps['repeat'].max() + 1} repeats" if steps["repeat"].max() else ""
    steps = steps[steps["repeat"] == 0]
    strategies = list(dict.fromkeys(steps["strategy"]))
    rows = -(-len(strategies) // 2)
    figure, axes = plt.subplots(
        rows,
        min(2, len(strategies)),
        figsize=(WIDTH, 0.9 + 2.3 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    flat = list(axes.flat)
    for panel, strategy in zip(flat, strategies, strict=False):
        part = steps[steps["strategy"] == strategy]
        times, layers = share_steps(part)
        panel.stackplot(
            times, layers, colors=[SHARE_COLORS[s] for s in SHARES], step="post", linewidth=0
        )
        weighted = zip(
            part["ended_at"] - part["started_at"],
            part[[f"{s}_slots" for s in SHARES]].to_numpy(),
            strict=True,
        )
        share = shares(
            (seconds, dict(zip(SHARES, slots, strict=True))) for seconds, slots in weighted
        )["token_share"]
        panel.set_title(
            f"{strategy}: {share:.0%} of memory tied up is tokens",
            color=color(strategy),
            loc="left",
        )
        pool = part["pool_slots"].max() if "pool_slots" in part else np.nan
        if (
            pool <= 2 * layers.sum(axis=0).max()
        ):  # not where the pool is as good as unlimited, nor for mlx-lm, which has none
            panel.axhline(pool, color="#555555", linestyle="--", linewidth=1)
    for panel in flat[len(strategies) :]:
        panel.remove()
    for panel in flat[
        max(0, len(strategies) - axes.shape[1]) : len(strategies)
    ]:  # the lowest of each column
        panel.set_xlabel(f"time (s){of}")
        panel.tick_params(labelbottom=True)
    for panel in axes[:, 0]:
        panel.set_ylabel("KV slots (tokens)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=SHARE_COLORS[s]) for s in SHARES]
    labels = [SHARE_WORDS[s] for s in SHARES]
    handles.append(plt.Line2D([], [], color="#555555", linestyle="--", linewidth=1))
    figure.legend(handles, [*labels, "the pool"], loc="outside upper center", ncols=5, fontsize=9)
    return flat[: len(strategies)]


def share_steps(steps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Times and ``[4, times]`` slots of the four shares, to be drawn as steps; nothing is held
    between steps that do not follow.
    """
    times, rows = [], []
    for row in steps.to_dict("records"):
        if times and row["started_at"] - times[-1] > IDLE_S:
            rows[-1] = [0.0] * len(SHARES)
        elif times:
            times.pop(), rows.pop()
        times += [row["started_at"], row["ended_at"]]
        rows += [[row[f"{share}_slots"] for share in SHARES]] * 2
    return np.array(times), np.array(rows, dtype=float).T


def throughput_against_ttft(rows: pd.DataFrame) -> Axes:
    """Output throughput against median TTFT, a point a row with its 95 % intervals; up and to the
    left is better.
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.62, 4.2), layout="constrained")
    for row in rows.to_dict("records"):
        x, y = row["median_ttft_ms"] / 1000, row["output_throughput"]
        spread = {}
        if pd.notna(row["output_throughput_low"]):
            spread["yerr"] = [
                [max(0.0, y - row["output_throughput_low"])],
                [max(0.0, row["output_throughput_high"] - y)],
            ]
            spread["xerr"] = [
                [max(0.0, x - row["median_ttft_ms_low"] / 1000)],
                [max(0.0, row["median_ttft_ms_high"] / 1000 - x)],
            ]
        axes.errorbar(
            x,
            y,
            fmt="o",
            markersize=8,
            color=color(row["strategy"]),
            capsize=3,
            label=row["strategy"],
            **spread,
        )
    axes.set_xlabel("median time to first token, queueing included (s)")
    axes.set_ylabel("output tokens per second")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    points = [
        container[0] for container in axes.containers
    ]  # without error bars: they only clutter a legend
    axes.legend(points, list(rows["strategy"]), loc="lower left")
    axes.set_title(
        "Up and to the left is better"
        + (" (bars: 95 % interval)" if rows["repeats"].max() > 1 else ""),
        loc="left",
    )
    return axes


def latency_distribution(requests: pd.DataFrame) -> list[Axes]:
    """Cumulative distributions of TTFT and of the gaps between tokens, all repeats pooled, one line
    a strategy.
    """
    _, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True, layout="constrained")
    for strategy in dict.fromkeys(requests["strategy"]):
        part = requests[requests["strategy"] == strategy]
        ttft = part["ttft_ms"].dropna().to_numpy() / 1000
        gaps = np.concatenate(
            [np.asarray(gaps, dtype=float) for gaps in part["itl_ms"].dropna()] or [np.zeros(0)]
        )
        for panel, values in zip(axes, (ttft, gaps), strict=True):
            if len(values):
                panel.ecdf(values, color=color(strategy), label=strategy, linewidth=1.8)
    axes[0].set(
        xlabel="time to first token (s)", ylabel="share of requests / of gaps", xlim=(0, None)
    )
    axes[0].set_title("When the first token comes", loc="left")
    axes[1].set(xlabel="gap between two tokens (ms, logarithmic)", xscale="log")
    low, high = axes[1].get_xlim()
    ticks = [
        tick
        for decade in (0.1, 1, 10, 100, 1000, 10000)
        for tick in (decade, 2 * decade, 5 * decade)
        if low <= tick <= high
    ]
    axes[1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[1].minorticks_off()
    axes[1].set_title("How evenly the others follow", loc="left")
    axes[1].legend(loc="lower right")
    return list(axes)


def block_map(steps: pd.DataFrame, at: float | None = None) -> list[Axes]:
    """Which sequence holds which block: at each strategy's fullest moment, or ``at`` seconds (first
    repeat).
    """
    steps = (
        steps[(steps["repeat"] == 0) & steps["extents"].notna()]
        if "extents" in steps
        else steps.iloc[:0]
    )
    strategies = list(dict.fromkeys(steps["strategy"]))
    if not strategies:
        raise BadInput("no step has a block map: only the package's own strategies have one")
    _, axes = plt.subplots(
        len(strategies),
        1,
        figsize=(WIDTH, 0.5 + 1.5 * len(strategies)),
        squeeze=False,
        layout="constrained",
    )
    for panel, strategy in zip(axes[:, 0], strategies, strict=True):
        part = steps[steps["strategy"] == strategy]
        step = part.loc[part["used_blocks"].idxmax()] if at is None else step_at(part, at)
        draw_map(panel, step, strategy)
    axes[-1, 0].set_xlabel("block, counted from the first of its row (light grey: free)")
    return list(axes[:, 0])


def draw_map(axes: Axes, step: pd.Series, strategy: str, at: float | None = None) -> None:
    """One block map: a cell a block in reading order, a colour a sequence, grey where free. Drawn
    once, then only updated.

    ``at``: the moment to name in the title, in seconds (default: the end of the step).
    """
    owners = block_owners(step)
    image = map_image(owners)
    if axes.images:
        axes.images[0].set_data(image)
    else:
        rows, columns = image.shape[:2]
        axes.imshow(image, aspect="auto", interpolation="nearest")
        axes.set_yticks(
            range(rows) if rows > 1 else [],
            [str(row * columns) for row in range(rows)] if rows > 1 else [],
        )
        axes.set_ylabel("first block" if rows > 1 else "")
        axes.grid(False)
        axes.tick_params(length=0, labelsize=8)
    used, sequences, holes = (
        int((owners >= 0).sum()),
        len(set(owners[owners >= 0].tolist())),
        int(step["num_holes"]),
    )
    axes.set_title(
        f"{strategy} at {step['ended_at'] if at is None else at:.2f} s: {sequences} "
        f"sequence{'s' * (sequences != 1)} on {used} of "
        f"{len(owners)} blocks, {holes} hole{'s' * (holes != 1)}, external fragmentation "
        f"{step['external_fragmentation']:.2f}",
        loc="left",
        color=color(strategy),
    )


def block_owners(step: pd.Series) -> np.ndarray:
    """For every block the number of the request that holds it (its place in order of submission),
    -1 where free.
    """
    owners = np.full(int(step["used_blocks"] + step["free_blocks"]), -1)
    for request, extents in json.loads(step["extents"]):
        for start, num_blocks in extents:
            owners[start : start + num_blocks] = int("".join(filter(str.isdigit, request)) or 0)
    return owners


def map_image(owners: np.ndarray) -> np.ndarray:
    """``[rows, columns, 3]`` colours of at most eight rows: neighbours in time get unlike hues,
    free blocks light grey.
    """
    columns = max(-(-len(owners) // 8), min(len(owners), 64))
    rows = -(-len(owners) // columns)
    image = np.ones((rows * columns, 3))  # white behind the last block
    image[: len(owners)] = np.where(
        (owners >= 0)[:, None], SEQUENCE_COLORS[np.maximum(owners, 0) % len(SEQUENCE_COLORS)], 0.93
    )
    return image.reshape(rows, columns, 3)


def step_at(steps: pd.DataFrame, at: float) -> pd.Series:
    """The last step that had begun ``at`` seconds, or the first."""
    begun = steps[steps["started_at"] <= at]
    return begun.iloc[-1] if len(begun) else steps.iloc[0]


def bench_figures(
    rows: pd.DataFrame, requests: pd.DataFrame, steps: pd.DataFrame
) -> dict[str, Figure]:
    """The four figures of a bench run by file name."""
    figures = {
        "memory": memory_over_time(steps)[0].figure,
        "throughput": throughput_against_ttft(rows).figure,
        "latency": latency_distribution(requests)[0].figure,
    }
    if "extents" in steps:
        figures["block_map"] = block_map(steps)[0].figure
    return figures


def replay_figures(rows: pd.DataFrame, steps: pd.DataFrame) -> dict[str, Figure]:
    """The figures of a replay by file name; over time, the smallest block size is shown."""
    smallest = steps[steps["block_size"] == steps["block_size"].min()]
    panels = memory_over_time(smallest), fragmentation_over_time(smallest)
    ends = smallest.groupby("strategy")["ended_at"].max()
    for axes in (axes for panel in panels for axes in panel):
        axes.set_xlim(
            0, min(1.6 * ends.min(), ends.max())
        )  # what takes many times as long is cut off: it would squeeze the others
    figures = {"memory": panels[0][0].figure, "fragmentation": panels[1][0].figure}
    if rows["block_size"].nunique() > 1:
        figures["block_size"] = block_size_curves(rows)[0].figure
    else:
        figures["extents"] = extents_against_ttft(rows).figure
    return figures


def fragmentation_over_time(steps: pd.DataFrame) -> list[Axes]:
    """External fragmentation and number of holes, a line a strategy."""
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 5.2), sharex=True, layout="constrained")
    measures = {
        "external_fragmentation": "1 - largest free run / free blocks",
        "num_holes": "number of holes",
    }
    for panel, (name, words) in zip(axes, measures.items(), strict=True):
        for strategy, part in steps.groupby("strategy", sort=False):
            span = max(1, len(part) // 200)  # a running mean: single samples jump about
            smooth = part[name].rolling(span, center=True, min_periods=1).mean()
            panel.plot(
                part["started_at"], smooth, color=color(strategy), linewidth=1.4, label=strategy
            )
        panel.set_ylabel(words)
    axes[0].set_ylim(0, 1)
    axes[1].set_yscale("symlog", linthresh=10)
    axes[1].set_ylim(0)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].minorticks_off()
    axes[1].set_xlabel("virtual time (s)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    return list(axes)


def extents_against_ttft(rows: pd.DataFrame) -> Axes:
    """What decides between strategies: how many extents attention must read, against how long a
    request waits; a point a row.
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.62, 4.2), layout="constrained")
    for row in rows.sort_values("mean_ttft_ms", ascending=False).to_dict("records"):
        at = row["extents_per_sequence"], row["mean_ttft_ms"] / 1000
        axes.plot(
            *at, "o", markersize=9, alpha=0.85, color=color(row["strategy"]), label=row["strategy"]
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="extents a sequence has at its end",
        ylabel="mean time to first token (s)",
    )
    axes.set_xlim(0.8, axes.get_xlim()[1] * 2)
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("Down and to the left is better", loc="left")
    return axes


def block_size_curves(rows: pd.DataFrame) -> list[Axes]:
    """Waste, waiting and pieces over block size, a line a strategy; dashed: half a block a
    sequence, the loss that paging is bound to.
    """
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.6), layout="constrained")
    sizes = np.array(sorted(rows["block_size"].unique()))
    for strategy, part in rows.sort_values("block_size").groupby("strategy", sort=False):
        drawn = (
            100 * (1 - part["utilization"]),
            part["mean_ttft_ms"] / 1000,
            part["extents_per_sequence"],
        )
        for panel, values in zip(axes, drawn, strict=True):
            panel.plot(
                part["block_size"],
                values,
                "o-",
                markersize=4,
                color=color(strategy),
                label=strategy,
            )
    bound = 100 * (1 - paged_utilization(rows["mean_live_tokens"].max(), sizes))
    axes[0].plot(sizes, bound, "--", color="#555555", label="half a block a sequence")
    labels = (
        "slots held without a token (%)",
        "mean time to first token (s)",
        "extents a sequence has at its end",
    )
    for panel, label in zip(axes, labels, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.set(xlabel="block size (slots)", ylabel=label, ylim=(0, None))
    axes[2].set(yscale="log", ylim=(0.9, None))
    plain_numbers(axes[2].yaxis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    return list(axes)


def plain_numbers(axis) -> None:
    """20 and 500 instead of powers of ten; on a short axis, 2 and 5 beside 1."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(
        matplotlib.ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * max(low, 0.1) else (1,))
    )
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:.7g}"))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def sweep_figure(
    rows: pd.DataFrame, x: str, lines: str, y: Sequence[str] = ("output_throughput", "token_share")
) -> list[Axes]:
    """Collected rows of a sweep: one panel a measure over the swept parameter ``x``, one line a
    value of ``lines``.

    Rows that differ in nothing drawn are repeats: the line is their median, the band its 95 %
    interval.
    """
    alike = (
        len({measure.partition("_")[0] for measure in y}) == 1
    )  # goodput under two promises: one scale
    _, axes = plt.subplots(
        1, len(y), figsize=(WIDTH, 3.8), squeeze=False, sharey=alike, layout="constrained"
    )
    values = sorted(rows[x].unique())
    shades = (
        dict(
            zip(sorted(map(str, set(rows[lines]) - set(COLORS))), cycle(SPARE_COLORS), strict=False)
        )
        | COLORS
    )
    for panel, measure in zip(axes[0], y, strict=True):
        for (line, part), style in zip(
            rows.groupby(lines), cycle(("o-", "s--", "D-.", "^:")), strict=False
        ):  # some lie on each other
            repeats = part.groupby(x)[measure]
            panel.plot(
                repeats.median(),
                style,
                color=(shade := shades[str(line)]),
                label=line,
                markersize=5,
            )
            bounds = pd.DataFrame(
                {at: median_interval(list(each)) or (np.nan, np.nan) for at, each in repeats}
            ).T
            panel.fill_between(
                bounds.index, bounds[0], bounds[1], color=shade, alpha=0.2, linewidth=0
            )
        numbers = pd.api.types.is_numeric_dtype(rows[x])
        if numbers and min(values) > 0:
            panel.set_xscale("log", base=2)
        panel.set_xticks(values, [f"{value:g}" if numbers else str(value) for value in values])
        panel.minorticks_off()
        name = x.removeprefix("param_")
        panel.set(xlabel=SWEEP_WORDS.get(name, name), ylabel=SWEEP_WORDS.get(measure, measure))
        drawn = rows[[*y] if alike else [measure]]
        if drawn.min(axis=None) > 0 and drawn.max(axis=None) > FAR_APART * drawn.min(axis=None):
            panel.set(yscale="log", ylabel=f"{panel.get_ylabel()}, logarithmic")
            plain_numbers(panel.yaxis)
        else:
            panel.set_ylim(0, drawn.max(axis=None) * 1.1 or 1)
    axes[0][0].figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6
    )
    runs = int(rows.groupby([x, lines]).size().max())
    axes[0][0].set_title(
        f"{len(rows)} points" + (f", median of {runs} and its 95 % interval" if runs > 1 else ""),
        loc="left",
    )
    return list(axes[0])
