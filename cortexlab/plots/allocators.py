"""Figures of allocators alone: toy pools, what a strategy gives up, what it costs."""

import textwrap
from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from ..lab.play import Toy
from .style import (
    LIMIT,
    WIDTH,
    by_strategy,
    color,
    legend_above,
    plain_numbers,
    ticks_at,
    write_beside,
)

FREE = "#ededed"
# Letters can be read on these colours; Set2's eighth is left out: grey means free.
LIGHT_COLORS = matplotlib.colormaps["Set2"].colors[:7]


def toy_pools(toys: Sequence[Toy]) -> Axes:
    """One pool a row: a colour and a letter a sequence, hatched what it was given beyond what it
    asked for, grey what is free.
    """
    _, axes = plt.subplots(figsize=(WIDTH, 0.7 + 0.42 * len(toys)), layout="constrained")
    columns = max(toy.num_blocks for toy in toys)
    for row, toy in enumerate(toys):
        _draw_cells(axes, row, 0, toy.num_blocks, color=FREE, edgecolor="white")
        for number, (name, extents) in enumerate(toy.owners.items()):
            rgb = LIGHT_COLORS[number % len(LIGHT_COLORS)]
            _draw_sequence(axes, row, name, extents, toy.asked[name], rgb)
        verdict = textwrap.fill(toy.verdict, 62)
        axes.text(columns + 0.4, row, verdict, va="center", fontsize=8, color="#333333")
    axes.set_yticks(range(len(toys)), [toy.strategy for toy in toys])
    for label, toy in zip(axes.get_yticklabels(), toys, strict=True):
        label.set_color(color(toy.strategy))
    axes.set_xticks(range(0, columns + 1, 4))
    axes.set_xlim(0, columns * 1.85)
    axes.set_ylim(len(toys) - 0.5, -0.5)
    axes.set_xlabel("block (grey: free; hatched: given beyond what was asked for)", loc="left")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    served = ", ".join(toy.strategy for toy in toys if not toy.refused) or "no strategy"
    axes.set_title(f"The same requests: {served} could serve all of them", loc="left")
    return axes


def _draw_sequence(axes: Axes, row: int, name: str, extents, asked: int, rgb: tuple) -> None:
    for start, num_blocks in extents:
        filled = min(asked, num_blocks)
        asked -= filled
        _draw_cells(axes, row, start, filled, color=rgb, edgecolor="white", linewidth=0.5)
        beyond = {"color": "white", "edgecolor": rgb, "hatch": "////", "linewidth": 0}
        _draw_cells(axes, row, start + filled, num_blocks - filled, **beyond)
        letter = {"ha": "center", "va": "center", "fontsize": 9, "fontweight": "bold"}
        axes.text(start + num_blocks / 2, row, name, color="#222222", **letter)


def _draw_cells(axes: Axes, row: int, start: int, num_blocks: int, **style) -> None:
    """One cell a block."""
    blocks = range(start, start + num_blocks)
    axes.barh([row] * num_blocks, 1, left=blocks, height=0.8, **style)


def what_it_gives_up(rows: pd.DataFrame) -> list[Axes]:
    """Three ways to pay, a bar a strategy: requests refused (solid: although enough was free),
    blocks beyond what was asked for, extents.
    """
    _, axes = plt.subplots(
        1, 3, figsize=(WIDTH, 0.9 + 0.32 * len(rows)), sharey=True, layout="constrained"
    )
    colors = [color(strategy) for strategy in rows["strategy"]]
    refused, with_room, spare = (
        100 * rows[name] for name in ("refused_share", "refused_with_room_share", "spare_share")
    )
    axes[0].barh(rows["strategy"], refused, color=colors, height=0.7, alpha=0.3)
    panels = (
        ("refused (solid: with enough free)", "share of requests (%)", with_room, refused),
        ("handed out, never asked for", "share of the blocks held (%)", spare, spare),
        ("pieces to read", "extents a request", rows["extents"], rows["extents"]),
    )
    for panel, (title, unit, values, ends) in zip(axes, panels, strict=True):
        panel.barh(rows["strategy"], values, color=colors, height=0.7)
        for at, (value, end) in enumerate(zip(values, ends, strict=True)):
            words = f"{value:.0f} of {end:.0f}" if panel is axes[0] else f"{value:.1f}"
            write_beside(panel, (end, at), words, fontsize=9)
        panel.set_title(title, loc="left")
        panel.set_xlabel(unit)
        panel.set_xlim(0, max(1.0, ends.max()) * 1.3)
        panel.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return list(axes)


def cost_by_pool_size(
    rows: pd.DataFrame,
    operations: Sequence[str],
    bound_us: float | None = None,
    bound_words: str = "",
) -> list[Axes]:
    """Median microseconds over the size of the pool, a line a strategy, a panel an operation;
    dashed: a bound that was claimed.
    """
    _, axes = plt.subplots(
        1, len(operations), figsize=(WIDTH, 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, operation in zip(axes[0], operations, strict=True):
        measured = rows[(rows["operation"] == operation) & rows["median_us"].notna()]
        for part, line in by_strategy(measured):
            part = part.sort_values("num_blocks")
            panel.plot(part["num_blocks"], part["median_us"].astype(float), "o-", **line)
        if bound_us is not None:
            panel.axhline(bound_us, **LIMIT, label=bound_words)
        panel.set(xscale="log", yscale="log", xlabel="blocks in the pool")
        panel.set_title(operation, loc="left")
        ticks_at(panel, sorted(rows["num_blocks"].unique()), "{:,}")
    low, high = axes[0][0].get_ylim()
    axes[0][0].set_ylim(min(low, 0.5), max(high, 10))
    axes[0][0].set_ylabel("median time (µs)")
    plain_numbers(axes[0][0].yaxis)
    legend_above(axes[0][0], 5, fontsize=9)
    return list(axes[0])
