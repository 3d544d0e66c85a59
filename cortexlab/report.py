"""What a result says: one page of its own, or what differs between two. Reads `cortexlab.results`, measures nothing."""

import base64
import html
import json
import shlex
from pathlib import Path

import pandas as pd

from . import results
from .errors import BadInput, shown
from .metrics import median_interval

MEASURES = (
    "output_throughput", "request_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms",
    "goodput_2000_100", "goodput_500_30", "token_share", "reserved_share", "internal_share", "external_share", "external_fragmentation",
    "utilization", "extents_per_sequence", "long_extent_share", "prefix_hit_rate", "copied_bytes", "copied_blocks", "peak_kv_bytes",
    "num_preemptions",
)  # fmt: skip
REPEATED = ("param_seed", "seed")  # rows that differ in nothing else are repeats
UNTOLD = ("date", "name", "out", "overwrite", "json")  # differ from run to run and say nothing

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }} th:first-child, td:first-child {{ text-align: left }}
pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto }} .wide {{ overflow-x: auto }}
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
    """``value, low, high`` of each measure by what names a row: strategy, block size, swept parameters.

    Rows that share these are repeats (other seeds): their median and its 95 % interval. A single row brings the interval of its own
    repeats, where it was measured more than once.
    """
    keys = [name for name in ("strategy", "block_size") if name in rows]
    keys += [name for name in rows if name.startswith("param_") and name not in REPEATED and name.removeprefix("param_") not in keys]
    found = []
    for which, part in rows.groupby(keys, dropna=False):
        for measure in (name for name in MEASURES if name in rows):
            values = part[measure].dropna().tolist()
            if not values:
                continue
            given = [part.iloc[0].get(f"{measure}_{end}") for end in ("low", "high")]
            low, high = (median_interval(values) or (None, None)) if len(values) > 1 else given
            found.append((*map(str, which), measure, float(pd.Series(values).median()), low, high))
    return pd.DataFrame(found, columns=[*keys, "measure", "value", "low", "high"]).set_index([*keys, "measure"])


# --- two results --------------------------------------------------------------------------------------------------------------


def comparison(first: Path, second: Path, width: int = 120) -> str:
    """What differs, in lines of at most ``width``: settings, machine, and each measure with both values and their ratio."""
    runs = [results.read(folder) for folder in (first, second)]
    lines = [f"A  {first}", f"B  {second}"]
    told = [_flat(run["run"]) for run in runs]
    for name in sorted(told[0].keys() | told[1].keys()):
        a, b = (each.get(name) for each in told)
        if a != b:
            lines.append(f"{name}: {a} | {b}"[:width])
    tables = [summary(run["rows"]) for run in runs]
    if tables[0].index.names != tables[1].index.names:
        raise BadInput(f"{first} and {second} cannot be compared: their rows are named by {_words(tables[0])} and by {_words(tables[1])}")
    both = tables[0].merge(tables[1], left_index=True, right_index=True, suffixes=("_a", "_b"))
    for letter, table in zip("AB", tables, strict=True):
        if alone := sorted({_name(index) for index in table.index.difference(both.index)}):
            lines.append(f"only in {letter}: {', '.join(alone)}"[:width])
    differ = both[both["value_a"] != both["value_b"]]
    lines += ["", f"{len(both) - len(differ)} of {len(both)} figures are equal" + (";  * intervals apart" if len(differ) else "")]
    if len(differ):
        table = [
            {
                "": " ".join((_name(index), index[-1])), "A": _value(row, "a"), "B": _value(row, "b"),
                "B/A": f"{row['value_b'] / row['value_a']:.3f}" if row["value_a"] else "", " ": "*" * _apart(row),
            }
            for index, row in differ.iterrows()
        ]  # fmt: skip
        lines.append(pd.DataFrame(table).to_string(index=False, justify="right"))
    return "\n".join(lines)


def _flat(run: dict) -> dict:
    """A run's settings and machine, by dotted names."""
    flat = pd.json_normalize({name: run.get(name, {}) for name in ("arguments", "spec", "environment")}).iloc[0].to_dict()
    return {name: str(value) for name, value in flat.items() if name.rpartition(".")[2] not in UNTOLD}


def _name(index: tuple) -> str:
    return " ".join(map(str, index[:-1]))


def _words(table: pd.DataFrame) -> str:
    return ", ".join(table.index.names[:-1])


def _value(row: pd.Series, which: str) -> str:
    low, high = row[f"low_{which}"], row[f"high_{which}"]
    interval = "" if pd.isna(low) else f" [{low:.4g}, {high:.4g}]"
    return f"{row[f'value_{which}']:.4g}{interval}"


def _apart(row: pd.Series) -> bool:
    return bool(row["high_a"] < row["low_b"] or row["high_b"] < row["low_a"])  # False where there is none


# --- one result ---------------------------------------------------------------------------------------------------------------


def write(folder: Path) -> Path:
    """``report.html`` in the folder of a result: all of it in one file, without a link to anywhere."""
    found = results.read(folder)
    run, parts = found["run"], []
    for picture in sorted(folder.glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>{html.escape(picture.stem)}</h2><img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">')
    if "rows" in found:
        table = summary(found["rows"])
        text = pd.Series([_value(row.add_suffix("_a"), "a") for _, row in table.iterrows()], index=table.index)
        shown_table = text.unstack("measure").reindex(columns=[name for name in MEASURES if name in text.index.unique("measure")])
        wide = shown_table.reset_index().to_html(index=False, na_rep="", border=0)
        parts.append(f'<h2>Figures</h2><p>Medians; in brackets a 95 % interval, where there are repeats.</p><div class="wide">{wide}</div>')
    parts.append(f"<h2>How to reproduce it</h2><pre>{html.escape(command(run))}</pre>")
    machine = pd.Series({name: str(value) for name, value in run.get("environment", {}).items()}, name="")
    parts.append(f"<h2>Where it was measured</h2>{machine.to_frame().to_html(header=False, border=0)}")
    target = folder / "report.html"
    with results.replacing(target) as part:
        part.write_text(PAGE.format(title=html.escape(f"{run.get('command', 'result')}: {folder.name}"), body="\n".join(parts)), "utf-8")
    return target


def command(run: dict) -> str:
    """The command line that measures it again, or the sweep file."""
    if "spec" in run:
        return f"cortexlab sweep FILE.yaml    # with this in it, as YAML or JSON:\n{json.dumps(run['spec'], indent=1)}"
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
