"""Results on disk: ``results/<name>/`` with tables as Parquet, ``run.json`` and figures. Written
whole or not at all.
"""

import fcntl
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import IO
from unicodedata import category

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from ..errors import BadInput, a_path, real, reason_of, shown
from ..metrics import kind_of

LONGEST_NAME = 200  # bytes of a folder's name: file systems take 255, temporary names are longer
LONGEST_REASON = 160  # characters of what a library says of a damaged file
UNREADABLE = OSError, ValueError, LookupError, TypeError, AttributeError  # of a damaged file
TABLES = ("rows", "requests", "steps")
RUN = {  # kinds of what `run.json` holds
    "command": str, "arguments": dict, "spec": dict, "environment": dict, "points": dict,
    "differences": dict, "recommendation": str,
}  # fmt: skip
KINDS = {  # of columns on disk
    "double": pa.float64(),
    "int64": pa.int64(),
    "string": pa.string(),
    "doubles": pa.list_(pa.float64()),
    "extents": pa.list_(pa.list_(pa.int64())),
}


class InUse(BadInput):
    """A name that a result has, or that another process is writing."""


@contextmanager
def claimed(
    out: Path, name: str | None, overwrite: bool = False, command: str = "result"
) -> Iterator[Path]:
    """The folder ``out/name`` for a result, held against all other processes until the block ends;
    `BadInput` before any work is done.

    Without a ``name`` it is ``<command>-<UTC time>``, or with ``-2``, ``-3``, ... behind it where
    another result of that second has the name.
    """
    out = Path(a_path("out", out))
    if name is not None:
        target = check_target(out, name, overwrite)
        with alone(target):
            yield check_target(out, name, overwrite)  # the holder before may have written it
        return
    name = f"{command}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for each in chain([name], (f"{name}-{n}" for n in count(2))):
        with ExitStack() as claim:
            try:
                target = claim.enter_context(claimed(out, each))
            except InUse:
                continue
            yield target
            return


def check_target(out: Path, name: str, overwrite: bool = False) -> Path:
    """The folder ``out/name``, or `BadInput` for a bad name, or one that a result has."""
    wrong = any(letter == "/" or category(letter) in ("Cc", "Cs") for letter in name)
    if not name or name.startswith(".") or wrong:
        raise BadInput(f"name must be a plain folder name without a dot first, not {shown(name)}")
    if len(name.encode()) > LONGEST_NAME:
        raise BadInput(f"name must have at most {LONGEST_NAME} bytes, not {len(name.encode())}")
    target = Path(out) / name
    if os.path.lexists(target):
        if not overwrite:
            raise InUse(f"results {target} exist already: choose another name, or overwrite=True")
        if target.is_symlink() or not target.is_dir():
            raise BadInput(
                f"{target} is not a folder, so results cannot replace it: choose another name"
            )
    return target


@contextmanager
def named_if_unwritable(folder: Path) -> Iterator[None]:
    """Turn an `OSError` into `BadInput` that names the results' ``folder``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or reason_of(error)
        place = shown(str(folder)).strip("'\"")
        raise BadInput(f"results folder {place} cannot be written: {reason}") from error


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """The only process that writes the result ``target``; `InUse` where another one does.

    The claim is a lock on a file beside ``target``, so it dies with its process. An old result that
    a killed process had just taken away is put back. Folders made for the lock are removed again
    where nothing was written.
    """
    missing = [folder for folder in target.parents if not os.path.exists(folder)]
    try:
        with _locked(_beside(target, "lock"), target):
            old = _beside(target, "old")
            if old.exists() and not target.exists():
                os.rename(old, target)
            yield
    finally:
        with suppress(OSError):  # not there, or not empty
            for folder in missing:
                folder.rmdir()


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    """An exclusive lock on the file ``path``, which is removed before the lock is released."""
    while True:
        with named_if_unwritable(target.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = path.open("w")
            except FileNotFoundError:
                if path.parent.is_dir():
                    raise
                continue  # another process has just removed the folder
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InUse(
                    f"another process is writing to {target}: wait for it, or choose another name"
                ) from error
            except OSError as error:
                raise BadInput(
                    f"results folder {target.parent} cannot be locked: {error.strerror}"
                ) from error
            if not _is_file_at(path, file):  # its holder removed it before it let go
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_file_at(path: Path, file: IO) -> bool:
    """Whether ``path`` still names the open ``file``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _beside(target: Path, what: str) -> Path:
    """A hidden neighbour of ``target``."""
    return target.with_name(f".{target.name}.{what}")


