"""Figures of where KV memory goes and what that costs: of a replay's rows and samples, theory
dashed.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..lab.theory import fifty_percent_rule
from .style import (
    SHARE_COLORS,
    THEORY,
    WIDTH,
    by_strategy,
    color,
    legend_above,
    log2_axis,
    plain_numbers,
    share_parts,
    stack_bars,
    ticks_at,
    write_beside,
)

FRONTIER_MARKERS = "osD^"
# The paper's categories; a replay tells two parts of the last one apart: rounding, free.
PUBLISHED_WORDS = {
    "token": "token states",
    "reserved": "reservation: filled later",
    "internal": "internal: asked for, never filled",
    "rounding": "rounded up by buddies",
    "free": "free, but of use to nobody",
}
PUBLISHED_COLORS = SHARE_COLORS | {
    "rounding": "#e9909a",
    "free": SHARE_COLORS["external"],
    "others": "#ffffff",
}


def shares_beside_ttft(rows: pd.DataFrame) -> list[Axes]:
    """The four shares of what a strategy ties up, a bar a row, and how long its requests wait for
    their first token beside them.
    """
    _, axes = plt.subplots(
        1,
        2,
        figsize=(WIDTH, 1.3 + 0.42 * len(rows)),
        sharey=True,
        width_ratios=(2, 1),
        layout="constrained",
    )
    names = list(rows["strategy"])
    _numbered_bars(axes[0], names, share_parts(rows, 100), height=0.75)
    axes[0].set_xlabel("share of the KV memory a strategy ties up (%)")
    seconds = rows["mean_ttft_ms"] / 1000
    axes[1].barh(names, seconds, color=[color(name) for name in names])
    for name, value in zip(names, seconds, strict=True):
        write_beside(axes[1], (value, name), f"{value:,.{1 if value < 100 else 0}f}")
    axes[1].set_xscale("log")
    axes[1].set_xlim(seconds.min() / 3, seconds.max() * 4)
    axes[1].set_xlabel("mean time to first token (s, logarithmic)")
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[0].invert_yaxis()
    legend_above(axes[0], 4)
    return list(axes)


def fragmentation_over_time(steps: pd.DataFrame) -> list[Axes]:
    """External fragmentation and number of holes, a line a strategy."""
    fragmentation, holes = _fragmentation_lines(steps, slices=200)
    fragmentation.set_ylabel("1 - largest free run / free blocks")
    holes.set_yscale("symlog", linthresh=10)
    holes.set_ylabel("number of holes")
    holes.set_ylim(0)
    holes.yaxis.set_major_formatter("{x:g}")
    holes.minorticks_off()
    legend_above(fragmentation)
    return [fragmentation, holes]


def holes_over_time(steps: pd.DataFrame, rule_for: str) -> list[Axes]:
    """External fragmentation and number of holes, a line a strategy; dashed: Knuth's rule for the
    number of requests that ``rule_for`` runs.
    """
    fragmentation, holes = _fragmentation_lines(steps, slices=60)
    part = steps[steps["strategy"] == rule_for]
    rule = fifty_percent_rule(_running_mean(part["num_running"], 60))
    words = f"half as many holes as {rule_for} runs requests (Knuth)"
    holes.plot(part["started_at"], rule, **THEORY, label=words)
    fragmentation.set_ylabel("1 - largest hole / free")
    holes.set(yscale="log", ylabel="number of holes (logarithmic)")
    holes.yaxis.set_major_formatter("{x:g}")
    holes.set_ylim(0.8, None)
    # The median end of all strategies: the slowest would squeeze the others.
    holes.set_xlim(0, steps.groupby("strategy")["ended_at"].max().median())
    legend_above(holes, 4)
    return [fragmentation, holes]


def _fragmentation_lines(steps: pd.DataFrame, slices: int) -> np.ndarray:
    """Two panels, external fragmentation above the number of holes, a line a strategy."""
    _, axes = plt.subplots(2, 1, figsize=(WIDTH, 5.4), sharex=True, layout="constrained")
    for panel, name in zip(axes, ("external_fragmentation", "num_holes"), strict=True):
        for part, line in by_strategy(steps):
            mean = _running_mean(part[name], slices)
            panel.plot(part["started_at"], mean, linewidth=1.5, **line)
    axes[0].set_ylim(0, 1)
    axes[1].set_xlabel("virtual time (s)")
    return axes


def _running_mean(values: pd.Series, slices: int) -> pd.Series:
    """Mean over one of so many slices of all values around each: single samples jump about."""
    return values.rolling(max(1, len(values) // slices), center=True, min_periods=1).mean()


def empty_beside_theory(rows: pd.DataFrame, theory: Mapping[str, float]) -> Axes:
    """What of the slots held is empty while a request decodes, a bar a row; dashed: what ``theory``
    says for that strategy.
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.72, 1.2 + 0.38 * len(rows)), layout="constrained")
    names, empty = list(rows["strategy"]), 100 * (1 - rows["utilization"])
    theory = {name: theory[name] for name in names if name in theory}
    axes.barh(names, empty, color=[color(name) for name in names])
    for number, (name, value) in enumerate(zip(names, empty, strict=True)):
        at = max(value, 100 * theory.get(name, 0))
        write_beside(axes, (at, name), f"{value:.1f}", points=5)
        if name in theory:
            (line,) = axes.plot([100 * theory[name]] * 2, [number - 0.45, number + 0.45], **THEORY)
    if theory:
        axes.legend([line], ["theory, from the lengths alone"], loc="lower right")
    axes.set(xlabel="empty slots / slots held (%)", xlim=(0, 100))
    axes.invert_yaxis()
    return axes


