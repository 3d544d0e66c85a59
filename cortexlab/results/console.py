"""Rows as a table for a terminal."""

from collections.abc import Sequence
from dataclasses import replace

from ..answer import Comparison
from ..metrics import COLUMNS, SHARES, Column


def _columns(*names: str) -> list[Column]:
    return [COLUMNS[name] for name in names]


SHARE_COLUMNS = _columns(*(f"{name}_share" for name in SHARES))
BENCH_COLUMNS = [
    *_columns("strategy", "output_throughput"),
    Column("output_throughput_interval", heading="95 %", drop=4),
    *_columns("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms"),
    *SHARE_COLUMNS,
    *_columns("external_fragmentation", "peak_kv_bytes", "num_preemptions"),
    Column("same", heading="same"),
]
REPLAY_COLUMNS = [
    *_columns("strategy", "block_size"),
    Column("done", heading="done in time", drop=2),
    COLUMNS["mean_ttft_ms"],
    replace(COLUMNS["median_tpot_ms"], heading="median TPOT ms", drop=5),  # beside a mean
    *SHARE_COLUMNS,
    *_columns("utilization", "long_extent_share", "extents_per_sequence", "copied_share"),
    *_columns("prefix_hit_rate", "peak_blocks", "num_preemptions", "seconds"),
]


def replay_table(rows: Sequence[dict], width: int) -> str:
    """The rows of a replay, at most ``width`` characters wide. ``done in time``: the share of
    requests that have finished when the last one arrives.
    """
    shown = [
        row | {"done": f"{row['completed_by_last_arrival'] / row['requests']:.1%}"} for row in rows
    ]
    return _table(REPLAY_COLUMNS, shown, width)


def bench_table(rows: Sequence[dict], width: int) -> str:
    """The rows of a bench run, at most ``width`` characters wide. ``same``: completed requests
    with the reference's tokens, of all completed requests.
    """
    shown = []
    for row in rows:
        low, high = row["output_throughput_low"], row["output_throughput_high"]
        shown.append(
            row
            | {"output_throughput_interval": None if low is None else f"{low:.1f}-{high:.1f}"}
            | {"same": f"{row['requests_identical'] + row['requests_near_tie']}/{row['completed']}"}
        )
    return _table(BENCH_COLUMNS, shown, width)


def difference_table(comparison: Comparison) -> str:
    """Speed of the fastest strategy over each other one's, and mlx-lm's; all pairs are in
    ``run.json``. ``log sd``: standard deviation of the logarithms of the ratios, repeat by repeat.
    """
    best, level = comparison.pooled[0], f"{100 * (1 - comparison.error):.4g} %"
    cells = [["output tokens/s", "ratio", level, "log sd", "verdict"]]
    for name in comparison.speeds:
        if name != best:
            each = comparison.between(best, name)
            ends = f"{each.low:.2f}-{each.high:.2f}"
            sd = f"{each.sd_log_ratio:.3f}"
            cells.append([f"{best} / {name}", f"{each.ratio:.2f}", ends, sd, each.verdict])
    return "\n".join([*lines_of(cells), f"log sd of all together: {comparison.sd_log_ratio:.3f}"])


def _table(columns: Sequence[Column], shown: Sequence[dict], width: int) -> str:
    """Lines of a table without columns of nothing but None, and without the least important columns
    where ``width`` is short.
    """
    columns = [column for column in columns if any(row[column.name] is not None for row in shown)]
    left_out = []
    while True:
        cells = [[column.heading for column in columns]]
        cells += [[column.text(row[column.name]) for column in columns] for row in shown]
        lines = lines_of(cells)
        if max(map(len, lines)) <= width or not any(each.drop for each in columns):
            break
        least = max(columns, key=lambda column: column.drop)
        columns.remove(least)
        left_out.append(least.heading)
    if left_out:
        lines.append(f"(left out for width, kept in rows.parquet: {', '.join(left_out)})")
    return "\n".join(lines)


def lines_of(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, each)) for each in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in cells
    ]
