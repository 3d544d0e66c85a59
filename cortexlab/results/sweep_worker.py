"""One point of a sweep, on any machine: a notebook through papermill, or a replay. Takes plain
values and returns an `Outcome`.

Only the process that started the sweep writes results, so points need no folder that all machines
share.
"""

import hashlib
import inspect
import json
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import pandas as pd

from .. import metrics
from .. import replay as replays
from ..allocators.own import own_source, own_strategy
from ..errors import BadInput, shown
from ..options import ReplayOptions
from ..workloads.synthetic import REPLAY_RATE, make_workload, scale, with_arrivals
from ..workloads.traces import KNOWN, find_trace, load_trace

ROWS_PARAMETER = "rows_file"  # a notebook leaves its rows there (Parquet)
OWN_COLUMNS = ("point", "row", "point_seconds")  # of a sweep, beside the parameters
SWEEP_REQUESTS = 1000  # of a synthetic workload: fewer than one replay's, since points are many


def sha256(parts: Iterable[bytes]) -> str:
    """SHA-256 of the parts; where a part ends changes it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def package_sha256(package: Path = Path(__file__).parents[1]) -> bytes:
    """SHA-256 of the names and contents of the package's files."""
    files = sorted(package.rglob("*.py"))
    return sha256(
        part
        for path in files
        for part in (str(path.relative_to(package)).encode(), path.read_bytes())
    ).encode()


LOADED = package_sha256()  # source that this process runs, even if a file is edited later


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a point: rows or an error."""

    seconds: float  # on the wall clock
    rows: pd.DataFrame | None = None
    error: str | None = None
    notebook: str | None = None  # the executed notebook as JSON; None for a function


@dataclass(frozen=True, slots=True)
class Notebook:
    """A notebook to run in ``folder``. A relative trace is relative to ``beside``."""

    body: str  # the notebook as JSON
    folder: str
    beside: str = ""
    overhead_s: ClassVar = 30.0  # a kernel may take as long to start and to end

    def source(self, parameters: dict) -> list[bytes]:
        """All code that a point runs: the package on disk, for a new kernel, and the cells."""
        cells = [cell for cell in json.loads(self.body)["cells"] if cell["cell_type"] == "code"]
        return [package_sha256(), *("".join(cell["source"]).encode() for cell in cells)]

    def __call__(self, parameters: dict, timeout: float | None = None) -> Outcome:
        """The rows that the notebook leaves; no cell may run for longer than ``timeout`` s."""
        import papermill
        from nbclient.exceptions import CellTimeoutError

        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="cortexlab-") as scratch:
            body, executed, rows = (
                Path(scratch) / name for name in ("body.ipynb", "executed.ipynb", "rows.parquet")
            )
            body.write_text(self.body, encoding="utf-8")
            found, error = None, None
            try:
                papermill.execute_notebook(
                    str(body),
                    str(executed),
                    located(parameters, self.beside) | {ROWS_PARAMETER: str(rows)},
                    cwd=self.folder,
                    progress_bar=False,
                    log_output=False,
                    execution_timeout=timeout and math.ceil(timeout),
                    extra_arguments=["--log-level=CRITICAL"],  # of ipykernel: errors are kept
                )
                found = _left_in(rows)
            except BadInput as raised:
                error = str(raised)
            except CellTimeoutError:
                error = f"a cell took longer than {timeout:g} s, the time limit of a point"
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            text = executed.read_text(encoding="utf-8") if executed.exists() else None
        return Outcome(time.perf_counter() - started, found, error, text)


def _left_in(file: Path) -> pd.DataFrame:
    """The rows that a notebook left in ``file``, or `BadInput` that says what to do."""
    how = f"write a data frame to the path in {ROWS_PARAMETER}: frame.to_parquet({ROWS_PARAMETER})"
    if not file.exists():
        raise BadInput(f"the notebook wrote no rows: {how}")
    try:
        found = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"the notebook's rows are not Parquet: {how}") from error
    own = [name for name in found if name in OWN_COLUMNS or str(name).startswith(metrics.PREFIX)]
    if own:
        raise BadInput(
            f"the notebook's rows have a column {own[0]!r}, which the sweep writes: rename it "
            f"({', '.join(OWN_COLUMNS)} and {metrics.PREFIX}* are the sweep's)"
        )
    return found


@dataclass(frozen=True, slots=True)
class Function:
    """A function of this package that returns a table. A relative trace, and the module of a user's
    own strategy, are looked for in ``beside``.
    """

    function: Callable[..., pd.DataFrame]
    beside: str = ""
    overhead_s: ClassVar = 0.0

    def source(self, parameters: dict) -> list[bytes]:
        """All code that a point runs: the loaded package and the user's strategy."""
        own = parameters.get("strategy", "")
        named = [LOADED, self.function.__name__.encode()]
        if ":" not in own:
            return named
        own_strategy(own, [self.beside])
        return [*named, own_source(own)]

    def __call__(self, parameters: dict, timeout: float | None = None) -> Outcome:
        """The rows that the function returns; ``timeout`` is its caller's to keep."""
        started = time.perf_counter()
        found, error = None, None
        given = located(parameters, self.beside)
        try:
            if ":" in given.get("strategy", ""):
                given["strategy"] = own_strategy(given["strategy"], [self.beside])
            found = self.function(**given)
        except Exception:
            error = traceback.format_exc()
        return Outcome(time.perf_counter() - started, found, error)

    def known(self) -> dict[str, type]:
        """Parameter -> its type."""
        return {
            name: parameter.annotation
            for name, parameter in inspect.signature(self.function).parameters.items()
        }


