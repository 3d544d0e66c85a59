"""Sweeps: a notebook run over a grid of parameters with papermill, its rows collected into one table.

A sweep file is YAML::

    notebook: ../notebooks/00_quickstart.ipynb     # relative to the file
    parameters: {num_requests: 8}                  # the same at every point
    grid: {block_size: [16, 64], ...}              # every combination is a point
    plot: {x: block_size, lines: strategy}         # optional

The notebook leaves its rows where its parameter ``rows_file`` says. A point is named by the SHA-256 of its parameters, the
notebook's code and the package's source; points that are done are skipped.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import yaml
from tqdm import tqdm

from . import results
from .doctor import environment
from .errors import BadInput, shown

ROWS_PARAMETER = "rows_file"
PREFIX = "param_"  # of the swept parameters' columns: a measured column may have the same name


def run(file: Path, out: Path = Path("results"), name: str | None = None) -> int:
    """Run the sweep, print where its table is, and return the exit code: 1 when a point failed."""
    spec = read_spec(file)
    notebook = nbformat.read(spec["notebook"], as_version=4)
    # The finding holds for the notebook's defaults; a sweep asks what happens elsewhere.
    notebook.cells = [cell for cell in notebook.cells if "finding" not in cell.metadata.get("tags", [])]
    target = results.check_target(out, name or file.stem, overwrite=True)
    points = target / "points"
    try:
        points.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"results folder {points} cannot be written: {error.strerror}") from error
    source = source_hash(notebook)
    rows, failed = [], []
    for parameters in tqdm(list(grid_points(spec)), unit="point", disable=None):
        key = hashlib.sha256(json.dumps([parameters, source], sort_keys=True).encode()).hexdigest()[:16]
        done = points / f"{key}.parquet"
        if not done.exists() and not _run_point(notebook, spec["notebook"], parameters, points, key):
            failed.append((parameters, points / f"{key}.failed.ipynb"))
            continue
        swept = {f"{PREFIX}{name}": value for name, value in parameters.items()}
        rows.append(pd.read_parquet(done).assign(point=key, **swept))
    for parameters, left in failed:
        print(f"failed: {parameters}: see {left}")
    if rows:
        _collect(target, spec, pd.concat(rows, ignore_index=True))
        print(f"{len(rows)} points: {target}/rows.parquet" + (f", figure {target}/sweep.png" if "plot" in spec else ""))
    return 1 if failed else 0


def read_spec(file: Path) -> dict:
    """The sweep file, checked against the notebook's own parameters."""
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("notebook"), str) or not isinstance(spec.get("grid"), dict):
        raise BadInput(f"{file} must have `notebook` (a path) and `grid` (parameter: list of values)")
    if unknown := set(spec) - {"notebook", "parameters", "grid", "plot"}:
        raise BadInput(f"{file}: unknown key {sorted(unknown)[0]!r}: use notebook, parameters, grid, plot")
    notebook = (file.parent / spec["notebook"]).resolve()
    if not notebook.is_file():
        raise BadInput(f"{file}: notebook {spec['notebook']} does not exist")
    known = papermill.inspect_notebook(str(notebook))
    if ROWS_PARAMETER not in known:
        raise BadInput(f"{file}: notebook {spec['notebook']} has no parameter {ROWS_PARAMETER}, so it leaves no rows")
    fixed = spec.get("parameters") or {}
    if not isinstance(fixed, dict):
        raise BadInput(f"{file}: parameters must be a mapping, not {shown(fixed)}")
    plot = spec.get("plot", {"x": "", "lines": ""})
    if not isinstance(plot, dict) or not {"x", "lines"} <= set(plot) <= {"x", "lines", "y"}:
        raise BadInput(f"{file}: plot must have x and lines, and may have y, not {shown(plot)}")
    if "plot" in spec and plot["x"] not in spec["grid"]:
        raise BadInput(f"{file}: plot.x must be a parameter of the grid, not {plot['x']!r}")
    for parameter, values in itertools.chain(((p, [v]) for p, v in fixed.items()), spec["grid"].items()):
        if parameter not in known:
            raise BadInput(f"{file}: the notebook has no parameter {parameter!r}: use {', '.join(sorted(known))}")
        if not isinstance(values, list) or not values:
            raise BadInput(f"{file}: grid.{parameter} must be a list of values, not {values!r}")
        wanted = known[parameter]["inferred_type_name"]
        for value in values:
            given = type(value).__name__
            if wanted in ("int", "float", "str", "bool") and given != wanted and (wanted, given) != ("float", "int"):
                raise BadInput(f"{file}: {parameter} must be {wanted}, not {value!r}")
    return spec | {"notebook": notebook, "parameters": fixed}


def grid_points(spec: dict) -> Iterator[dict]:
    """Every combination of the grid's values, with the fixed parameters."""
    names = list(spec["grid"])
    for values in itertools.product(*spec["grid"].values()):
        yield spec["parameters"] | dict(zip(names, values, strict=True))


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the notebook's code cells and of this package's source."""
    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode() + b"\0")
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _run_point(notebook, path: Path, parameters: dict, points: Path, key: str) -> bool:
    body, executed, rows = points / f".{key}.body.ipynb", points / f"{key}.ipynb", points / f".{key}.parquet"
    nbformat.write(notebook, body)
    try:
        papermill.execute_notebook(
            str(body), str(executed), parameters | {ROWS_PARAMETER: str(rows.resolve())}, cwd=str(path.parent),
            progress_bar=False, log_output=False,
        )  # fmt: skip
    except papermill.PapermillExecutionError:
        os.replace(executed, points / f"{key}.failed.ipynb")
        return False
    finally:
        body.unlink(missing_ok=True)
    os.replace(rows, points / f"{key}.parquet")  # last, so that a point is done only when all of it is
    return True


def _collect(target: Path, spec: dict, rows: pd.DataFrame) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from . import plots

    with results.replacing(target / "rows.parquet") as part:
        rows.to_parquet(part, index=False)
    run = {"command": "sweep", "spec": spec | {"notebook": spec["notebook"].name}, "environment": environment()}
    with results.replacing(target / "run.json") as part:
        part.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if "plot" in spec:
        plots.use_style()
        plot = spec["plot"] | {"x": PREFIX + spec["plot"]["x"]}
        with results.replacing(target / "sweep.png") as part:
            plots.sweep_figure(rows, **plot)[0].figure.savefig(part, format="png")