def run_length_frontier(rows: pd.DataFrame, chosen: float | None = None) -> list[Axes]:
    """What long runs cost: run length, tokens copied, pieces and waiting, each over the memory that
    is left empty.

    A line a ``label``, a point a ``watermark``, which is written beside it where waiting is shown;
    grey: the ``chosen`` one.
    """
    _, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), sharex=True, layout="constrained")
    # A row has no empty share where no request ever waited.
    rows = rows.assign(empty=100 * rows["empty_share"].astype(float)).dropna(subset="empty")
    panels = {
        "tokens in runs of 128 or more (%)": 100 * rows["long_extent_share"],
        "tokens copied / tokens computed (%)": 100 * rows["copied_share"],
        "extents a sequence has at its end": rows["extents_per_sequence"],
        "mean time to first token (s)": rows["mean_ttft_ms"] / 1000,
    }
    for panel, (words, values) in zip(axes.flat, panels.items(), strict=True):
        _frontier_lines(panel, rows.assign(value=values))
        panel.set_ylabel(words)
        panel.set_ylim(0, 1.2 * values.max() if values.max() > 0 else 1.0)
        panel.margins(x=0.08)
        for empty in rows["empty"][rows["watermark"] == chosen].unique():
            panel.axvline(empty, color="#dddddd", linewidth=7, zorder=0)
    axes[0, 0].set_ylim(0, 105)
    axes[1, 0].set(yscale="log", ylim=(0.8, None))
    plain_numbers(axes[1, 0].yaxis)
    _write_watermarks(axes[1, 1], rows)
    for panel in axes[1]:
        panel.set_xlabel("pool left empty while requests wait (%)")
    legend_above(axes[0, 0], 4)
    return list(axes.flat)


def _frontier_lines(panel: Axes, rows: pd.DataFrame) -> None:
    for number, (label, part) in enumerate(rows.groupby("label", sort=False)):
        panel.plot(
            part["empty"],
            part["value"],
            color=color(part["strategy"].iloc[0]),
            marker=FRONTIER_MARKERS[number % 4],
            linestyle=("-", ":", "-.")[number % 3],
            markerfacecolor="none",
            markersize=8,
            label=label,
        )


def _write_watermarks(panel: Axes, rows: pd.DataFrame) -> None:
    """Each watermark once, above and below its point in turn."""
    points = rows.drop_duplicates("watermark").sort_values("watermark").to_dict("records")
    for number, row in enumerate(points):
        panel.annotate(
            f"{100 * row['watermark']:g} %",
            (row["empty"], row["mean_ttft_ms"] / 1000),
            (0, 9 if number % 2 == 0 else -17),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )


def published_beside_ours(published: pd.DataFrame, ours: pd.DataFrame) -> Axes:
    """Two bars a system (the index of both frames), each a share of the whole pool: as published,
    and as replayed.
    """
    _, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.85 * len(ours)), layout="constrained")
    at = np.arange(len(ours), dtype=float)
    paper = {f"_{name}": (100 * published[name], PUBLISHED_COLORS[name]) for name in published}
    _numbered_bars(axes, at - 0.2, paper, height=0.34, edgecolor="#333333", linewidth=0.8)
    for bar in axes.containers[-1]:  # the paper's last category, printed without its parts
        bar.set(hatch="///", edgecolor=PUBLISHED_COLORS["free"])
    axes.containers[-1].set_label("paper: external & others")
    replayed = {
        words: (100 * ours[name], PUBLISHED_COLORS[name]) for name, words in PUBLISHED_WORDS.items()
    }
    _numbered_bars(axes, at + 0.2, replayed, height=0.34)
    axes.set_yticks(
        np.concatenate([at - 0.2, at + 0.2]),
        [*(f"{name}: paper" for name in published.index), *["replay"] * len(ours)],
    )
    axes.set_xlabel("share of the whole KV pool (%)")
    axes.invert_yaxis()
    legend_above(axes, 3)
    return axes


def _numbered_bars(axes: Axes, places, parts: Mapping[str, tuple[pd.Series, str]], **style) -> None:
    """`stack_bars` of percentages; a part of 4 % or more has its number in it."""
    before = len(axes.containers)
    stack_bars(axes, places, parts, **style)
    for bars, (values, shade) in zip(axes.containers[before:], parts.values(), strict=True):
        dark = shade in (SHARE_COLORS["token"], SHARE_COLORS["external"])
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # on hatching
        axes.bar_label(
            bars,
            [f"{value:.1f}" if value >= 4 else "" for value in values],
            label_type="center",
            color="white" if dark else "#222222",
            fontsize=9,
            bbox=paper if shade == PUBLISHED_COLORS["others"] else None,
        )
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)