@contextmanager
def written_atomically(target: Path, overwrite: bool = True) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends well, and is removed
    when it does not. For the holder of the claim on ``target`` (`claimed`, `alone`).

    An old result stays whole until the new one is. A killed run leaves at most hidden folders,
    ``.<name>.new`` and ``.<name>.old``, which the next run of that name clears up.
    """
    new, old = _beside(target, "new"), _beside(target, "old")
    with named_if_unwritable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if new.exists():
                shutil.rmtree(new)
            new.mkdir()
            yield new
            if not target.exists():
                os.rename(new, target)
            elif overwrite:
                _exchange(new, target, old)
            else:
                raise InUse(f"results {target} were made by another program in the meantime")
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Put ``new`` in the place of ``target``, and ``target`` away."""
    if old.exists():
        shutil.rmtree(old)
    try:
        os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file of this process, which takes the place of ``target`` when the block ends
    well.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with named_if_unwritable(target.parent):
        try:
            yield part
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def replace_text(target: Path, text: str) -> None:
    """Write ``text`` to ``target``, whole or not at all."""
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8")


def write_tables(folder: Path, run: dict, **tables: pd.DataFrame) -> None:
    """``<name>.parquet`` for each table and ``run.json``."""
    for name, table in tables.items():
        write_table(folder / f"{name}.parquet", table)
    write_run(folder, run)


def write_table(file: Path, table: pd.DataFrame) -> None:
    """``table`` as Parquet, each known column of the type that `metrics.COLUMNS` says."""
    with file.open("wb") as target:  # pyarrow takes a path such as "a:b" for a URI
        parquet.write_table(_typed(pa.Table.from_pandas(table, preserve_index=False)), target)


def read_table(file: Path) -> pd.DataFrame:
    """A written table, its columns of the types that `write_table` gives them; `BadInput` where the
    file is damaged.
    """
    with named_if_damaged(file), file.open("rb") as source:
        return _typed(parquet.read_table(source)).to_pandas()


def is_table(file: Path) -> bool:
    """Whether ``file`` is there, and a table as far as its end tells."""
    try:
        _check_end(file)
    except (OSError, pa.ArrowException):
        return False
    return True


def _check_end(file: Path) -> None:
    """Read what a Parquet file says of itself at its end; an error where it is cut off."""
    with file.open("rb") as source:
        parquet.read_metadata(source)


def _typed(table: pa.Table) -> pa.Table:
    """``table`` with every known column of its type. One whose values do not fit keeps its own: a
    notebook's rows may give a known name another meaning.
    """
    for at, name in enumerate(table.column_names):
        if kind := kind_of(name):
            with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                table = table.set_column(at, name, table[at].cast(KINDS[kind]))
    return table


@contextmanager
def named_if_damaged(file: Path | str) -> Iterator[None]:
    """Turn what reading ``file``, or using what was read, raises into `BadInput` that names it."""
    try:
        yield
    except BadInput:
        raise
    except (*UNREADABLE, pa.ArrowException) as error:
        raise BadInput(f"{file} cannot be read: {reason_of(error)[:LONGEST_REASON]}") from error


def is_finite(value: object) -> bool:
    """Whether ``value`` is a number that an axis can show, or True or False."""
    return isinstance(value, bool) or math.isfinite(real(value))


