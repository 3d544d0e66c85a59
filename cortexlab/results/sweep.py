"""Sweeps: a notebook, or a replay, over a grid of parameters; every point's rows in one table.
Killed at any moment, it goes on.

A sweep file is YAML::

    notebook: ../notebooks/00_quickstart.ipynb     # relative to the file; or function: replay
    parameters: {num_requests: 8}                  # the same at every point
    grid: {block_size: [16, 64], ...}              # every combination is a point
    plot: {x: block_size, lines: strategy}         # optional

A point is named by the SHA-256 of its parameters, the notebook's code, the package's source and the
trace's content, and is done when ``points/<name>.parquet`` is there: only this process writes it,
last of all, by a rename. So a sweep that was killed runs only what is not done, an edited allocator
makes all points new, and no half file is ever read. ``rows.parquet`` is sorted by point and has
nothing in it that differs from run to run of a replay; what the wall clock said is in
``timings.parquet``.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import yaml
from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm

from ..bench.doctor import environment
from ..errors import BadInput, at_least, shown
from ..workloads.traces import find_trace
from . import store as results
from . import sweep_worker as points
from .sweep_worker import ROWS_PARAMETER, Function, Notebook, Outcome

FUNCTIONS = {"replay": Function(points.replay)}
PREFIX = "param_"  # of the swept parameters' columns: a measured column may have the same name
MOST_TOLD = 10  # failed points
KEYS = ("notebook", "function", "parameters", "grid", "plot")
CLOCKED = ("seconds", "point_seconds")  # of any point
MEASURED = re.compile(  # of a bench run, where shares are weighted by the time they lasted
    r"(duration|(?!param_).*(_throughput|_ms|_share)|external_fragmentation|num_holes|median_host_us)(_low|_high)?"
)


@dataclass(frozen=True, slots=True)
class Point:
    name: str
    parameters: dict

    @property
    def columns(self) -> dict:
        return {"point": self.name} | {
            f"{PREFIX}{name}": value for name, value in self.parameters.items()
        }


def run(
    file: Path,
    out: Path = Path("results"),
    name: str | None = None,
    *,
    jobs: int = 1,
    dask: str | None = None,
    retry: bool = False,
) -> int:
    """Run the sweep, print where its tables are, and return the exit code: 1 when a point failed.

    ``jobs``: processes, among which the BLAS's threads are divided. ``dask``: a scheduler's address
    instead. ``retry``: points that failed before are run again; else they are left as they are.
    """
    at_least("jobs", jobs, 1)
    spec = read_spec(file)
    if "notebook" in spec:
        # The finding holds for the notebook's defaults; a sweep asks what happens elsewhere.
        notebook = nbformat.read(spec["notebook"], as_version=4)
        notebook.cells = [
            cell for cell in notebook.cells if "finding" not in cell.metadata.get("tags", [])
        ]
        work = Notebook(nbformat.writes(notebook), str(spec["notebook"].parent))
    else:
        work = FUNCTIONS[spec["function"]]
    grid = named(spec, work)
    target = results.check_target(out, name or file.stem, overwrite=True)
    folder = target / "points"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"results folder {folder} cannot be written: {error.strerror}") from error
    with results.alone(target):
        return _run_all(target, folder, spec, work, grid, {"jobs": jobs, "dask": dask}, retry)


def _run_all(
    target: Path,
    folder: Path,
    spec: dict,
    work: Notebook | Function,
    grid: list[Point],
    how: dict,
    retry: bool,
) -> int:
    """Run what is not done, tell of it, and collect what is: the exit code."""
    done = [point for point in grid if _rows_of(folder, point).exists()]
    skipped = done + [point for point in grid if not retry and _error_of(folder, point).exists()]
    coming = [point for point in grid if point not in skipped]
    with contextlib.closing(outcomes(work, coming, **how)) as found:
        for point, outcome in tqdm(
            found, total=len(grid), initial=len(skipped), unit="point", disable=None
        ):
            _keep(folder, point, outcome)
    failed = [point for point in grid if not _rows_of(folder, point).exists()]
    for point in failed[:MOST_TOLD]:
        where = _notebook_of(folder, point, failed=True)
        print(
            f"failed: {point.parameters}: "
            f"{points.last_line(_error_of(folder, point).read_text(encoding='utf-8'))}"
        )
        print(
            f"        see {where if where.exists() else _error_of(folder, point)}; --retry runs it "
            "again"
        )
    if len(failed) > MOST_TOLD:
        print(f"and {len(failed) - MOST_TOLD} more: {folder}/*.error.txt")
    if len(failed) < len(grid):
        _collect(target, folder, spec, how, [point for point in grid if point not in failed])
        figure = f", figure {target}/sweep.png" if "plot" in spec else ""
        num_done = len(grid) - len(failed)
        print(
            f"{num_done} point{'s' * (num_done != 1)} ({len(done)} done before): "
            f"{target}/rows.parquet{figure}"
        )
    return 1 if failed else 0


def outcomes(
    work: Notebook | Function, coming: list[Point], jobs: int, dask: str | None
) -> Iterator[tuple[Point, Outcome]]:
    """Each point with what became of it, as they end."""
    with contextlib.ExitStack() as stack:
        if dask is not None:
            try:
                from distributed import Client
            except ImportError as error:
                raise BadInput(
                    "--dask needs the package distributed: pip install 'cortexlab[dask]'"
                ) from error
            try:
                stack.enter_context(Client(dask, timeout="20s"))
            except (OSError, ValueError) as error:
                raise BadInput(f"no Dask scheduler answers at {shown(dask)}") from error
            stack.enter_context(parallel_config(backend="dask"))
            jobs = -1
        elif jobs > 1:
            stack.enter_context(
                parallel_config(backend="loky", inner_max_num_threads=max(1, cpu_count() // jobs))
            )
        parallel = Parallel(
            n_jobs=jobs, batch_size=1, return_as="generator_unordered" if jobs != 1 else "generator"
        )
        yield from parallel(delayed(_run)(work, point) for point in coming)


def _run(work: Notebook | Function, point: Point) -> tuple[Point, Outcome]:
    try:
        here = name_of(work, point.parameters)
    except BadInput as error:  # a trace that only the machine has where the sweep was started
        return point, Outcome(0.0, error=str(error))
    if here != point.name:
        return point, Outcome(
            0.0,
            error=(
                "not run: the package's source or the trace is not what it was where and when the "
                "sweep was started"
            ),
        )
    return point, work(point.parameters)


# --- the sweep file -------------------------------------------------------------------------------


def read_spec(file: Path) -> dict:
    """The sweep file, checked against the parameters of its notebook or function."""
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
    if (
        not isinstance(spec, dict)
        or not isinstance(spec.get("grid"), dict)
        or ("notebook" in spec) == ("function" in spec)
    ):
        raise BadInput(
            f"{file} must have `notebook` (a path) or `function`, and `grid` (parameter: list of "
            "values)"
        )
    if unknown := set(spec) - set(KEYS):
        raise BadInput(
            f"{file}: unknown key {shown(sorted(map(str, unknown))[0])}: use {', '.join(KEYS)}"
        )
    if "notebook" in spec:
        spec["notebook"] = (file.parent / str(spec["notebook"])).resolve()
        known = _notebook_parameters(file, spec["notebook"])
    else:
        if spec["function"] not in list(FUNCTIONS):
            raise BadInput(
                f"{file}: unknown function {shown(spec['function'])}: use {', '.join(FUNCTIONS)}"
            )
        known = {name: kind.__name__ for name, kind in FUNCTIONS[spec["function"]].known().items()}
    fixed = spec.get("parameters") or {}
    if not isinstance(fixed, dict):
        raise BadInput(f"{file}: parameters must be a mapping, not {shown(fixed)}")
    if both := sorted(map(str, set(fixed) & set(spec["grid"]))):
        raise BadInput(f"{file}: {both[0]} is in parameters and in grid")
    if "plot" in spec:
        _check_plot(file, spec["plot"], spec["grid"])
    for parameter, values in itertools.chain(
        ((p, [v]) for p, v in fixed.items()), spec["grid"].items()
    ):
        _check_values(file, known, parameter, values)
    return spec | {"parameters": fixed}


def _notebook_parameters(file: Path, notebook: Path) -> dict[str, str]:
    if not notebook.is_file():
        raise BadInput(f"{file}: notebook {notebook.name} does not exist")
    known = {
        name: each["inferred_type_name"]
        for name, each in papermill.inspect_notebook(str(notebook)).items()
    }
    if known.pop(ROWS_PARAMETER, None) is None:
        raise BadInput(
            f"{file}: notebook {notebook.name} has no parameter {ROWS_PARAMETER}, so it leaves no "
            "rows"
        )
    return known


def _check_values(file: Path, known: dict[str, str], parameter: str, values: list) -> None:
    if parameter not in known:
        raise BadInput(
            f"{file}: there is no parameter {shown(parameter)}: use {', '.join(sorted(known))}"
        )
    if not isinstance(values, list) or not values:
        raise BadInput(f"{file}: grid.{parameter} must be a list of values, not {shown(values)}")
    wanted = known[parameter]
    for value in values:
        given = type(value).__name__
        if (
            wanted in ("int", "float", "str", "bool")
            and given != wanted
            and (wanted, given) != ("float", "int")
        ):
            raise BadInput(f"{file}: {parameter} must be {wanted}, not {shown(value)}")


def _check_plot(file: Path, plot: dict, grid: dict) -> None:
    words = {"x": str, "lines": str, "y": list}
    if not isinstance(plot, dict) or not {"x", "lines"} <= set(plot) <= set(words):
        raise BadInput(f"{file}: plot must have x and lines, and may have y, not {shown(plot)}")
    for name, value in plot.items():
        if (
            not isinstance(value, words[name])
            or not value
            or (name == "y" and not all(isinstance(each, str) for each in value))
        ):
            raise BadInput(
                f"{file}: plot.{name} must be {'a list of columns' if name == 'y' else 'a name'}, "
                f"not {shown(value)}"
            )
    if plot["x"] not in grid:
        raise BadInput(f"{file}: plot.x must be a parameter of the grid, not {plot['x']!r}")


def grid_points(spec: dict) -> Iterator[dict]:
    """Every combination of the grid's values, with the fixed parameters."""
    names = list(spec["grid"])
    for values in itertools.product(*spec["grid"].values()):
        yield spec["parameters"] | dict(zip(names, values, strict=True))


