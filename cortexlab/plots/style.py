"""One style for all figures: colours, words of the four shares, and small helpers for axes. A
strategy of the package has one colour everywhere; mlx-lm is grey.
"""

from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from numpy.typing import ArrayLike

from ..metrics import SHARES

WIDTH = 10.0  # inches, of every full figure
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
# Colours of strategies that are not in `COLORS`.
SPARE_COLORS = ("#da8bc3", "#64b5cd", "#ccb974", "#e377c2", "#7a5195")
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
LIMIT = {"color": "#555555", "linestyle": "--", "linewidth": 1}  # a pool, a bound that was claimed
THEORY = {"color": "#333333", "linestyle": "--", "linewidth": 1.4}  # what theory or a machine sets
IDLE_S = 0.05  # seconds; a longer gap between two steps means that nothing was running


def use_style() -> None:
    """Set matplotlib to the style of all figures."""
    matplotlib.rcParams.update(STYLE)


def color(strategy: str) -> str:
    """The strategy's colour, equal in all figures but a sweep's, which gives the spare colours out
    in turn.
    """
    return COLORS.get(strategy) or SPARE_COLORS[sum(map(ord, strategy)) % len(SPARE_COLORS)]


# --- lines and axes -------------------------------------------------------------------------------


def by_strategy(frame: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, dict[str, str]]]:
    """The rows of each strategy, in order of appearance, with the colour and label of its line."""
    for strategy, part in frame.groupby("strategy", sort=False):
        yield part, {"color": color(strategy), "label": strategy}


def ticks_at(axes: Axes, values: Sequence, words: str = "{}") -> None:
    """Ticks of the x axis at the values and nowhere else; ``words`` formats a value."""
    axes.set_xticks(list(values), [words.format(value) for value in values])
    axes.minorticks_off()


def log2_axis(axes: Axes, values: Sequence, words: str = "{}") -> None:
    """A base-2 x axis with ticks at the values."""
    axes.set_xscale("log", base=2)
    ticks_at(axes, values, words)


def ticks_125(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from 0.1 to 10,000, as far as they lie within limits."""
    decades = (0.1, 1, 10, 100, 1000, 10000)
    ticks = [step * decade for decade in decades for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def plain_numbers(axis: Axis) -> None:
    """20 and 500 instead of powers of ten; on a short axis, 2 and 5 beside 1."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 1000 * max(low, 0.1) else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:.7g}"))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def legend_above(axes: Axes, ncols: int = 8, **style) -> None:
    """One legend above the whole figure, with the labels of one panel."""
    handles = axes.get_legend_handles_labels()
    axes.figure.legend(*handles, loc="outside upper center", ncols=ncols, **style)


def legend_beside(axes: Axes, **style) -> None:
    """A legend to the right of the axes."""
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), **style)


def write_beside(axes: Axes, end: tuple, words: str, points: float = 4, **style) -> None:
    """Words to the right of where a bar ends, ``points`` away."""
    axes.annotate(words, end, (points, 0), textcoords="offset points", va="center", **style)


# --- shares, stacked ------------------------------------------------------------------------------


def share_steps(steps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Times and ``[4, times]`` slots of the four shares, to be drawn as steps. Between two steps
    with a gap longer than `IDLE_S` nothing is held.
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


def stack_over_time(axes: Axes, steps: pd.DataFrame) -> float:
    """The slots of the four shares of one strategy's steps, stacked over time; the highest sum."""
    times, layers = share_steps(steps)
    colors = [SHARE_COLORS[share] for share in SHARES]
    axes.stackplot(times, layers, colors=colors, step="post", linewidth=0)
    return layers.sum(axis=0).max()


def share_legend() -> tuple[list[Artist], list[str]]:
    """Handles and labels of the four shares, for a legend."""
    handles = [plt.Rectangle((0, 0), 1, 1, color=SHARE_COLORS[share]) for share in SHARES]
    return handles, [SHARE_WORDS[share] for share in SHARES]


def share_parts(rows: pd.DataFrame, scale: float = 1) -> dict[str, tuple[pd.Series, str]]:
    """Widths and colour of each of the four shares by label, for `stack_bars`."""
    return {
        SHARE_WORDS[share]: (scale * rows[f"{share}_share"], SHARE_COLORS[share])
        for share in SHARES
    }


def stack_bars(
    axes: Axes, places: ArrayLike, parts: Mapping[str, tuple[pd.Series, str]], **style
) -> np.ndarray:
    """Horizontal bars of parts end to end, ``parts`` being widths and colour by label; where each
    bar ends.
    """
    left = np.zeros(len(places))
    for label, (widths, shade) in parts.items():
        axes.barh(places, widths, left=left, color=shade, label=label, **style)
        left = left + widths.to_numpy(float)
    return left
