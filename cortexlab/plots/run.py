"""Figures of a bench run, a replay and a sweep."""

from collections.abc import Iterator, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..lab.theory import paged_utilization
from ..metrics import COLUMNS, PREFIX, SHARES, median_interval, shares
from .block_map import block_map
from .fragmentation import fragmentation_over_time
from .style import (
    COLORS,
    LIMIT,
    SPARE_COLORS,
    WIDTH,
    by_strategy,
    color,
    legend_above,
    legend_beside,
    log2_axis,
    plain_numbers,
    share_legend,
    stack_over_time,
    ticks_125,
    ticks_at,
)

SWEEP_WORDS = {name: column.axis for name, column in COLUMNS.items() if column.axis}
FAR_APART = 100  # largest / least; figures further apart are drawn on a logarithmic axis


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
    # A strategy that takes many times as long is cut off: it would squeeze the others.
    until = min(1.6 * ends.min(), ends.max())
    for axes in (*panels[0], *panels[1]):
        axes.set_xlim(0, until)
    figures = {"memory": panels[0][0].figure, "fragmentation": panels[1][0].figure}
    if rows["block_size"].nunique() > 1:
        figures["block_size"] = block_size_curves(rows)[0].figure
    else:
        figures["extents"] = extents_against_ttft(rows).figure
    return figures


# --- memory over time -----------------------------------------------------------------------------


def memory_over_time(steps: pd.DataFrame) -> list[Axes]:
    """KV memory by share over time, one panel a strategy, the same scales in all (first repeat)."""
    of = f", first of {steps['repeat'].max() + 1} repeats" if steps["repeat"].max() else ""
    steps = steps[steps["repeat"] == 0]
    strategies = list(dict.fromkeys(steps["strategy"]))
    rows, columns = -(-len(strategies) // 2), min(2, len(strategies))
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH, 0.9 + 2.3 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels, unused = axes.flat[: len(strategies)], axes.flat[len(strategies) :]
    for panel, strategy in zip(panels, strategies, strict=True):
        _memory_panel(panel, steps[steps["strategy"] == strategy], strategy)
    for panel in unused:
        panel.remove()
    for panel in panels[-columns:]:  # the lowest of each column
        panel.set_xlabel(f"time (s){of}")
        panel.tick_params(labelbottom=True)
    for panel in axes[:, 0]:
        panel.set_ylabel("KV slots (tokens)")
    handles, labels = share_legend()
    handles, labels = [*handles, plt.Line2D([], [], **LIMIT)], [*labels, "the pool"]
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=9)
    return list(panels)


def _memory_panel(panel: Axes, steps: pd.DataFrame, strategy: str) -> None:
    most = stack_over_time(panel, steps)
    slots = steps[[f"{share}_slots" for share in SHARES]].set_axis(SHARES, axis=1)
    seconds = steps["ended_at"] - steps["started_at"]
    share = shares(zip(seconds, slots.to_dict("records"), strict=True))["token_share"]
    title = f"{strategy}: {share:.0%} of memory tied up is tokens"
    panel.set_title(title, color=color(strategy), loc="left")
    # No line for a pool as good as unlimited, nor for mlx-lm, which has no pool (NaN).
    pool = steps["pool_slots"].max() if "pool_slots" in steps else np.nan
    if pool <= 2 * most:
        panel.axhline(pool, **LIMIT)


# --- throughput and latency -----------------------------------------------------------------------