def located(parameters: dict, folder: str) -> dict:
    """The parameters with the path of a trace that is relative to ``folder`` made absolute."""
    trace = parameters.get("trace")
    is_path = isinstance(trace, str) and trace and trace not in KNOWN
    return parameters | ({"trace": str(Path(folder).absolute() / trace)} if is_path else {})


def trace_of(parameters: dict, folder: str, num_rows: int = 0) -> bytes:
    """The first ``num_rows`` requests of the trace that the parameters name, or (0) all of its
    file. `BadInput` where it is missing.
    """
    trace = located(parameters, folder).get("trace")
    if not trace or not isinstance(trace, str):
        return b""
    path = find_trace(trace)
    return _first_rows(path, path.stat().st_mtime_ns, num_rows) if num_rows else path.read_bytes()


@lru_cache(maxsize=16)
def _first_rows(path: Path, _changed: int, num_requests: int) -> bytes:
    return repr(load_trace(str(path), num_requests=num_requests)).encode()


def replay(
    *,
    strategy: str = ReplayOptions.strategy,
    block_size: int = ReplayOptions.block_size,
    num_blocks: str = "60%",
    workload: str = "chat",
    trace: str = "",
    num_requests: int = 0,
    request_rate: float = 0.0,
    scale_lengths: float = 1.0,
    growth: str = "",
    oom_policy: str = ReplayOptions.oom_policy,
    watermark: float = ReplayOptions.watermark,
    max_batch_size: int = ReplayOptions.max_batch_size,
    prefix_caching: bool = ReplayOptions.prefix_caching,
    base_ms: float = 1000 * replays.reference.base_s,
    seed: int = 0,
) -> pd.DataFrame:
    """A row of `cortexlab.replay`, with its goodput. Zeros and empty texts stand for the
    defaults below.

    ``num_blocks``: a number, ``unlimited``, or a percentage of what ``paged`` holds at its peak
    when nothing limits it. ``request_rate``: requests a second (0: the trace's own times, or
    `REPLAY_RATE`). ``num_requests`` 0: all of a trace, or `SWEEP_REQUESTS`. ``growth`` empty: the
    strategy's. ``base_ms``: the constant part of a step's time on the virtual clock; the parts of
    tokens and sequences are the reference's.

    Columns ``goodput_<ttft>_<tpot>``: completed requests a second with a TTFT and a TPOT of at most
    so many ms (DistServe, OSDI 2024).
    """
    items = _items(workload, trace, num_requests, request_rate, scale_lengths, seed)
    options = {"growth": growth} if growth else {}
    done = replays.replay(
        items,
        [strategy],
        block_sizes=[block_size],
        num_blocks=int(num_blocks) if num_blocks.isdecimal() else num_blocks,
        max_batch_size=max_batch_size,
        oom_policy=oom_policy,
        watermark=watermark,
        prefix_caching=prefix_caching,
        step_time=replace(replays.reference, base_s=base_ms / 1000),
        **options,
    )
    tables = replays.tables(done)
    goodputs = {
        metrics.goodput_name(ttft, tpot): metrics.goodput(
            tables["requests"], tables["rows"]["duration"][0], ttft / 1000, tpot / 1000
        )
        for ttft, tpot in metrics.GOODPUTS
    }
    return tables["rows"].assign(**goodputs)


@lru_cache(maxsize=4)
def _items(
    workload: str,
    trace: str,
    num_requests: int,
    request_rate: float,
    scale_lengths: float,
    seed: int,
) -> list:
    if not trace:
        rate = request_rate or REPLAY_RATE
        return make_workload(
            workload,
            num_requests or SWEEP_REQUESTS,
            seed=seed,
            request_rate=rate,
            scale_lengths=scale_lengths,
        )
    items = scale(load_trace(trace, seed, num_requests or None), scale_lengths)
    return with_arrivals(items, request_rate, 1.0, seed) if request_rate else items


def last_line(error: str) -> str:
    """The last line of an error's text, which names the cause."""
    return shown((error.strip().splitlines() or ["no message"])[-1])
