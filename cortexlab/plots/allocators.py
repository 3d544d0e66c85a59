"""Figures of allocators alone: toy pools, what a strategy gives up, what it costs. They never
measure; style as `plots`.
"""

import textwrap
from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from ..lab.play import Toy
from .run import WIDTH, color, plain_numbers

FREE = "#ededed"
LIGHT_COLORS = matplotlib.colormaps["Set2"].colors[
    :7
]  # letters can be read on them; the eighth is grey, which means free


def toy_pools(toys: Sequence[Toy]) -> Axes:
    """One pool a row: a colour and a letter a sequence, hatched what it was given beyond what it
    asked for, grey what is free.
    """
    _, axes = plt.subplots(figsize=(WIDTH, 0.7 + 0.42 * len(toys)), layout="constrained")
    columns = max(toy.num_blocks for toy in toys)
    for row, toy in enumerate(toys):
        axes.barh(
            [row] * toy.num_blocks,
            1,
            left=range(toy.num_blocks),
            height=0.8,
            color=FREE,
            edgecolor="white",
        )
        for number, (name, extents) in enumerate(toy.owners.items()):
            _draw_sequence(
                axes, row, name, extents, toy.asked[name], LIGHT_COLORS[number % len(LIGHT_COLORS)]
            )
        axes.text(
            columns + 0.4,
            row,
            textwrap.fill(toy.verdict, 62),
            va="center",
            fontsize=8,
            color="#333333",
        )
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
    served = [toy.strategy for toy in toys if not toy.refused]
    axes.set_title(
        f"The same requests: {', '.join(served) or 'no strategy'} could serve all of them",
        loc="left",
    )
    return axes


def _draw_sequence(axes: Axes, row: int, name: str, extents, asked: int, rgb: tuple) -> None:
    for start, num_blocks in extents:
        filled = min(asked, num_blocks)
        axes.barh(
            [row] * filled,
            1,
            left=range(start, start + filled),
            height=0.8,
            color=rgb,
            edgecolor="white",
            linewidth=0.5,
        )
        beyond = range(start + filled, start + num_blocks)
        axes.barh(
            [row] * len(beyond),
            1,
            left=beyond,
            height=0.8,
            color="white",
            edgecolor=rgb,
            hatch="////",
            linewidth=0,
        )
        axes.text(
            start + num_blocks / 2,
            row,
            name,
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            color="#222222",
        )
        asked -= filled


def what_it_gives_up(rows: pd.DataFrame) -> list[Axes]:
    """Three ways to pay, a bar a strategy: requests refused (solid: although enough was free),
    blocks nobody asked for, extents.
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
            panel.annotate(
                words, (end, at), (4, 0), textcoords="offset points", va="center", fontsize=9
            )
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
    figure, axes = plt.subplots(
        1, len(operations), figsize=(WIDTH, 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    sizes = sorted(rows["num_blocks"].unique())
    for panel, operation in zip(axes[0], operations, strict=True):
        measured = rows[(rows["operation"] == operation) & rows["median_us"].notna()]
        for strategy, part in measured.groupby("strategy", sort=False):
            part = part.sort_values("num_blocks")
            panel.plot(
                part["num_blocks"],
                part["median_us"].astype(float),
                "o-",
                color=color(strategy),
                label=strategy,
            )
        if bound_us is not None:
            panel.axhline(bound_us, color="#555555", linestyle="--", linewidth=1, label=bound_words)
        panel.set(xscale="log", yscale="log", xlabel="blocks in the pool")
        panel.set_title(operation, loc="left")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
    low, high = axes[0][0].get_ylim()
    axes[0][0].set_ylim(min(low, 0.5), max(high, 10))
    axes[0][0].set_ylabel("median time (µs)")
    plain_numbers(axes[0][0].yaxis)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9
    )
    return list(axes[0])