def throughput_against_ttft(rows: pd.DataFrame) -> Axes:
    """Output throughput against median TTFT, a point a row with its 95 % intervals; up and to the
    left is better.
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.62, 4.2), layout="constrained")
    for row in rows.to_dict("records"):
        axes.errorbar(
            row["median_ttft_ms"] / 1000,
            row["output_throughput"],
            xerr=_spread(row, "median_ttft_ms", 1 / 1000),
            yerr=_spread(row, "output_throughput"),
            fmt="o",
            markersize=8,
            color=color(row["strategy"]),
            capsize=3,
            label=row["strategy"],
        )
    axes.set_xlabel("median time to first token, queueing included (s)")
    axes.set_ylabel("output tokens per second")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    points = [container[0] for container in axes.containers]  # error bars would clutter a legend
    axes.legend(points, list(rows["strategy"]), loc="lower left")
    bars = " (bars: 95 % interval)" if rows["repeats"].max() > 1 else ""
    axes.set_title(f"Up and to the left is better{bars}", loc="left")
    return axes


def _spread(row: dict, name: str, scale: float = 1.0) -> list[list[float]] | None:
    """How far a figure's interval reaches down and up, as `Axes.errorbar` takes it; None for a
    figure without one.
    """
    if pd.isna(row[f"{name}_low"]):
        return None
    value, low, high = (scale * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def latency_distribution(requests: pd.DataFrame) -> list[Axes]:
    """Cumulative distributions of TTFT and of the gaps between tokens, all repeats pooled, one line
    a strategy.
    """
    _, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True, layout="constrained")
    for part, line in by_strategy(requests):
        ttft = part["ttft_ms"].dropna().to_numpy() / 1000
        gaps = np.concatenate([np.zeros(0), *part["itl_ms"].dropna()])
        for panel, values in zip(axes, (ttft, gaps), strict=True):
            if len(values):
                panel.ecdf(values, linewidth=1.8, **line)
    axes[0].set(
        xlabel="time to first token (s)", ylabel="share of requests / of gaps", xlim=(0, None)
    )
    axes[0].set_title("When the first token comes", loc="left")
    axes[1].set(xlabel="gap between two tokens (ms, logarithmic)", xscale="log")
    ticks_at(axes[1], ticks_125(*axes[1].get_xlim()), "{:g}")
    axes[1].set_title("How evenly the others follow", loc="left")
    drawn = axes[1] if axes[1].lines else axes[0]  # outputs of one token have no gaps
    if drawn.lines:
        drawn.legend(loc="lower right")
    return list(axes)


# --- a replay -------------------------------------------------------------------------------------


def extents_against_ttft(rows: pd.DataFrame) -> Axes:
    """What decides between strategies: how many extents attention must read, against how long a
    request waits; a point a row.
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.62, 4.2), layout="constrained")
    for row in rows.sort_values("mean_ttft_ms", ascending=False).to_dict("records"):
        at, strategy = (row["extents_per_sequence"], row["mean_ttft_ms"] / 1000), row["strategy"]
        axes.plot(*at, "o", markersize=9, alpha=0.85, color=color(strategy), label=strategy)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="extents a sequence has at its end",
        ylabel="mean time to first token (s)",
    )
    axes.set_xlim(0.8, axes.get_xlim()[1] * 2)
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    legend_beside(axes)
    axes.set_title("Down and to the left is better", loc="left")
    return axes


def block_size_curves(rows: pd.DataFrame) -> list[Axes]:
    """Waste, waiting and pieces over block size, a line a strategy; dashed: half a block a
    sequence, the loss that paging is bound to.
    """
    _, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.6), layout="constrained")
    sizes = np.array(sorted(rows["block_size"].unique()))
    measures = {
        "slots held without a token (%)": 100 * (1 - rows["utilization"]),
        "mean time to first token (s)": rows["mean_ttft_ms"] / 1000,
        "extents a sequence has at its end": rows["extents_per_sequence"],
    }
    for panel, (words, values) in zip(axes, measures.items(), strict=True):
        for part, line in by_strategy(rows.assign(value=values).sort_values("block_size")):
            panel.plot(part["block_size"], part["value"], "o-", markersize=4, **line)
        log2_axis(panel, sizes)
        panel.set(xlabel="block size (slots)", ylabel=words)
    bound = 100 * (1 - paged_utilization(rows["mean_live_tokens"].max(), sizes))
    axes[0].plot(sizes, bound, "--", color=LIMIT["color"], label="half a block a sequence")
    for panel in axes:
        panel.set_ylim(0, None)
    axes[2].set(yscale="log", ylim=(0.9, None))
    plain_numbers(axes[2].yaxis)
    legend_above(axes[0])
    return list(axes)


