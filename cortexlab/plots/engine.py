"""Figures of the engine: against mlx-lm, where the time of a step goes, and what pieces cost
attention.
"""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from ..metrics import PARTS, REST
from .style import (
    THEORY,
    WIDTH,
    by_strategy,
    legend_above,
    plain_numbers,
    stack_bars,
    ticks_at,
    write_beside,
)

PART_COLORS = dict(
    zip(
        (*PARTS, REST),
        ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#cccccc"),
        strict=True,
    )
)
METHOD_COLORS = {"auto": "#222222", "views": "#4c72b0", "windows": "#2a8c5a", "gather": "#c44e52"}


def against_batch_limit(rows: pd.DataFrame) -> list[Axes]:
    """Throughput, time to first token and gaps between tokens against the number of requests run at
    once, a line a strategy.
    """
    _, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.6), layout="constrained")
    values = {
        "output tokens per second": rows["output_throughput"],
        "median time to first token (s)": rows["median_ttft_ms"] / 1000,
        "p99 gap between two tokens (ms)": rows["p99_itl_ms"],
    }
    for panel, (label, column) in zip(axes, values.items(), strict=True):
        for part, line in by_strategy(rows):
            panel.plot(part["batch_size"], column[part.index], "o-", **line)
        panel.set(
            xlabel="requests run at once, at most", ylabel=label, xscale="log", ylim=(0, None)
        )
        ticks_at(panel, sorted(set(rows["batch_size"])))
    legend_above(axes[0], 4)
    return list(axes)


def where_a_step_goes(steps: pd.DataFrame) -> Axes:
    """The parts of a step as multiples of its own matrix products (dashed: the bound), a bar a
    step, its time behind it.
    """
    _, axes = plt.subplots(figsize=(WIDTH, 1.4 + 0.42 * len(steps)), layout="constrained")
    parts = {
        part: ((steps[part] / steps[PARTS[0]]).clip(lower=0), shade)
        for part, shade in PART_COLORS.items()
    }
    ends = stack_bars(axes, steps["step"], parts)
    for end, name, ms in zip(ends, steps["step"], steps["step_ms"], strict=True):
        write_beside(axes, (end, name), f"{ms:,.0f} ms")
    axes.axvline(1, **THEORY)
    axes.set(
        xlabel="time / time of the step's matrix products at the BLAS's speed",
        xlim=(0, ends.max() * 1.12),
    )
    axes.invert_yaxis()
    legend_above(axes, len(PART_COLORS))
    return axes


def attention_against_extents(extents: pd.DataFrame) -> Axes:
    """Milliseconds of a layer's decode attention against the length of extents, a line a method;
    ticks name how many there are.
    """
    _, axes = plt.subplots(figsize=(WIDTH * 0.7, 4.2), layout="constrained")
    for method, part in extents.groupby("method", sort=False):
        style = (
            {"linestyle": "--", "linewidth": 1.2, "zorder": 3}
            if method == "auto"
            else {"linewidth": 1.8}
        )
        axes.plot(
            part["extent_slots"],
            part["ms"],
            marker="o",
            markersize=4,
            color=METHOD_COLORS[method],
            label=method,
            **style,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="slots an extent (and extents a sequence), logarithmic",
        ylabel="ms a layer, logarithmic",
    )
    counts = extents.drop_duplicates("extent_slots").set_index("extent_slots")["num_extents"]
    axes.set_xticks(list(counts.index), [f"{slots}\n({count})" for slots, count in counts.items()])
    axes.minorticks_off()
    plain_numbers(axes.yaxis)
    axes.legend(title="K and V are read by")
    return axes
