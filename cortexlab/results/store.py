"""Results on disk: ``results/<name>/`` with tables as Parquet, ``run.json`` and figures. Written
whole or not at all.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from ..errors import BadInput, reason_of, shown
from ..metrics import kind_of

LONGEST_NAME = 200  # bytes of a folder's name: file systems take 255, temporary names are longer
LONGEST_REASON = 160  # characters of what a library says of a damaged file
TABLES = ("rows", "requests", "steps")
KINDS = {  # of columns on disk
    "double": pa.float64(),
    "int64": pa.int64(),
    "string": pa.string(),
    "doubles": pa.list_(pa.float64()),
    "extents": pa.list_(pa.list_(pa.int64())),
}


def default_name(command: str) -> str:
    """``<command>-<UTC time>``."""
    return f"{command}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def check_target(out: Path, name: str, overwrite: bool = False) -> Path:
    """The folder ``out/name``, or `BadInput` before any work is done: a bad name, one in use, a
    place that cannot be written.
    """
    if not name or name in (".", "..") or "/" in name:
        raise BadInput(f"name must be a plain folder name, not {shown(name)}")
    if len(name.encode()) > LONGEST_NAME:
        raise BadInput(f"name must have at most {LONGEST_NAME} bytes, not {len(name.encode())}")
    target = Path(out) / name
    if target.exists() and not overwrite:
        raise BadInput(f"results {target} exist already: choose another name, or overwrite=True")
    if target.exists() and not target.is_dir():
        raise BadInput(
            f"{target} is not a folder, so results cannot replace it: choose another name"
        )
    parent = Path(out)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"results folder {out} cannot be written: choose another folder")
    return target


@contextmanager
def named_if_unwritable(folder: Path) -> Iterator[None]:
    """Turn an `OSError` into `BadInput` that names the results' ``folder``."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"results folder {folder} cannot be written: {error.strerror}") from error


@contextmanager
def written_atomically(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and is
    removed when it does not.

    A killed run leaves at most folders named ``.<name>-…``, never a half-written result. A run
    killed between taking the old result away and putting the new one in its place leaves both,
    whole, under such names.
    """
    with named_if_unwritable(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder.chmod(0o755)
        yield folder
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            os.replace(target, old)
            try:
                os.replace(folder, target)
            except OSError:
                os.replace(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """An exclusive lock on ``folder``, released when the process dies; `BadInput` where another
    process has it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(
                f"another process is writing to {folder}: wait for it, or choose another name"
            ) from error
        yield


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file of this process, which takes the place of ``target`` when the block ends
    well.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
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
    parquet.write_table(_typed(pa.Table.from_pandas(table, preserve_index=False)), file)


def read_table(file: Path) -> pd.DataFrame:
    """A written table, its columns of the types that `write_table` gives them; `BadInput` where the
    file is damaged.
    """
    with named_if_damaged(file):
        return _typed(parquet.read_table(file)).to_pandas()


def _typed(table: pa.Table) -> pa.Table:
    """``table`` with every known column of its type; a column whose values do not fit keeps its
    own.
    """
    for at, name in enumerate(table.column_names):
        if kind := kind_of(name):
            with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                table = table.set_column(at, name, table[at].cast(KINDS[kind]))
    return table


@contextmanager
def named_if_damaged(file: Path) -> Iterator[None]:
    """Turn what reading ``file`` raises into `BadInput` that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise BadInput(f"{file} cannot be read: {reason_of(error)[:LONGEST_REASON]}") from error


def write_run(folder: Path, run: dict, allow_nan: bool = False) -> None:
    """``run.json``; ``allow_nan``: with Python's NaN and Infinity, which JSON lacks."""
    text = json.dumps(run, indent=1, allow_nan=allow_nan)
    replace_text(folder / "run.json", text + "\n")


def drawing():
    """`cortexlab.plots` in its own style, for files: no window opens. Loads Matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from .. import plots

    plots.use_style()
    return plots


def read(folder: Path | str) -> dict:
    """A written result: its tables as data frames under ``rows, requests, steps``, and ``run``.

    The rows of a sweep have the columns of ``timings.parquet``, too.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise BadInput(f"{folder} is no result of cortexlab: it has no run.json")
    found = {
        name: pd.read_parquet(folder / f"{name}.parquet")
        for name in TABLES
        if (folder / f"{name}.parquet").exists()
    }
    if "extents" in found.get("steps", ()):
        found["steps"]["extents"] = found["steps"]["extents"].map(_nested)
    if "rows" in found and (folder / "timings.parquet").exists():
        timings = pd.read_parquet(folder / "timings.parquet")
        new = [name for name in timings if name not in found["rows"]]
        found["rows"] = found["rows"].merge(timings[["point", "row", *new]], on=["point", "row"])
    return found | {"run": json.loads((folder / "run.json").read_text(encoding="utf-8"))}


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
    is the result's path from ``folder``.
    """
    folder = Path(folder)
    found = sorted(
        path.parent
        for path in folder.rglob("run.json")
        if not any(part.startswith(".") for part in path.parts)
    )
    tables = {str(run.relative_to(folder)): read(run).get("rows") for run in found}
    tables = {name: table for name, table in tables.items() if table is not None}
    if not tables:
        raise BadInput(
            f"{folder} holds no result of cortexlab: no run.json with rows.parquet beside it"
        )
    return pd.concat(tables, names=["run"]).reset_index("run").reset_index(drop=True)