# --- a sweep --------------------------------------------------------------------------------------


def sweep_figure(
    rows: pd.DataFrame, x: str, lines: str, y: Sequence[str] = ("output_throughput", "token_share")
) -> list[Axes]:
    """Collected rows of a sweep: one panel a measure over the swept parameter ``x``, one line a
    value of ``lines``.

    Rows that differ in nothing drawn are repeats: the line is their median, the band its 95 %
    interval, and the title names the parameters in which they differ.
    """
    # Measures of one name, as goodput under two promises, share one scale.
    alike = len({measure.partition("_")[0] for measure in y}) == 1
    _, axes = plt.subplots(
        1, len(y), figsize=(WIDTH, 3.8), squeeze=False, sharey=alike, layout="constrained"
    )
    for panel, measure in zip(axes[0], y, strict=True):
        for line, part, style, shade in _sweep_lines(rows, lines):
            _median_and_band(panel, part.groupby(x)[measure], line, style, shade)
        _sweep_ticks(panel, rows[x])
        name = x.removeprefix(PREFIX)
        panel.set(xlabel=SWEEP_WORDS.get(name, name), ylabel=SWEEP_WORDS.get(measure, measure))
        _sweep_scale(panel, rows[[*y] if alike else [measure]])
    legend_above(axes[0][0], 6)
    repeats = int(rows.groupby([x, lines]).size().max())
    others = (name for name in rows if name.startswith(PREFIX) and name not in (x, lines))
    over = ", ".join(name.removeprefix(PREFIX) for name in others if rows[name].nunique() > 1)
    of = f"{repeats}{f' over {over}' if over else ''}"
    median = f", median of {of} and its 95 % interval" if repeats > 1 else ""
    axes[0][0].set_title(f"{len(rows)} points{median}", loc="left")
    return list(axes[0])


def _sweep_lines(rows: pd.DataFrame, lines: str) -> Iterator[tuple[object, pd.DataFrame, str, str]]:
    """Name, rows, line style and colour of each line. Styles differ, since some lines coincide."""
    others = sorted(map(str, set(rows[lines]) - set(COLORS)))
    shades = dict(zip(others, cycle(SPARE_COLORS), strict=False)) | COLORS
    styles = cycle(("o-", "s--", "D-.", "^:"))
    for (line, part), style in zip(rows.groupby(lines), styles, strict=False):
        yield line, part, style, shades[str(line)]


def _median_and_band(panel: Axes, repeats, line, style: str, shade: str) -> None:
    panel.plot(repeats.median(), style, color=shade, label=line, markersize=5)
    bounds = {at: median_interval(list(each)) or (np.nan, np.nan) for at, each in repeats}
    low, high = np.array(list(bounds.values()), dtype=float).T
    panel.fill_between(list(bounds), low, high, color=shade, alpha=0.2, linewidth=0)


def _sweep_ticks(panel: Axes, swept: pd.Series) -> None:
    """Ticks at the swept values; a base-2 axis for positive numbers."""
    values = sorted(swept.unique())
    if not pd.api.types.is_numeric_dtype(swept):
        ticks_at(panel, values)
    elif min(values) > 0:
        log2_axis(panel, values, "{:g}")
    else:
        ticks_at(panel, values, "{:g}")


def _sweep_scale(panel: Axes, drawn: pd.DataFrame) -> None:
    """A y axis from 0; a logarithmic one for positive figures that lie `FAR_APART`."""
    low, high = drawn.min(axis=None), drawn.max(axis=None)
    if low > 0 and high > FAR_APART * low:
        panel.set(yscale="log", ylabel=f"{panel.get_ylabel()}, logarithmic")
        plain_numbers(panel.yaxis)
    else:
        panel.set_ylim(0, high * 1.1 or 1)
