"""One page about a result, or what differs between two results. Reads stored results, measures
nothing.
"""

import base64
import html
import shlex
import textwrap
from contextlib import suppress
from pathlib import Path

import pandas as pd
import yaml
from PIL import Image

from ..errors import BadInput, shown
from ..metrics import COLUMNS, PREFIX, median_interval
from ..options import as_option
from . import store
from .console import lines_of

MEASURES = {  # what a page shows, in the page's order: output tokens/s, then the table's order
    name: COLUMNS[name].label for name in ("output_throughput", *COLUMNS) if COLUMNS[name].words
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
WORKLOAD = ("trace", "workload", "requests", "num_requests", "seed", "scale_lengths")
WORKLOAD += ("shuffle_lengths", "input_len", "output_len", "range_ratio", "prompts")
WORKLOAD += ("request_rate", "burstiness", "trace_block")
TOKENS = ("total_input_tokens", "total_output_tokens")
SEED = f"{PREFIX}seed"  # rows that differ in their seed alone are repeats
UNTOLD = ("date", "name", "out", "overwrite", "json")  # settings that change no figure

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
        with suppress(OSError, ValueError):  # a name that no file can have
            if (folder / "run.json").is_file():
                return folder
    beside = shown(str(out / name))
    raise BadInput(f"no result {shown(name)}: neither it nor {beside} has a run.json")


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """``value, low, high`` of each measure by what names a row: strategy, block size, swept
    parameters.

    Rows of one name are repeats (other seeds): their median and its 95 % interval. A single row
    brings the interval of its own repeats, where it was measured more than once.
    """
    rows, keys = _named(rows)
    found, numbers = [], rows.select_dtypes("number")
    measures = [name for name in MEASURES if name in numbers]
    for which, part in rows.groupby(keys, dropna=False):
        for measure in measures:
            values = part[measure].dropna()
            if values.empty:
                continue
            ends = [f"{measure}_{end}" for end in ("low", "high")]
            low, high = (part[end].iloc[0] if end in numbers else None for end in ends)
            if len(values) > 1:
                low, high = median_interval(values)
            found.append((*which, measure, values.median(), low, high))
    index = [*keys, "measure"]
    table = pd.DataFrame(found, columns=[*index, "value", "low", "high"]).set_index(index)
    return table.astype(float)  # None becomes NaN


def _named(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """``rows``, and the columns that name a row."""
    keys = [name for name in ("strategy", "block_size") if name in rows]
    keys += [
        name
        for name in rows
        if name.startswith(PREFIX) and name != SEED and _bare(name) not in keys
    ]
    if not keys:  # nothing but a seed differs: all rows are repeats
        rows, keys = rows.assign(rows="all"), ["rows"]
    if "block_size" in keys:
        rows = rows.astype({"block_size": "Int64"})  # whole numbers beside mlx-lm's null
    return rows, keys


def common(*tables: pd.DataFrame) -> dict:
    """The part of the names of summaries' rows that all rows share."""
    names = pd.concat([table.index.to_frame(index=False) for table in tables]).drop(
        columns=["strategy", "measure"], errors="ignore"
    )
    return {name: names[name].iloc[0] for name in names if names[name].nunique(dropna=False) == 1}


# --- two results ----------------------------------------------------------------------------------


def comparison(first: Path, second: Path, width: int = 120) -> str:
    """What differs, in lines of at most ``width``: settings, machine, and each measure with both
    values and their ratio.
    """
    with store.named_if_damaged(f"{first} or {second}"):
        return _comparison(first, second, width)


def _comparison(first: Path, second: Path, width: int) -> str:
    a, b = store.read(first), store.read(second)
    lines = [f"A  {first}", f"B  {second}", *_settings(a["run"], b["run"], width)]
    for folder, run in ((first, a), (second, b)):
        if "rows" not in run:
            raise BadInput(f"{folder} has no rows.parquet, so there is nothing to compare")
    tables = [summary(run["rows"]) for run in (a, b)]
    names = [", ".join(table.index.names[:-1]) for table in tables]
    if names[0] != names[1]:
        raise BadInput(
            f"{first} and {second} cannot be compared: their rows are named by {names[0]} and by "
            f"{names[1]}"
        )
    same = common(*tables)
    both = tables[0].merge(tables[1], left_index=True, right_index=True, suffixes=("_a", "_b"))
    for letter, table, other in zip("AB", tables, reversed(tables), strict=True):
        if alone := _missing(table, other, same):
            lines += _wrapped(f"only in {letter}: {'; '.join(alone)}", width)
    if unlike := _unlike_work(a, b):
        lines += _wrapped(
            f"WARNING: the workloads differ ({', '.join(unlike)}), so the figures are of different "
            "work",
            width,
        )
    differ = both[both["value_a"] != both["value_b"]]
    lines += [
        "",
        f"{len(both) - len(differ)} of {len(both)} figures are equal"
        + (";  * intervals apart" if len(differ) else ""),
    ]
    for digits, interval in ((4, True), (3, True), (3, False)):  # the first that fits, or the last
        table = _differences(differ, same, digits, interval)
        if max(map(len, table), default=0) <= width:
            break
    return "\n".join(lines + table + ["intervals left out for width"] * (not interval))


def _missing(table: pd.DataFrame, other: pd.DataFrame, same: dict) -> list[str]:
    """What ``other`` lacks: the name of a row, or of a row and its measures where only those are
    missing.
    """
    rows = {index[:-1] for index in _keys(other)}
    missing, known = {}, set(_keys(other))
    for index, key in zip(table.index, _keys(table), strict=True):
        if key not in known:
            measures = missing.setdefault(_name(table, index, same), [])
            measures += [key[-1]] if key[:-1] in rows else []
    return sorted(f"{name} {', '.join(measures)}".strip() for name, measures in missing.items())


def _keys(table: pd.DataFrame) -> list[tuple]:
    """The index of a summary; a missing value is None, which equals itself."""
    return [tuple(None if pd.isna(each) else each for each in index) for index in table.index]


def _unlike_work(first: dict, second: dict) -> list[str]:
    """What shows that two results are of different workloads: settings, totals of tokens."""
    a, b = _flat(first["run"]), _flat(second["run"])
    unlike = []
    for name in sorted(a.keys() | b.keys()):
        given = {run.get(name, "None") for run in (a, b)}
        if name.rpartition(".")[2] in WORKLOAD and len(given) == 2 and given != {"None", "False"}:
            unlike.append(name.rpartition(".")[2])
    for name in TOKENS:
        if all(name in run["rows"] for run in (first, second)):
            both = pd.merge(
                *(_totals(run["rows"], name) for run in (first, second)),
                left_index=True,
                right_index=True,
            ).dropna()
            unlike += [name] if (both.iloc[:, 0] != both.iloc[:, 1]).any() else []
    return list(dict.fromkeys(unlike))


def _totals(rows: pd.DataFrame, name: str) -> pd.Series:
    """The median of a total, by row."""
    rows, keys = _named(rows)
    return rows.groupby(keys, dropna=False)[name].median()


def _settings(first: dict, second: dict, width: int) -> list[str]:
    """Lines of the settings and machine facts that two runs do not share."""
    a, b = _flat(first), _flat(second)
    lines = []
    for name in sorted(a.keys() | b.keys()):
        if a.get(name, "None") != b.get(name, "None"):
            lines += _wrapped(f"{name}: {a.get(name)} | {b.get(name)}", width)
    return lines


def _differences(differ: pd.DataFrame, same: dict, digits: int, interval: bool) -> list[str]:
    """The lines of a table: a name, and below it the measures of the rows of that name."""
    cells, heads = [("", "A", "B", "B/A")], {}
    for index, row in differ.iterrows():
        heads.setdefault(_name(differ, index, same), len(cells))
        ratio = f"{row['value_b'] / row['value_a']:.3f}" if row["value_a"] else "-"
        cells.append(
            (
                f"  {index[-1]}",
                *(_value(row, end, digits, interval) for end in ("_a", "_b")),
                ratio + (" *" if _apart(row) else "  "),
            )
        )
    lines = lines_of(cells)
    for head, at in reversed(heads.items()):
        lines.insert(at, head)
    return lines if heads else []


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ")


def _flat(run: dict) -> dict:
    """A run's settings and machine, by dotted names."""
    told = {name: run.get(name, {}) for name in ("arguments", "spec", "environment")}
    flat = pd.json_normalize(told).iloc[0]
    return {
        name: str(value) for name, value in flat.items() if name.rpartition(".")[2] not in UNTOLD
    }


def _name(table: pd.DataFrame, index: tuple, same: dict) -> str:
    """A row's name, without the part that all rows share."""
    told = {
        name: value
        for name, value in zip(table.index.names[:-1], index[:-1], strict=True)
        if name not in same and pd.notna(value)
    }
    return ", ".join(
        str(value) if name == "strategy" else f"{_bare(name)} {value}"
        for name, value in told.items()
    )


def _bare(name: str) -> str:
    """A swept parameter's own name."""
    return name.removeprefix(PREFIX)


def _value(row: pd.Series, end: str = "", digits: int = 4, interval: bool = True) -> str:
    """A measure and its interval; ``end``: `_a` or `_b` where the row holds two results."""
    value, low, high = (row[f"{name}{end}"] for name in ("value", "low", "high"))
    if pd.isna(low) or not interval:
        return _number(value, digits)
    return f"{_number(value, digits)} [{_number(low, digits)}, {_number(high, digits)}]"


def _number(value: float, digits: int) -> str:
    """Text without an exponent where that is still readable."""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e15 else f"{value:.{digits}g}"


def _apart(row: pd.Series) -> bool:
    """Whether two intervals do not touch; False where one is missing (NaN)."""
    return bool(row["high_a"] < row["low_b"] or row["high_b"] < row["low_a"])


# --- one result -----------------------------------------------------------------------------------


def write(folder: Path) -> Path:
    """Write ``report.html`` into a result's folder: one file, no links."""
    with store.named_if_damaged(folder):
        return _write(folder)


def _write(folder: Path) -> Path:
    found = store.read(folder)
    run, parts = found["run"], []
    if "recommendation" in run:
        parts.append(f"<p><b>{html.escape(run['recommendation'])}</b></p>")
    if pairs := run.get("differences", {}).get("pairs"):
        parts.append(_speeds(pairs, run["differences"]["level"]))
    order = [*CAPTIONS]
    for picture in sorted(
        folder.glob("[!.]*.png"), key=lambda path: [*order, path.stem].index(path.stem)
    ):
        parts.append(_picture(picture))
    if "rows" in found:
        parts.append(_figures(summary(found["rows"])))
    if failed := run.get("points", {}).get("failed"):
        parts.append(_failed(failed, run["points"]["done"]))
    parts.append(f"<h2>How to reproduce it</h2><pre>{html.escape(command(run))}</pre>")
    parts.append(f"<h2>Where it was measured</h2>{_machine(run)}")
    title = html.escape(f"{run.get('command', 'result')}: {folder.name}")
    target = folder / "report.html"
    store.replace_text(target, PAGE.format(title=title, body="\n".join(parts)))
    return target


def _failed(failed: list[dict], num_done: int) -> str:
    """The points of a sweep that failed, and why."""
    lines = "".join(
        f"<li>{html.escape(shown(each['parameters']))}: {html.escape(each['error'])}</li>"
        for each in failed
    )
    head = f"{len(failed)} of {len(failed) + num_done} points failed"
    return f"<h2>{head}</h2><ul>{lines}</ul>"


def _picture(file: Path) -> str:
    """A figure as HTML that holds its own data, so wide that the letters of all figures have one
    size.
    """
    data = base64.b64encode(file.read_bytes()).decode()
    caption = html.escape(CAPTIONS.get(file.stem, file.stem))
    with store.named_if_damaged(file), Image.open(file) as image:
        pixels = image.width
    plots = store.loaded_plots()
    width = min(1.0, pixels / (plots.WIDTH * plots.STYLE["savefig.dpi"]))
    return (
        f'<h2>{caption}</h2><img alt="{caption}" style="width:{width:.0%}" '
        f'src="data:image/png;base64,{data}">'
    )


def _machine(run: dict) -> str:
    """The environment as HTML; for a sweep, how many points ran at once too."""
    where = run.get("environment", {}) | (run["arguments"] if "spec" in run else {})
    known = {name: str(value) for name, value in where.items() if value is not None}
    table = pd.Series(known, name="").to_frame().to_html(header=False, border=0)
    return f'<div class="words">{table}</div>'


def _speeds(pairs: list[dict], level: float) -> str:
    """Speeds of all pairs as HTML."""
    cells = pd.DataFrame(
        {
            "output tokens/s": f"{each['strategy']} / {each['against']}",
            "ratio": f"{each['ratio']:.2f} [{each['low']:.2f}, {each['high']:.2f}]",
            "sd of its logarithm": f"{each['sd_log_ratio']:.3f}",
            "verdict": each["verdict"],
        }
        for each in pairs
    ).to_html(index=False, border=0)
    return (
        "<h2>Differences in speed</h2><p>Geometric means of ratios repeat by repeat; in brackets "
        f'intervals that hold together, at {100 * level:.4g} %.</p><div class="wide">{cells}</div>'
    )


def _figures(table: pd.DataFrame) -> str:
    """The summary as HTML: a line for each row's name, a column for each measure."""
    same = common(table)
    wide = table.apply(_value, axis=1).unstack("measure")
    wide = wide.reindex(columns=[name for name in MEASURES if name in wide])
    wide = wide.rename(columns=MEASURES).rename_axis(columns=None)
    wide = wide.reset_index().drop(columns=list(same)).rename(columns=_bare)
    told = ", ".join(f"{_bare(name)} {value}" for name, value in same.items())
    told = html.escape(f"; the same in all rows: {told}" if told else "")
    # Block sizes are whole numbers, also beside mlx-lm's null.
    wide = wide.convert_dtypes().astype(object)
    cells = wide.where(wide.notna(), "").to_html(index=False, border=0)
    return (
        "<h2>Figures</h2><p>Medians; in brackets a 95 % interval of the median by bootstrap, where "
        f'there are repeats{told}.</p><div class="wide">{cells}</div>'
    )


def command(run: dict) -> str:
    """The command line that measures a result again, or the sweep file."""
    if "spec" in run:
        beside = " beside the notebook" if "notebook" in run["spec"] else ""
        return (
            "cortexlab sweep FILE.yaml    # which is "
            f"this{beside}:\n\n{yaml.safe_dump(run['spec'], sort_keys=False)}"
        )
    words = ["cortexlab", run.get("command", "")]
    for name, value in run.get("arguments", {}).items():
        if value is True:
            words.append(as_option(name))
        elif value is not None and value is not False and name not in UNTOLD:
            words += [as_option(name), str(value)]
        elif value is False and name == "ignore_eos":
            words.append("--no-ignore-eos")
    return shlex.join(words)