# --- names ----------------------------------------------------------------------------------------


def named(spec: dict, work: Notebook | Function) -> list[Point]:
    """The grid's points, each once, in the order of their names. `BadInput` for a trace that is not
    there.
    """
    grid = {
        point.name: point
        for point in (Point(name_of(work, each), each) for each in grid_points(spec))
    }
    return [grid[name] for name in sorted(grid)]


def name_of(work: Notebook | Function, parameters: dict) -> str:
    """Of a point, by all that its rows depend on, as it is here."""
    trace = find_trace(parameters["trace"]).read_bytes() if parameters.get("trace") else b""
    return points.sha256([json.dumps(parameters, sort_keys=True).encode(), *work.source, trace])[
        :16
    ]


# --- on disk --------------------------------------------------------------------------------------


def _rows_of(folder: Path, point: Point) -> Path:
    return folder / f"{point.name}.parquet"


def _error_of(folder: Path, point: Point) -> Path:
    return folder / f"{point.name}.error.txt"


def _notebook_of(folder: Path, point: Point, failed: bool = False) -> Path:
    return folder / f"{point.name}{'.failed' * failed}.ipynb"


def _keep(folder: Path, point: Point, outcome: Outcome) -> None:
    failed = outcome.error is not None
    if outcome.notebook is not None:
        with results.replacing(_notebook_of(folder, point, failed)) as part:
            part.write_text(outcome.notebook, encoding="utf-8")
    if failed:
        with results.replacing(_error_of(folder, point)) as part:
            part.write_text(outcome.error, encoding="utf-8")
        return
    for old in (_error_of(folder, point), _notebook_of(folder, point, failed=True)):
        old.unlink(missing_ok=True)
    with results.replacing(_rows_of(folder, point)) as part:  # last: now it is done
        outcome.rows.assign(point_seconds=outcome.seconds).to_parquet(part, index=False)


