"""Where blocks lie: block maps, lengths of runs, and addresses over time.

``steps["extents"]`` of a step is its block map: ``[[request number, first block, blocks], ...]``, a
nested list or, after Parquet, NumPy arrays. Requests are numbered in order of submission.
"""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..errors import BadInput
from .style import WIDTH, by_strategy, color, legend_above, log2_axis

NUM_TIMES = 200  # columns of a heat map
NUM_BINS = 12  # of a histogram of lengths: powers of two, the last one 2^11 blocks and more
# Eighteen hues in an order that sets neighbours apart. tab20's two greys are left out: grey means
# free.
SEQUENCE_COLORS = np.array(
    [c for i, c in enumerate(matplotlib.colormaps["tab20"].colors) if i not in (14, 15)]
)[np.arange(18) * 5 % 18]


# --- the block map of a step ----------------------------------------------------------------------


def block_map(steps: pd.DataFrame, at: float | None = None) -> list[Axes]:
    """Which sequence holds which block: at each strategy's fullest moment, or ``at`` seconds (first
    repeat).
    """
    steps = mapped(steps)
    strategies = list(dict.fromkeys(steps["strategy"]))
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
    """One block map: a cell a block in reading order, a colour a sequence, grey where free. A
    second call on the same axes only updates image and title.

    ``at``: the moment to name in the title, in seconds (default: the end of the step).
    """
    owners = block_owners(step)
    image = map_image(owners)
    if axes.images:
        axes.images[0].set_data(image)
    else:
        rows, columns = image.shape[:2]
        axes.imshow(image, aspect="auto", interpolation="nearest")
        first_blocks = [row * columns for row in range(rows)] if rows > 1 else []
        axes.set_yticks(range(len(first_blocks)), [str(block) for block in first_blocks])
        axes.set_ylabel("first block" if rows > 1 else "")
        axes.grid(False)
        axes.tick_params(length=0, labelsize=8)
    axes.set_title(_map_title(step, owners, strategy, at), loc="left", color=color(strategy))


def _map_title(step: pd.Series, owners: np.ndarray, strategy: str, at: float | None) -> str:
    held = owners[owners >= 0]
    sequences, holes = len(np.unique(held)), int(step["num_holes"])
    return (
        f"{strategy} at {step['ended_at'] if at is None else at:.2f} s: {sequences} "
        f"sequence{'s' * (sequences != 1)} on {len(held)} of "
        f"{len(owners)} blocks, {holes} hole{'s' * (holes != 1)}, external fragmentation "
        f"{step['external_fragmentation']:.2f}"
    )


def block_owners(step: pd.Series) -> np.ndarray:
    """For every block the number of the request that holds it, -1 where free."""
    owners = np.full(int(step["used_blocks"] + step["free_blocks"]), -1)
    for number, start, num_blocks in step["extents"]:
        owners[start : start + num_blocks] = number
    return owners


