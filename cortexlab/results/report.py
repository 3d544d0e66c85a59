"""What a result says: one page of its own, or what differs between two. Reads `cortexlab.results`,
measures nothing.
"""

import base64
import html
import shlex
import textwrap
from pathlib import Path

import pandas as pd
import yaml
from PIL import Image

from .. import plots
from ..errors import BadInput, shown
from ..metrics import median_interval
from . import store as results

MEASURES = {  # how a page calls them
    "output_throughput": "output tokens/s",
    "request_throughput": "requests/s",
    "mean_ttft_ms": "TTFT, mean (ms)",
    "median_ttft_ms": "TTFT, median (ms)",
    "p99_ttft_ms": "TTFT, p99 (ms)",
    "median_tpot_ms": "TPOT, median (ms)",
    "p99_itl_ms": "ITL, p99 (ms)",
    "goodput_2000_100": "requests/s in time (2 s, 100 ms)",
    "goodput_500_30": "requests/s in time (500 ms, 30 ms)",
    "token_share": "token share",
    "reserved_share": "reserved share",
    "internal_share": "internal share",
    "external_share": "external share",
    "external_fragmentation": "external fragmentation",
    "utilization": "utilization",
    "extents_per_sequence": "extents a sequence",
    "long_extent_share": "tokens in long extents (share)",
    "prefix_hit_rate": "prefix hits (share)",
    "copied_bytes": "copied (bytes)",
    "copied_blocks": "copied (blocks)",
    "peak_kv_bytes": "peak KV (bytes)",
    "num_preemptions": "preemptions",
}
CAPTIONS = {
    "memory": "KV memory over time",
    "throughput": "Speed and waiting",
    "latency": "Latency",
    "block_map": "Which sequence holds which block",
    "fragmentation": "External fragmentation over time",
    "extents": "Pieces and waiting",
    "block_size": "By block size",
    "sweep": "What was swept",
}
REPEATED = ("param_seed", "seed")  # rows that differ in nothing else are repeats
UNTOLD = ("date", "name", "out", "overwrite", "json")  # differ from run to run and say nothing

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; color: #222;
  margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
