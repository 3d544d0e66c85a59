"""Sweeps: a notebook, or a replay, over a grid of parameters; the rows of all points in one table.
A sweep that was killed at any moment goes on.

A sweep file is YAML::

    notebook: ../notebooks/00_quickstart.ipynb     # relative to the file; or function: replay
    parameters: {num_requests: 8}                  # the same at every point
    grid: {block_size: [16, 64], ...}              # every combination is a point
    plot: {x: block_size, lines: strategy}         # optional

A point is named by the SHA-256 of its parameters, the notebook's code, the package's source and the
trace's content. It is done when ``points/<name>.parquet`` is there: only the process that was
started writes that file, last of all, by a rename. So a killed sweep runs only what is not done, an
edited allocator makes all points new, and no half file is ever read. ``rows.parquet`` is sorted by
point and has nothing in it that differs from run to run of a replay; what a real clock decides is
in ``timings.parquet``.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import yaml
from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm

from ..bench.environment import environment
from ..errors import BadInput, at_least, one_of, shown
from ..metrics import PREFIX, column_of
from ..options import ReplayOptions
from ..workloads.traces import find_trace
from . import store, sweep_worker
from .sweep_worker import ROWS_PARAMETER, Function, Notebook, Outcome

FUNCTIONS = {"replay": Function(sweep_worker.replay)}
MOST_TOLD = 10  # failed points that are printed


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of the grid's values, named by all that its rows depend on."""

    name: str
    parameters: dict

    @property
    def columns(self) -> dict:
        """Columns that say in every row which point the row is of."""
        return {"point": self.name} | {  # a list or mapping as text: rows are grouped by it
            f"{PREFIX}{name}": str(value) if isinstance(value, list | dict) else value
            for name, value in self.parameters.items()
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

    ``jobs``: processes, among which the BLAS's threads are divided. ``dask``: a scheduler's
    address, instead of ``jobs``. ``retry``: run points that failed before again, which are else
    left as they are.
    """
    jobs = at_least("jobs", jobs, 1)
    spec = SweepSpec.load(file)
    work = spec.work()
    grid = named(spec, work)
    with store.claimed(out, name or file.stem, overwrite=True) as target:
        folder, how = target / "points", {"jobs": jobs, "dask": dask}
        with store.named_if_unwritable(folder):
            folder.mkdir(parents=True, exist_ok=True)
        num_before = len(_done(folder, grid))
        _run_missing(folder, work, grid, retry, how)
        done = _done(folder, grid)
        _tell_failed(folder, [point for point in grid if point not in done])
        if done:
            _collect(target, folder, spec, how, done)
            figure = f", figure {target}/sweep.png" if spec.plot else ""
            print(
                f"{len(done)} point{'s' * (len(done) != 1)} ({num_before} done before): "
                f"{target}/rows.parquet{figure}"
            )
    return 0 if len(done) == len(grid) else 1


def _run_missing(
    folder: Path, work: Notebook | Function, grid: list[Point], retry: bool, how: dict
) -> None:
    """Run the points that are not done, and with ``retry`` those that failed; keep every outcome as
    soon as it is there.
    """
    coming = [
        point
        for point in grid
        if not _rows_of(folder, point).exists() and (retry or not _error_of(folder, point).exists())
    ]
    num_skipped = len(grid) - len(coming)
    with contextlib.closing(outcomes(work, coming, **how)) as found:
        for point, outcome in tqdm(
            found, total=len(grid), initial=num_skipped, unit="point", disable=None
        ):
            _keep(folder, point, outcome)


def _tell_failed(folder: Path, failed: list[Point]) -> None:
    for point in failed[:MOST_TOLD]:
        error, notebook = _error_of(folder, point), _notebook_of(folder, point, failed=True)
        last_line = sweep_worker.last_line(error.read_text(encoding="utf-8"))
        print(f"failed: {point.parameters}: {last_line}")
        left = notebook if notebook.exists() else error
        print(f"        see {left}; --retry (retry=True) runs it again")
    if len(failed) > MOST_TOLD:
        print(f"and {len(failed) - MOST_TOLD} more: {folder}/*.error.txt")


def outcomes(
    work: Notebook | Function, coming: list[Point], jobs: int, dask: str | None
) -> Iterator[tuple[Point, Outcome]]:
    """Each point with its outcome, in the order in which points end."""
    with contextlib.ExitStack() as stack:
        if dask is not None:
            try:
                from distributed import Client
            except ImportError as error:
                raise BadInput(
                    "dask needs the package distributed: pip install 'cortexlab[dask]'"
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
    except BadInput as error:  # the trace is missing on this machine
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSpec:
    """A sweep file, checked against the parameters of its notebook or function. `BadInput` names
    the file.
    """

    file: Path
    notebook: Path | None = None
    function: str | None = None
    parameters: dict = field(default_factory=dict)  # the same at every point
    grid: dict[str, list]  # every combination of values is a point
    plot: dict | None = None  # what the figure shows: x, lines, y
    unknown: InitVar[Iterable] = ()  # other keys of the file, which are refused

    @classmethod
    def load(cls, file: Path) -> "SweepSpec":
        """The sweep in ``file``; a notebook's path is relative to the file."""
        try:
            given = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"cannot read {file}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadInput(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
        given = given if isinstance(given, dict) else {}
        known = {"grid": None} | {key: given[key] for key in KEYS if key in given}
        if known.get("notebook") is not None:
            known["notebook"] = (file.parent / str(known["notebook"])).resolve()
        known["parameters"] = given.get("parameters") or {}
        return cls(file=file, unknown=set(given) - set(KEYS), **known)

    def __post_init__(self, unknown: Iterable) -> None:
        try:
            self._check(unknown)
        except BadInput as error:
            raise BadInput(f"{self.file}: {error}") from error

    def _check(self, unknown: Iterable) -> None:
        if not isinstance(self.grid, dict) or (self.notebook is None) == (self.function is None):
            raise BadInput(
                "a sweep has `notebook` (a path) or `function`, and `grid` (parameter: list of "
                "values)"
            )
        if unknown:
            raise BadInput(f"unknown key {shown(min(map(str, unknown)))}: use {', '.join(KEYS)}")
        known = self._known_parameters()
        if not isinstance(self.parameters, dict):
            raise BadInput(f"parameters must be a mapping, not {shown(self.parameters)}")
        if both := sorted(map(str, set(self.parameters) & set(self.grid))):
            raise BadInput(f"{both[0]} is in parameters and in grid")
        if self.plot is not None:
            self._check_plot()
        for parameter, value in self.parameters.items():
            self._check_values(known, parameter, [value])
        for parameter, values in self.grid.items():
            self._check_values(known, parameter, values)
        if self.function is not None:
            self._check_options()

    def _known_parameters(self) -> dict[str, str]:
        """Parameter -> name of its type, of the notebook or function."""
        if self.notebook is None:
            known = FUNCTIONS[one_of("function", self.function, FUNCTIONS)].known()
            return {name: kind.__name__ for name, kind in known.items()}
        if not self.notebook.is_file():
            raise BadInput(f"notebook {self.notebook.name} does not exist")
        inspected = papermill.inspect_notebook(str(self.notebook))
        known = {name: each["inferred_type_name"] for name, each in inspected.items()}
        if known.pop(ROWS_PARAMETER, None) is None:
            raise BadInput(
                f"notebook {self.notebook.name} has no parameter {ROWS_PARAMETER}, so it leaves no "
                "rows"
            )
        return known

    def _check_values(self, known: dict[str, str], parameter: str, values: list) -> None:
        if parameter not in known:
            raise BadInput(
                f"there is no parameter {shown(parameter)}: use {', '.join(sorted(known))}"
            )
        if not isinstance(values, list) or not values:
            raise BadInput(f"grid.{parameter} must be a list of values, not {shown(values)}")
        wanted = known[parameter]
        taken = {"float": ("float", "int")}.get(wanted, (wanted,))
        for value in values:
            if wanted in ("int", "float", "str", "bool") and type(value).__name__ not in taken:
                raise BadInput(f"parameter {parameter!r} must be {wanted}, not {shown(value)}")

    def _check_options(self) -> None:
        names = {each.name for each in fields(ReplayOptions)} - {"num_blocks"}
        for parameters in grid_points(self):
            given = {name: parameters[name] for name in names & set(parameters)}
            ReplayOptions(num_blocks=1, **given | {"growth": given.get("growth") or None})

    def _check_plot(self) -> None:
        words, plot = {"x": str, "lines": str, "y": list}, self.plot
        if not isinstance(plot, dict) or not {"x", "lines"} <= set(plot) <= set(words):
            raise BadInput(f"plot must have x and lines, and may have y, not {shown(plot)}")
        for name, value in plot.items():
            right = isinstance(value, words[name]) and value
            if not right or (name == "y" and not all(isinstance(each, str) for each in value)):
                wanted = "a list of columns" if name == "y" else "a name"
                raise BadInput(f"plot.{name} must be {wanted}, not {shown(value)}")
        if plot["x"] not in self.grid:
            raise BadInput(f"plot.x must be a parameter of the grid, not {shown(plot['x'])}")

    def work(self) -> Notebook | Function:
        """What runs at every point: a notebook without its finding, which holds for the notebook's
        defaults only.
        """
        if self.notebook is None:
            return FUNCTIONS[self.function]
        notebook = nbformat.read(self.notebook, as_version=4)
        notebook.cells = [
            cell for cell in notebook.cells if "finding" not in cell.metadata.get("tags", [])
        ]
        return Notebook(nbformat.writes(notebook), str(self.notebook.parent))

    def told(self) -> dict:
        """The file's content as ``run.json`` keeps it: a notebook by its name, not by its path."""
        told = {key: value for key in KEYS if (value := getattr(self, key)) is not None}
        return told | ({"notebook": self.notebook.name} if self.notebook else {})


KEYS = tuple(each.name for each in fields(SweepSpec) if each.name != "file")


def grid_points(spec: SweepSpec) -> Iterator[dict]:
    """Every combination of the grid's values, with the fixed parameters."""
    for values in itertools.product(*spec.grid.values()):
        yield spec.parameters | dict(zip(spec.grid, values, strict=True))


# --- names ----------------------------------------------------------------------------------------


def named(spec: SweepSpec, work: Notebook | Function) -> list[Point]:
    """The grid's points, each once, in the order of their names. `BadInput` for a missing trace."""
    grid = {name_of(work, parameters): parameters for parameters in grid_points(spec)}
    return [Point(name, grid[name]) for name in sorted(grid)]


def name_of(work: Notebook | Function, parameters: dict) -> str:
    """A point's name: the hash of all that its rows depend on, as this machine has it."""
    trace = find_trace(parameters["trace"]).read_bytes() if parameters.get("trace") else b""
    given = json.dumps(parameters, sort_keys=True).encode()
    return sweep_worker.sha256([given, *work.source, trace])[:16]


# --- on disk --------------------------------------------------------------------------------------


def _rows_of(folder: Path, point: Point) -> Path:
    return folder / f"{point.name}.parquet"


def _error_of(folder: Path, point: Point) -> Path:
    return folder / f"{point.name}.error.txt"


def _notebook_of(folder: Path, point: Point, failed: bool = False) -> Path:
    return folder / f"{point.name}{'.failed' * failed}.ipynb"


def _done(folder: Path, grid: list[Point]) -> list[Point]:
    return [point for point in grid if _rows_of(folder, point).exists()]


def _keep(folder: Path, point: Point, outcome: Outcome) -> None:
    failed = outcome.error is not None
    if outcome.notebook is not None:
        store.replace_text(_notebook_of(folder, point, failed), outcome.notebook)
    if failed:
        store.replace_text(_error_of(folder, point), outcome.error)
        return
    for old in (_error_of(folder, point), _notebook_of(folder, point, failed=True)):
        old.unlink(missing_ok=True)
    with store.replacing(_rows_of(folder, point)) as part:  # last of all: the point is done now
        store.write_table(part, outcome.rows.assign(point_seconds=outcome.seconds))


def _collect(target: Path, folder: Path, spec: SweepSpec, how: dict, done: list[Point]) -> None:
    """Write the rows of all points that are done, ``run.json`` and the figure."""
    parts = []
    for point in done:
        part = pd.read_parquet(_rows_of(folder, point))
        parts.append(part.assign(row=range(len(part)), **point.columns))
    rows = pd.concat(parts, ignore_index=True)
    for name, table in _by_clock(rows).items():
        with store.replacing(target / f"{name}.parquet") as part:
            store.write_table(part, table)
    run = {
        "command": "sweep",
        "arguments": how,
        "spec": spec.told(),
        "environment": environment(),
    }
    store.write_run(target, run, allow_nan=True)  # a grid may hold .inf
    if spec.plot is not None:
        _draw(target, spec, rows)


def _by_clock(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """``timings``: the columns that a real clock decides; ``rows``: all others. Both begin with the
    columns that name a row.
    """
    real = {"wall", "run"} if "repeats" in rows else {"wall"}  # a replay's run has a virtual clock
    clocked = [name for name in rows if (column := column_of(name)) and column.clock in real]
    names = ["point", "row", *(name for name in rows if name.startswith(PREFIX))]
    others = [name for name in rows if name not in {*names, *clocked}]
    return {"timings": rows[[*names, *clocked]], "rows": rows[[*names, *others]]}


def _draw(target: Path, spec: SweepSpec, rows: pd.DataFrame) -> None:
    plots = store.drawing()
    swept = {
        name: PREFIX + spec.plot[name] for name in ("x", "lines") if spec.plot[name] in spec.grid
    }
    drawn = spec.plot | swept
    if missing := [name for name in (drawn["lines"], *drawn.get("y", [])) if name not in rows]:
        raise BadInput(
            f"{target}/rows.parquet is written, but has no column {shown(missing[0])} to plot: "
            f"it has {', '.join(rows)}"
        )
    with store.replacing(target / "sweep.png") as part:
        plots.sweep_figure(rows, **drawn)[0].figure.savefig(part, format="png")
