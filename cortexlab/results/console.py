"""Rows as a table for a terminal."""

from collections.abc import Callable, Sequence

MIB = 1 << 20


def _percent(value: float) -> str:
    return f"{value:.1%}"


Column = tuple[
    str, str, Callable, int
]  # heading, field, how to write it, and what goes first where it is narrow: the larger
SHARE_COLUMNS: Sequence[Column] = (
    ("token", "token_share", _percent, 0),
    ("reserv", "reserved_share", _percent, 2),
    ("intern", "internal_share", _percent, 0),
    ("extern", "external_share", _percent, 0),
)
BENCH_COLUMNS: Sequence[Column] = (
    ("strategy", "strategy", str, 0),
    ("tok/s", "output_throughput", lambda v: f"{v:.1f}", 0),
    ("95 %", "output_throughput_interval", str, 4),
    ("TTFT s", "median_ttft_ms", lambda v: f"{v / 1000:.2f}", 1),
    ("p99", "p99_ttft_ms", lambda v: f"{v / 1000:.2f}", 5),
    ("TPOT ms", "median_tpot_ms", lambda v: f"{v:.0f}", 1),
    ("ITL p99", "p99_itl_ms", lambda v: f"{v:.0f}", 6),
    *SHARE_COLUMNS,
    ("frag", "external_fragmentation", lambda v: f"{v:.2f}", 3),
    ("peak MiB", "peak_kv_bytes", lambda v: f"{v / MIB:.0f}", 0),
    ("preempt", "num_preemptions", str, 7),
    ("same", "same", str, 0),
)
REPLAY_COLUMNS: Sequence[Column] = (
    ("strategy", "strategy", str, 0),
    ("block", "block_size", str, 0),
    ("done in time", "done", str, 2),
    (
        "mean TTFT s",
        "mean_ttft_ms",
        lambda v: f"{v / 1000:.3g}" if v < 1e5 else f"{v / 1000:,.0f}",
        0,
    ),
    ("median TPOT ms", "median_tpot_ms", lambda v: f"{v:.0f}", 5),
    *SHARE_COLUMNS,
    ("util", "utilization", lambda v: f"{v:.3f}", 1),
    ("long", "long_extent_share", _percent, 0),
    ("ext/seq", "extents_per_sequence", lambda v: f"{v:.1f}", 0),
    ("copied", "copied_share", _percent, 1),
    ("hits", "prefix_hit_rate", lambda v: f"{v:.2%}", 0),
    ("peak", "peak_blocks", str, 4),
    ("preempt", "num_preemptions", str, 6),
    ("s", "seconds", lambda v: f"{v:.1f}", 7),
)


def replay_table(rows: Sequence[dict], width: int) -> str:
    """The rows of a replay, at most ``width`` characters wide. ``done in time``: finished when the
    last request arrives.
    """
    shown = [
        row | {"done": f"{row['completed_by_last_arrival'] / row['requests']:.1%}"} for row in rows
    ]
    return _table(REPLAY_COLUMNS, shown, width)


def bench_table(rows: Sequence[dict], width: int) -> str:
    """The rows of a bench run, at most ``width`` characters wide. ``same``: requests with the
    reference's tokens, of those completed.
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


def _table(columns: Sequence[Column], shown: Sequence[dict], width: int) -> str:
    """Columns that nobody has a value for are left out, and those that do not fit, the least
    important first.
    """
    columns = [column for column in columns if any(row[column[1]] is not None for row in shown)]
    left_out = []
    while True:
        cells = [[heading for heading, *_ in columns]]
        cells += [
            ["-" if row[name] is None else write(row[name]) for _, name, write, _ in columns]
            for row in shown
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        if sum(widths) + 2 * (len(widths) - 1) <= width or not any(drop for *_, drop in columns):
            break
        left_out.append(max(columns, key=lambda column: column[3]))
        columns.remove(left_out[-1])
    table = "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
    return table + (
        "\n(left out for width, kept in rows.parquet: "
        f"{', '.join(heading for heading, *_ in left_out)})"
        if left_out
        else ""
    )