def in_json(value: object) -> object:
    """``value`` as JSON can hold it: an infinity, and what else JSON lacks, as text."""
    if isinstance(value, dict):
        return {str(key): in_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [in_json(each) for each in value]
    return value if value is None or isinstance(value, str) or is_finite(value) else str(value)


def write_run(folder: Path, run: dict) -> None:
    """``run.json``."""
    text = json.dumps(run, indent=1, allow_nan=False)
    replace_text(folder / "run.json", text + "\n")


def drawing():
    """`cortexlab.plots` in its own style, for files: no window opens. Loads Matplotlib."""
    plots = loaded_plots()
    import matplotlib

    matplotlib.use("Agg")
    plots.use_style()
    return plots


def loaded_plots():
    """`cortexlab.plots`, also where ``MPLBACKEND`` names no backend, which is then ignored."""
    given, is_new = os.environ.pop("MPLBACKEND", None), "matplotlib" not in sys.modules
    try:
        import matplotlib  # which a wrong name stops
    finally:
        if given is not None:
            os.environ["MPLBACKEND"] = given
    if given and is_new:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = given
    from .. import plots

    return plots


def read(folder: Path | str) -> dict:
    """A written result: its tables as data frames under ``rows, requests, steps``, and ``run``.

    The rows of a sweep have the columns of ``timings.parquet``, too. `BadInput` names a damaged
    file.
    """
    folder = Path(folder)
    run = read_run(folder)
    found = {
        name: read_table(folder / f"{name}.parquet")
        for name in TABLES
        if (folder / f"{name}.parquet").exists()
    }
    if "extents" in found.get("steps", ()):
        with named_if_damaged(folder / "steps.parquet"):
            found["steps"]["extents"] = found["steps"]["extents"].map(_nested)
    if "rows" in found:
        found["rows"] = _with_timings(folder, found["rows"])
    return found | {"run": run}


def read_run(folder: Path) -> dict:
    """The content of ``run.json``."""
    file = folder / "run.json"
    if not file.is_file():
        raise BadInput(f"{folder} is no result of cortexlab: it has no run.json")
    with named_if_damaged(file):
        run = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(run, dict):
        raise BadInput(f"{file} is no run.json of cortexlab: {shown(run)}")
    for name, kind in RUN.items():
        if not isinstance(run.get(name, kind()), kind):
            raise BadInput(f"{file} is no run.json of cortexlab: {name} is {shown(run[name])}")
    return run


def _with_timings(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with the columns of ``timings.parquet``, where there is one."""
    file = folder / "timings.parquet"
    if not file.exists():
        return rows
    timings = read_table(file)
    with named_if_damaged(file):
        new = [name for name in timings if name not in rows]
        return rows.merge(timings[["point", "row", *new]], on=["point", "row"], how="left")


def _nested(extents):
    """``[[request number, first block, blocks], ...]`` of a step's block map; results of before
    this form have it as JSON text, ``[["r<number>", [[first block, blocks], ...]], ...]``.
    """
    if not isinstance(extents, str):
        return extents
    return [
        [int(request[1:]), start, num_blocks]
        for request, held in json.loads(extents)
        for start, num_blocks in held
    ]


def read_rows(folder: Path | str) -> pd.DataFrame:
    """The rows of every result in ``folder`` or below it, one below the other; the column ``run``
    is the result's path from ``folder``. Hidden folders are left out, and so are damaged results,
    with a warning that names them.
    """
    folder = Path(folder)
    tables, damaged = {}, []
    for found in _results_below(folder):
        try:
            tables[str(found.relative_to(folder))] = _rows_of(found)
        except BadInput as error:
            damaged.append(str(error))
    left_out = f"left out: {'; '.join(damaged)}" if damaged else ""
    if not tables:
        raise BadInput(
            f"{folder} holds no result of cortexlab: "
            + (left_out or "no run.json with rows.parquet beside it")
        )
    if damaged:
        warnings.warn(left_out, stacklevel=2)
    return pd.concat(tables, names=["run"]).reset_index("run").reset_index(drop=True)


def _rows_of(folder: Path) -> pd.DataFrame:
    """The rows of a result all of whose files are whole; of other tables only the end is read."""
    read_run(folder)
    for name in TABLES[1:]:
        if (file := folder / f"{name}.parquet").exists():
            with named_if_damaged(file):
                _check_end(file)
    return _with_timings(folder, read_table(folder / "rows.parquet"))


def _results_below(folder: Path) -> Iterator[Path]:
    """Folders with ``run.json`` and ``rows.parquet``, links followed, each once; no hidden ones."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if {"run.json", "rows.parquet"} <= set(files):
            yield Path(path)