def map_image(owners: np.ndarray) -> np.ndarray:
    """``[rows, columns, 3]`` colours of at most eight rows: neighbours in time get unlike hues,
    free blocks light grey.
    """
    columns = max(-(-len(owners) // 8), min(len(owners), 64))
    rows = -(-len(owners) // columns)
    image = np.ones((rows * columns, 3))  # white behind the last block
    hues = SEQUENCE_COLORS[np.maximum(owners, 0) % len(SEQUENCE_COLORS)]
    image[: len(owners)] = np.where((owners >= 0)[:, None], hues, 0.93)
    return image.reshape(rows, columns, 3)


def step_at(steps: pd.DataFrame, at: float) -> pd.Series:
    """The last step begun by ``at`` seconds; the first step where none had."""
    begun = steps[steps["started_at"] <= at]
    return begun.iloc[-1] if len(begun) else steps.iloc[0]


def mapped(steps: pd.DataFrame) -> pd.DataFrame:
    """The steps of the first repeat that have a block map; `BadInput` where none has."""
    found = steps[(steps["repeat"] == 0) & steps["extents"].notna()] if "extents" in steps else ()
    if not len(found):
        raise BadInput("no step has a block map: only the package's own strategies have one")
    return found


# --- lengths of runs ------------------------------------------------------------------------------


def lengths_of_runs(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True in a mask, in order."""
    return np.diff(np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]))))[::2]


def run_lengths(steps: pd.DataFrame) -> pd.DataFrame:
    """How many free runs and how many extents of each length there are, on average over time.

    A row a strategy, kind (``free runs``, ``extents``) and power of two: lengths from ``blocks`` to
    less than twice as many, and all longer ones in the last row.
    """
    found = []
    for strategy, part in mapped(steps).groupby("strategy", sort=False):
        counts = {"free runs": np.zeros(NUM_BINS), "extents": np.zeros(NUM_BINS)}
        seconds = part["ended_at"] - part["started_at"]
        for (_, step), weight in zip(part.iterrows(), seconds / seconds.sum(), strict=True):
            counts["free runs"] += weight * _binned(lengths_of_runs(block_owners(step) < 0))
            counts["extents"] += weight * _binned([length for _, _, length in step["extents"]])
        for kind, each in counts.items():
            found += [
                {"strategy": strategy, "kind": kind, "blocks": 2**n, "count": count}
                for n, count in enumerate(each)
            ]
    return pd.DataFrame(found)


def _binned(lengths) -> np.ndarray:
    """``[NUM_BINS]``: how many lengths lie from each power of two to the next; the last bin has no
    upper end.
    """
    bins = np.log2(np.asarray(lengths, dtype=float)).astype(int).clip(max=NUM_BINS - 1)
    return np.bincount(bins, minlength=NUM_BINS)


def run_length_histograms(steps: pd.DataFrame) -> list[Axes]:
    """`run_lengths` as stairs, a line a strategy: free runs left, extents right."""
    lengths = run_lengths(steps)
    _, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), layout="constrained")
    longest = lengths["blocks"][lengths["count"] > 0].max()
    lengths = lengths[lengths["blocks"] <= longest]
    for panel, kind in zip(axes, ("free runs", "extents"), strict=True):
        for part, line in by_strategy(lengths[lengths["kind"] == kind]):
            panel.stairs(part["count"], [*part["blocks"], 2 * longest], linewidth=2, **line)
        log2_axis(panel, [2**n for n in range(int(np.log2(longest)) + 2)])
        panel.set(
            xlabel=f"length of {kind} (blocks)", ylabel=f"{kind} at a time, average", ylim=(0, None)
        )
    legend_above(axes[0], 6)
    return list(axes)


# --- addresses over time --------------------------------------------------------------------------


def address_heat(steps: pd.DataFrame) -> np.ndarray:
    """``[blocks, NUM_TIMES]``: the share of each slice of time in which each block was held, of one
    strategy's steps.
    """
    begin, end = steps["started_at"].min(), steps["ended_at"].max()
    edges = np.linspace(begin, end, NUM_TIMES + 1)
    heat = np.zeros((int(steps["used_blocks"].iloc[0] + steps["free_blocks"].iloc[0]), NUM_TIMES))
    for _, step in steps.iterrows():
        first, last = (
            np.maximum(step["started_at"], edges[:-1]),
            np.minimum(step["ended_at"], edges[1:]),
        )
        heat += np.outer(block_owners(step) >= 0, (last - first).clip(min=0))
    return heat / (edges[1] - edges[0])


def address_heat_map(steps: pd.DataFrame) -> list[Axes]:
    """Which addresses are in use when: a panel a strategy, block address upwards, time to the
    right, dark where held.
    """
    parts = list(mapped(steps).groupby("strategy", sort=False))
    figure, axes = plt.subplots(
        1, len(parts), figsize=(WIDTH, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (strategy, part) in zip(axes[0], parts, strict=True):
        heat = address_heat(part)
        image = panel.imshow(
            heat,
            aspect="auto",
            origin="lower",
            extent=(part["started_at"].min(), part["ended_at"].max(), 0, len(heat)),
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
