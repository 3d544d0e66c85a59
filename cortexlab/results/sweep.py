"""Sweeps: a notebook, or a replay, over a grid of parameters; the rows of all points in one table.
A sweep that was killed at any moment goes on, and leaves no process behind.

A sweep file is YAML::

    notebook: ../notebooks/00_quickstart.ipynb     # relative to the file; or function: replay
    parameters: {num_requests: 8}                  # the same at every point
    grid: {block_size: [16, 64], ...}              # every combination is a point
    plot: {x: block_size, lines: strategy}         # optional
    timeout: 600                                   # optional: seconds that a point may take

A relative trace, and the module of a strategy ``module:Factory``, lie beside the sweep file.

A point is named by the SHA-256 of its parameters, the notebook's code, the package's source, the
user's own strategy and the trace's content. It is done when ``points/<name>.parquet`` is there:
only the process that was started writes that file, last of all, by a rename. So a killed sweep runs
only what is not done, an edited allocator makes all points new, and no half file is ever read.
``rows.parquet`` is sorted by point and has nothing in it that differs from run to run of a replay;
what a real clock decides is in ``timings.parquet``.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import yaml
from tqdm import tqdm

from ..allocators.own import own_strategy
from ..bench.environment import environment
from ..errors import BadInput, at_least, one_of, real, reason_of, shown
from ..metrics import PREFIX, column_of
from ..options import ReplayOptions
from . import store, sweep_pool, sweep_worker
from .store import in_json, is_finite
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
    timeout: float | None = None,
) -> int:
    """Run the sweep, print where its tables are, and return the exit code: 1 when a point failed.

    ``jobs``: processes, among which the BLAS's threads are divided. ``dask``: a scheduler's
    address, instead of ``jobs``. ``retry``: run points that failed before again, which are else
    left as they are. ``timeout``: seconds that a point may take, instead of the file's.
    """
    jobs = at_least("jobs", jobs, 1)
    spec = SweepSpec.load(file)
    timeout = time_limit("point_timeout", timeout) or spec.timeout
    work = spec.work()
    if timeout and dask is not None and not isinstance(work, Notebook):
        raise BadInput(
            "a function's point on Dask cannot have a time limit, since Dask cannot stop it: use "
            "jobs, or no point_timeout"
        )
    grid = named(spec, work)
    code = 1  # of a sweep that a signal has ended, whose handler then did not
    with (
        sweep_pool.ended_by_signals(),
        store.claimed(out, name or file.stem, overwrite=True) as target,
    ):
        _check_own(target)
        folder, how = target / "points", {"jobs": jobs, "dask": dask, "timeout": timeout}
        with store.named_if_unwritable(folder):
            folder.mkdir(parents=True, exist_ok=True)
        num_before = len(_done(folder, grid))
        _run_missing(folder, work, grid, retry, how)
        code = _conclude(target, spec, how, grid, num_before)
    return code


def _conclude(
    target: Path, spec: "SweepSpec", how: dict, grid: list[Point], num_before: int
) -> int:
    """Write the tables of what is done, say what there is and what failed, and return the exit
    code.
    """
    folder = target / "points"
    done = _done(folder, grid)
    failed = [(point, _error(folder, point)) for point in grid if point not in done]
    _tell_failed(folder, failed)
    counts = f"{len(done)} point{'s' * (len(done) != 1)} ({num_before} done before)"
    counts += f", {len(failed)} failed" if failed else ""
    if not done:
        print(f"{counts}: there are no rows")
        return 1
    undrawn = _collect(target, folder, spec, how, done, failed)
    figure = f", figure {target}/sweep.png" if spec.plot and not undrawn else ""
    print(f"{counts}: {target}/rows.parquet{figure}")
    if undrawn:
        print(f"no figure: {undrawn}")
    return 1 if failed or undrawn else 0


def _check_own(target: Path) -> None:
    """`BadInput` where ``target`` holds what no sweep has written."""
    command = "sweep"
    with contextlib.suppress(BadInput):  # nothing is there, or half of a sweep
        command = store.read_run(target).get("command")
    if command != "sweep":
        raise store.InUse(f"results {target} are of another command: choose another name")


def _run_missing(
    folder: Path, work: Notebook | Function, grid: list[Point], retry: bool, how: dict
) -> None:
    """Run the points that are not done, and with ``retry`` those that failed; keep every outcome as
    soon as it is there.
    """
    done = _done(folder, grid)
    coming = [
        point
        for point in grid
        if point not in done and (retry or not _error_of(folder, point).exists())
    ]
    num_skipped = len(grid) - len(coming)
    with contextlib.closing(outcomes(work, coming, **how)) as found:
        for point, outcome in tqdm(
            found, total=len(grid), initial=num_skipped, unit="point", disable=None
        ):
            _keep(folder, point, outcome)


def _tell_failed(folder: Path, failed: list[tuple[Point, str]]) -> None:
    for point, error in failed[:MOST_TOLD]:
        print(f"failed: {point.parameters}: {error}")
        notebook = _notebook_of(folder, point, failed=True)
        left = notebook if notebook.exists() else _error_of(folder, point)
        print(f"        see {left}; --retry (retry=True) runs it again")
    if len(failed) > MOST_TOLD:
        print(f"and {len(failed) - MOST_TOLD} more: {folder}/*.error.txt")


def idle_seeds(rows: pd.DataFrame) -> str:
    """The seeds of the grid, when all rows are equal for each of them but for what a real clock
    decides; else an empty text.
    """
    swept = f"{PREFIX}seed"
    if swept not in rows or rows[swept].nunique() < 2:
        return ""
    table = _by_clock(rows)["rows"].drop(columns=["point", "seed"], errors="ignore")
    parts = [
        part.drop(columns=swept).astype(str).sort_values(list(part.columns.drop(swept)))
        for _, part in table.groupby(swept)
    ]
    first = parts[0].to_numpy().tolist()
    equal = all(part.to_numpy().tolist() == first for part in parts)
    return ", ".join(map(str, sorted(rows[swept].unique()))) if equal else ""


def outcomes(
    work: Notebook | Function,
    coming: list[Point],
    jobs: int = 1,
    dask: str | None = None,
    timeout: float | None = None,
) -> Iterator[tuple[Point, Outcome]]:
    """Each point with its outcome, in the order in which points end."""
    task = partial(_run, work, timeout=timeout)
    # A notebook's client takes SIGINT and SIGTERM from its process; a module is loaded but once.
    own = isinstance(work, Notebook) or any(
        ":" in str(p.parameters.get("strategy")) for p in coming
    )
    if dask is not None:
        yield from sweep_pool.on_dask(task, coming, dask)
    elif jobs > 1 or timeout or own:
        limit = timeout + work.overhead_s if timeout else math.inf
        too_long = f"took longer than {timeout or 0:g} s, the time limit of a point"
        yield from sweep_pool.in_workers(task, coming, jobs, limit, too_long)
    else:
        for point in coming:
            yield point, task(point)


def _run(work: Notebook | Function, point: Point, timeout: float | None = None) -> Outcome:
    try:
        here = name_of(work, point.parameters)
    except BadInput as error:  # the trace or the strategy is missing on this machine
        return Outcome(0.0, error=str(error))
    if here != point.name:
        return Outcome(
            0.0,
            error=(
                "not run: the package's source, the strategy or the trace is not what it was where "
                "and when the sweep was started"
            ),
        )
    return work(point.parameters, timeout)


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
    timeout: float | None = None  # seconds that a point may take
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
        time_limit("timeout", self.timeout)
        known = self._known_parameters()
        if not isinstance(self.parameters, dict):
            raise BadInput(f"parameters must be a mapping, not {shown(self.parameters)}")
        if both := sorted(map(str, set(self.parameters) & set(self.grid))):
            raise BadInput(f"{both[0]} is in parameters and in grid")
        for parameter, value in self.parameters.items():
            self._check_values(known, parameter, [value])
        for parameter, values in self.grid.items():
            self._check_values(known, parameter, values)
        if self.plot is not None:
            self._check_plot()
        if self.function is not None:
            self._check_options()

    def _known_parameters(self) -> dict[str, str]:
        """Parameter -> name of its type, of the notebook or function."""
        if self.notebook is None:
            known = FUNCTIONS[one_of("function", self.function, FUNCTIONS)].known()
            return {name: kind.__name__ for name, kind in known.items()}
        if not self.notebook.is_file():
            raise BadInput(f"notebook {self.notebook.name} does not exist")
        try:
            inspected = papermill.inspect_notebook(self._read_notebook())
        except Exception as error:  # of a library that reads any language's cells
            raise BadInput(f"notebook {self.notebook.name}: {reason_of(error)}") from error
        known = {name: each["inferred_type_name"] for name, each in inspected.items()}
        if known.pop(ROWS_PARAMETER, None) is None:
            raise BadInput(
                f"notebook {self.notebook.name} has no parameter {ROWS_PARAMETER}, so it leaves no "
                "rows"
            )
        return known

    def _read_notebook(self) -> nbformat.NotebookNode:
        """The notebook, which runs in this Python's kernel if it names none."""
        name = self.notebook.name
        try:
            notebook = nbformat.read(self.notebook, as_version=4)
            nbformat.validate(notebook)
        except OSError as error:
            raise BadInput(f"notebook {name} cannot be read: {error.strerror}") from error
        except Exception as error:  # nbformat raises many kinds for what is no notebook
            raise BadInput(f"{name} is no notebook: {reason_of(error)}") from error
        notebook.metadata.setdefault("kernelspec", KERNEL)
        return notebook

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
        both = [self.parameters.get("strategy", ""), *self.grid.get("strategy", ())]
        for own in (name for name in both if ":" in name):
            own_strategy(own, [self.folder])

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
        x, lines = self.grid[plot["x"]], self.grid.get(plot["lines"], [])
        if bad := [value for value in x if not isinstance(value, str) and not is_finite(value)]:
            raise BadInput(f"plot.x is {plot['x']}, but no axis can show {_listed(bad)}")
        if len({isinstance(value, str) for value in x}) > 1:
            raise BadInput(f"plot.x is {plot['x']}, but no axis can show both texts and numbers")
        if bad := [value for value in lines if value is None or value != value]:
            raise BadInput(
                f"plot.lines is {plot['lines']}, but no line can be named {_listed(bad)}"
            )

    def work(self) -> Notebook | Function:
        """What runs at every point: a notebook without its finding, which holds for the notebook's
        defaults only.
        """
        if self.notebook is None:
            return replace(FUNCTIONS[self.function], beside=self.folder)
        notebook = self._read_notebook()
        notebook.cells = [
            cell for cell in notebook.cells if "finding" not in cell.metadata.get("tags", [])
        ]
        return Notebook(nbformat.writes(notebook), str(self.notebook.parent), self.folder)

    @property
    def folder(self) -> str:
        return str(self.file.parent.absolute())

    def told(self) -> dict:
        """The file's content as ``run.json`` keeps it: a notebook by its name, not by its path."""
        told = {key: in_json(value) for key in KEYS if (value := getattr(self, key)) is not None}
        return told | ({"notebook": self.notebook.name} if self.notebook else {})


KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
KEYS = tuple(each.name for each in fields(SweepSpec) if each.name != "file")


def time_limit(name: str, value: object) -> float | None:
    """``value`` in seconds, or None; `BadInput` for what is no number above 0."""
    if value is None:
        return None
    if not 0 < (seconds := real(value)) < math.inf:
        raise BadInput(f"{name} must be seconds above 0, not {shown(value)}")
    return seconds


def _listed(values: list) -> str:
    return shown(
        ", ".join(yaml.safe_dump(each, default_flow_style=True).split("\n")[0] for each in values)
    )


def grid_points(spec: SweepSpec) -> Iterator[dict]:
    """Every combination of the grid's values, with the fixed parameters."""
    for values in itertools.product(*spec.grid.values()):
        yield spec.parameters | dict(zip(spec.grid, values, strict=True))


# --- names ----------------------------------------------------------------------------------------


def named(spec: SweepSpec, work: Notebook | Function) -> list[Point]:
    """The grid's points, each once, in the order of their names. `BadInput` for a missing trace."""
    grid: dict[str, dict] = {}
    for parameters in grid_points(spec):
        grid.setdefault(name_of(work, parameters), parameters)
    return [Point(name, grid[name]) for name in sorted(grid)]


def name_of(work: Notebook | Function, parameters: dict) -> str:
    """A point's name: the hash of all that its rows depend on, as this machine has it."""
    num_rows = parameters.get("num_requests", 0) if isinstance(work, Function) else 0
    trace = sweep_worker.trace_of(parameters, work.beside, num_rows)
    given = json.dumps(_equal(parameters), sort_keys=True, default=str).encode()
    return sweep_worker.sha256([given, *work.source(parameters), trace])[:16]