def kv_bytes_by_context(table: pd.DataFrame, contexts: Sequence[int], memory_gb: float) -> Axes:
    """GB of K and V against the tokens held, a line a model; dashed: the memory there is.
    ``table``: bytes a token at 16 bits.
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.7, 4.2), layout="constrained")
    for of, alike in table.groupby("16 bits").groups.items():
        axes.plot(
            contexts,
            [of * tokens / 1e9 for tokens in contexts],
            "o-",
            markersize=4,
            label=", ".join(alike),
        )
    axes.axhline(memory_gb, **THEORY)
    axes.annotate(
        "memory for K and V", (contexts[0], memory_gb), (0, 4), textcoords="offset points"
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens held, of all sequences (logarithmic)",
        ylabel="K and V in float16, GB (logarithmic)",
    )
    ticks_at(axes, contexts, "{:,}")
    plain_numbers(axes.yaxis)
    axes.legend()
    return axes


def four_granularities(
    accounting: pd.Series,
    theory: pd.Series,
    prefix: pd.Series,
    growth: pd.Series,
    attention: pd.Series,
) -> list[Axes]:
    """What each of four sizes costs by itself, all 0 when it costs nothing: shares of memory and of
    prefix tokens lost, pieces, time.

    Series by size in slots. ``theory`` belongs to ``accounting``, dashed; ``attention`` is a
    multiple of the least.
    """
    _, axes = plt.subplots(1, 4, figsize=(WIDTH, 3.2), layout="constrained")
    panels = {
        "accounting: block size\nmemory without a token (%)": 100 * accounting,
        "sharing: hashed block\nprefix tokens not found (%)": 100 * prefix,
        "growth: slots left behind a sequence\nextents a sequence": growth,
        "attention: slots an extent\ntime of decode attention (multiple)": attention,
    }
    for panel, (words, values) in zip(axes, panels.items(), strict=True):
        title, label = words.split("\n")
        panel.plot(values.index, values, "o-", color=color("runs"), markersize=4)
        panel.set_title(title.partition(":")[0], loc="left")
        panel.set(
            xlabel=title.partition(": ")[2] + ("" if "slots" in title else " (slots)"),
            ylabel=label,
            ylim=(0, 1.08 * values.max()),
        )
        linear = (
            {"linthresh": values.index[values.index > 0].min() / 2} if 0 in values.index else {}
        )
        panel.set_xscale("symlog" if linear else "log", base=2, **linear)
        ticks_at(panel, values.index[:: 1 + len(values) // 6])
    axes[0].plot(theory.index, 100 * theory, **THEORY)
    return list(axes)


def shares_by_workload(rows: pd.DataFrame) -> list[Axes]:
    """Where memory went, a panel a workload and a bar a strategy; behind each bar the mean time to
    first token.
    """
    workloads = list(dict.fromkeys(rows["workload"]))
    _, axes = plt.subplots(
        1, len(workloads), figsize=(WIDTH, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, workload in zip(axes[0], workloads, strict=True):
        part = rows[rows["workload"] == workload]
        stack_bars(panel, part["strategy"], share_parts(part))
        for strategy, ms in zip(part["strategy"], part["mean_ttft_ms"], strict=True):
            panel.annotate(
                f"{ms / 1000:,.1f} s", (1.02, strategy), va="center", annotation_clip=False
            )
        panel.set(
            xlim=(0, 1.3),
            xticks=[0, 0.5, 1],
            xlabel=f"{workload}: share of the memory tied up\n(behind: mean time to first token)",
        )
    axes[0][0].invert_yaxis()
    legend_above(axes[0][0], 4)
    return list(axes[0])


def prefix_hits(rows: pd.DataFrame) -> list[Axes]:
    """Share of prompt tokens found in the cache: against the block size, a line a pool, and against
    the pool, a line a block size.
    """
    _, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True, layout="constrained")
    words = {"block_size": "block size (slots)", "pool_slots": "pool (slots)"}
    for panel, x, line in zip(axes, words, reversed(words), strict=True):
        values = sorted(set(rows[line]))
        shades = plt.colormaps["viridis"](np.linspace(0, 0.9, len(values)))
        for value, shade in zip(values, shades, strict=True):
            part = rows[rows[line] == value]
            found = 100 * part["prefix_hit_tokens_rate"]
            panel.plot(part[x], found, "o-", markersize=4, color=shade, label=f"{value:,}")
        log2_axis(panel, sorted(set(rows[x])), "{:,}")
        panel.set(xlabel=words[x], ylim=(0, 100))
        panel.legend(title=words[line], fontsize=8)
    axes[0].set_ylabel("prompt tokens found in the cache (%)")
    return list(axes)