def _collect(target: Path, folder: Path, spec: dict, how: dict, grid: list[Point]) -> None:
    """Write all points' rows in two tables, what the wall clock said apart."""
    import matplotlib

    matplotlib.use("Agg")
    from .. import plots

    parts = [pd.read_parquet(_rows_of(folder, point)) for point in grid]
    rows = pd.concat(
        [
            part.assign(row=range(len(part)), **point.columns)
            for part, point in zip(parts, grid, strict=True)
        ],
        ignore_index=True,
    )
    measured = "repeats" in rows
    clocked = [name for name in rows if name in CLOCKED or (measured and MEASURED.fullmatch(name))]
    names = ["point", "row", *(name for name in rows if name.startswith(PREFIX))]
    tables = {
        "timings": rows[[*names, *clocked]],
        "rows": rows[[*names, *(each for each in rows if each not in {*names, *clocked})]],
    }
    for name, table in tables.items():
        with results.replacing(target / f"{name}.parquet") as part:
            table.to_parquet(part, index=False)
    told = spec | ({"notebook": spec["notebook"].name} if "notebook" in spec else {})
    run = {"command": "sweep", "arguments": how, "spec": told, "environment": environment()}
    with results.replacing(target / "run.json") as part:
        part.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if "plot" in spec:
        plots.use_style()
        swept = {
            name: PREFIX + spec["plot"][name]
            for name in ("x", "lines")
            if spec["plot"][name] in spec["grid"]
        }
        drawn = spec["plot"] | swept
        if missing := [name for name in (drawn["lines"], *drawn.get("y", [])) if name not in rows]:
            raise BadInput(
                f"{target}/rows.parquet is written, but has no column {shown(missing[0])} to plot: "
                f"it has {', '.join(rows)}"
            )
        with results.replacing(target / "sweep.png") as part:
            plots.sweep_figure(rows, **drawn)[0].figure.savefig(part, format="png")