def _equal(value: object) -> object:
    """``value`` with whole floats as ints: 30 and 30.0 are one value (1 and True are two)."""
    if isinstance(value, dict):
        return {name: _equal(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_equal(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# --- on disk --------------------------------------------------------------------------------------


def _rows_of(folder: Path, point: Point) -> Path:
    return folder / f"{point.name}.parquet"


def _error_of(folder: Path, point: Point) -> Path:
    return folder / f"{point.name}.error.txt"


def _error(folder: Path, point: Point) -> str:
    return sweep_worker.last_line(_error_of(folder, point).read_text(encoding="utf-8"))


def _notebook_of(folder: Path, point: Point, failed: bool = False) -> Path:
    return folder / f"{point.name}{'.failed' * failed}.ipynb"


def _done(folder: Path, grid: list[Point]) -> list[Point]:
    return [point for point in grid if store.is_table(_rows_of(folder, point))]


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


def _collect(
    target: Path,
    folder: Path,
    spec: SweepSpec,
    how: dict,
    done: list[Point],
    failed: list[tuple[Point, str]],
) -> str | None:
    """Write the rows of all points that are done, ``run.json`` and the figure, or return why there
    is no figure.
    """
    parts = []
    for point in done:
        part = store.read_table(_rows_of(folder, point))
        parts.append(part.assign(row=range(len(part)), **point.columns))
    rows = pd.concat(parts, ignore_index=True)
    for name, table in _by_clock(rows).items():
        with store.replacing(target / f"{name}.parquet") as part:
            store.write_table(part, table)
    run = {
        "command": "sweep",
        "arguments": how,
        "spec": spec.told(),
        "points": {
            "done": len(done),
            "failed": [
                {"parameters": in_json(point.parameters), "error": error} for point, error in failed
            ],
        },
        "environment": environment(),
    }
    store.write_run(target, run)
    undrawn = _draw(target, spec, rows) if spec.plot is not None else None
    if seeds := idle_seeds(rows):
        print(f"the rows of seed {seeds} are equal: the seed changes nothing here, one is enough")
    return undrawn


def _by_clock(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """``timings``: the columns that a real clock decides; ``rows``: all others. Both begin with the
    columns that name a row.
    """
    real = {"wall", "run"} if "repeats" in rows else {"wall"}  # a replay's run has a virtual clock
    clocked = [name for name in rows if (column := column_of(name)) and column.clock in real]
    names = ["point", "row", *(name for name in rows if name.startswith(PREFIX))]
    others = [name for name in rows if name not in {*names, *clocked}]
    return {"timings": rows[[*names, *clocked]], "rows": rows[[*names, *others]]}


def _draw(target: Path, spec: SweepSpec, rows: pd.DataFrame) -> str | None:
    """Write the figure, or return why there is none."""
    plots = store.drawing()
    swept = {
        name: PREFIX + spec.plot[name] for name in ("x", "lines") if spec.plot[name] in spec.grid
    }
    drawn = spec.plot | swept
    if missing := [name for name in (drawn["lines"], *drawn.get("y", [])) if name not in rows]:
        return f"the rows have no column {shown(missing[0])}, only {', '.join(rows)}"
    for name in drawn.get("y", []):
        if not pd.api.types.is_numeric_dtype(rows[name]) or rows[name].isna().all():
            return f"column {shown(name)} has no numbers"
    with store.replacing(target / "sweep.png") as part:
        plots.sweep_figure(rows, **drawn)[0].figure.savefig(part, format="png")
    return None