td, thead th {{ white-space: nowrap }} .words td {{ text-align: left; white-space: normal }}
pre {{ background: #f5f5f5; padding: .8rem; white-space: pre-wrap }} .wide {{ overflow-x: auto }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def find(name: str, out: Path) -> Path:
    """The folder of a result, given as a path or as its name under ``out``."""
    for folder in (Path(name), out / name):
        if (folder / "run.json").is_file():
            return folder
    raise BadInput(f"no result {shown(name)}: neither {name} nor {out / name} has a run.json")


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """``value, low, high`` of each measure by what names a row: strategy, block size, swept
    parameters.

    Rows that share these are repeats (other seeds): their median and its 95 % interval. A single
    row brings the interval of its own repeats, where it was measured more than once.
    """
    keys = [name for name in ("strategy", "block_size") if name in rows]
    keys += [
        name
        for name in rows
        if name.startswith("param_")
        and name not in REPEATED
        and name.removeprefix("param_") not in keys
    ]
    found = []
    for which, part in rows.astype(
        {name: "Int64" for name in keys if name == "block_size"}
    ).groupby(keys, dropna=False):
        for measure in (name for name in MEASURES if name in rows):
            values = part[measure].dropna().tolist()
            if not values:
                continue
            given = [part.iloc[0].get(f"{measure}_{end}") for end in ("low", "high")]
            low, high = (median_interval(values) or (None, None)) if len(values) > 1 else given
            found.append((*which, measure, float(pd.Series(values).median()), low, high))
    table = pd.DataFrame(found, columns=[*keys, "measure", "value", "low", "high"]).set_index(
        [*keys, "measure"]
    )
    return table.astype(float)  # None is nan


def common(*tables: pd.DataFrame) -> dict:
    """What names the rows of summaries and is the same in all of them."""
    names = pd.concat([table.index.to_frame(index=False) for table in tables]).drop(
        columns=["strategy", "measure"], errors="ignore"
    )
    return {name: names[name].iloc[0] for name in names if names[name].nunique(dropna=False) == 1}


# --- two results ----------------------------------------------------------------------------------


def comparison(first: Path, second: Path, width: int = 120) -> str:
    """What differs, in lines of at most ``width``: settings, machine, and each measure with both
    values and their ratio.
    """
    runs = [results.read(folder) for folder in (first, second)]
    lines = [f"A  {first}", f"B  {second}"]
    told = [_flat(run["run"]) for run in runs]
    for name in sorted(told[0].keys() | told[1].keys()):
        a, b = (each.get(name) for each in told)
        if a != b:
            lines += _wrapped(f"{name}: {a} | {b}", width)
    tables = [summary(run["rows"]) for run in runs]
    if tables[0].index.names != tables[1].index.names:
        raise BadInput(
            f"{first} and {second} cannot be compared: their rows are named by {_words(tables[0])} "
            f"and by {_words(tables[1])}"
        )
    same = common(*tables)
    both = tables[0].merge(tables[1], left_index=True, right_index=True, suffixes=("_a", "_b"))
    for letter, table in zip("AB", tables, strict=True):
        if alone := sorted(
            {_name(table, index, same) for index in table.index.difference(both.index)}
        ):
            lines += _wrapped(f"only in {letter}: {'; '.join(alone)}", width)
    differ = both[both["value_a"] != both["value_b"]]
    lines += [
        "",
        f"{len(both) - len(differ)} of {len(both)} figures are equal"
        + (";  * intervals apart" if len(differ) else ""),
    ]
    for digits, interval in (
        (4, True),
        (3, True),
        (3, False),
    ):  # the first that fits, or else the last
        table = _differences(differ, same, digits, interval)
        if max(map(len, table), default=0) <= width:
            break
    return "\n".join(lines + table + ["intervals left out for width"] * (not interval))


def _differences(differ: pd.DataFrame, same: dict, digits: int, interval: bool) -> list[str]:
    """The lines of a table: what names the rows, and below it their measures."""
    cells, heads = [("", "A", "B", "B/A")], {}
    for index, row in differ.iterrows():
        heads.setdefault(_name(differ, index, same), len(cells))
        ratio = f"{row['value_b'] / row['value_a']:.3f}" if row["value_a"] else "-"
        cells.append(
            (
                f"  {index[-1]}",
                *(_value(row, end, digits, interval) for end in "ab"),
                ratio + (" *" if _apart(row) else "  "),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    lines = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in cells
    ]
    for head, at in reversed(heads.items()):
        lines.insert(at, head)
    return [line.rstrip() for line in lines] if heads else []


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ")


def _flat(run: dict) -> dict:
    """A run's settings and machine, by dotted names."""
    flat = (
        pd.json_normalize(
            {name: run.get(name, {}) for name in ("arguments", "spec", "environment")}
        )
        .iloc[0]
        .to_dict()
    )
    return {
        name: str(value) for name, value in flat.items() if name.rpartition(".")[2] not in UNTOLD
    }


def _name(table: pd.DataFrame, index: tuple, same: dict) -> str:
    """What names a row, without what names all of them."""
    told = {
        name: value
        for name, value in zip(table.index.names[:-1], index[:-1], strict=True)
        if name not in same and pd.notna(value)
    }
    return ", ".join(
        str(value) if name == "strategy" else f"{name.removeprefix('param_')} {value}"
        for name, value in told.items()
    )


def _words(table: pd.DataFrame) -> str:
    return ", ".join(table.index.names[:-1])


def _value(row: pd.Series, which: str, digits: int = 4, interval: bool = True) -> str:
    value, low, high = (row[f"{name}_{which}"] for name in ("value", "low", "high"))
    return _number(value, digits) + (
        ""
        if pd.isna(low) or not interval
        else f" [{_number(low, digits)}, {_number(high, digits)}]"
    )


def _number(value: float, digits: int) -> str:
    """Without an exponent where that is still readable."""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e15 else f"{value:.{digits}g}"


def _apart(row: pd.Series) -> bool:
    return bool(
        row["high_a"] < row["low_b"] or row["high_b"] < row["low_a"]
    )  # False where there is none


# --- one result -----------------------------------------------------------------------------------


def write(folder: Path) -> Path:
    """Write ``report.html`` into a result's folder: one file, no links."""
    found = results.read(folder)
    run, parts = found["run"], []
    if "recommendation" in run:
        parts.append(f"<p><b>{html.escape(run['recommendation'])}</b></p>")
    for picture in sorted(
        folder.glob("*.png"), key=lambda path: [*CAPTIONS, path.stem].index(path.stem)
    ):
        data = base64.b64encode(picture.read_bytes()).decode()
        caption = html.escape(CAPTIONS.get(picture.stem, picture.stem))
        with Image.open(picture) as image:
            width = min(
                1.0, image.width / (plots.WIDTH * plots.STYLE["savefig.dpi"])
            )  # letters of one size on all
        parts.append(
            f'<h2>{caption}</h2><img alt="{caption}" style="width:{width:.0%}" '
            f'src="data:image/png;base64,{data}">'
        )
    if "rows" in found:
        parts.append(_figures(summary(found["rows"])))
    parts.append(f"<h2>How to reproduce it</h2><pre>{html.escape(command(run))}</pre>")
    where = run.get("environment", {}) | (
        run["arguments"] if "spec" in run else {}
    )  # of a sweep, how many points at once
    machine = pd.Series(
        {name: str(value) for name, value in where.items() if value is not None}, name=""
    )
    parts.append(
        f"<h2>Where it was measured</h2>"
        f'<div class="words">{machine.to_frame().to_html(header=False, border=0)}</div>'
    )
    target = folder / "report.html"
    with results.replacing(target) as part:
        part.write_text(
            PAGE.format(
                title=html.escape(f"{run.get('command', 'result')}: {folder.name}"),
                body="\n".join(parts),
            ),
            "utf-8",
        )
    return target


def _figures(table: pd.DataFrame) -> str:
    """The summary as HTML: a row for what names it, a column a measure."""
    same = common(table)
    cells = pd.Series(
        [_value(row.add_suffix("_a"), "a") for _, row in table.iterrows()], index=table.index
    )
    wide = cells.unstack("measure").reindex(
        columns=[name for name in MEASURES if name in cells.index.unique("measure")]
    )
    wide = (
        wide.rename(columns=MEASURES)
        .reset_index()
        .drop(columns=list(same))
        .rename(columns=lambda name: name.removeprefix("param_"))
    )
    told = (
        "; the same in all rows: "
        + ", ".join(f"{name.removeprefix('param_')} {value}" for name, value in same.items())
        if same
        else ""
    )
    wide = wide.rename_axis(columns=None)
    words = (
        "Medians; in brackets a 95 % interval of the median by bootstrap, where there are "
        f"repeats{html.escape(told)}."
    )
    table = wide.to_html(index=False, na_rep="", border=0)
    return f'<h2>Figures</h2><p>{words}</p><div class="wide">{table}</div>'


def command(run: dict) -> str:
    """The command line that measures it again, or the sweep file."""
    if "spec" in run:
        beside = " beside the notebook" if "notebook" in run["spec"] else ""
        return (
            "cortexlab sweep FILE.yaml    # which is "
            f"this{beside}:\n\n{yaml.safe_dump(run['spec'], sort_keys=False)}"
        )
    words = ["cortexlab", run["command"]]
    for name, value in run.get("arguments", {}).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False and name not in UNTOLD:
            words += [option, str(value)]
        elif value is False and name == "ignore_eos":
            words.append("--no-ignore-eos")
    return shlex.join(words)
