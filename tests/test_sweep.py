"""A sweep leaves one table, with equal rows in one process, in two, on a Dask cluster, and after it
was killed at any moment.
"""

import html
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from cortexlab import metrics
from cortexlab.cli.main import main
from cortexlab.results import report, sweep, sweep_pool, sweep_worker
from cortexlab.results.sweep import Point, SweepSpec

ROOT = Path(__file__).parent.parent
GRID = """function: replay
parameters: {workload: lognormal, request_rate: 8.0, num_requests: 300}
grid:
  block_size: [1, 4, 16, 64]
  strategy: [cortexstream, paged, runs, buddy, static]
  seed: [1, 2]
"""


@pytest.fixture
def file(tmp_path) -> Path:
    """A sweep file of 40 points."""
    path = tmp_path / "forty.yaml"
    path.write_text(GRID)
    return path


def replay_spec(grid: dict, **parameters) -> SweepSpec:
    return SweepSpec(file=Path("x.yaml"), function="replay", parameters=parameters, grid=grid)


def rows_in(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "forty" / "rows.parquet")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> pd.DataFrame:
    """The rows of a sweep that was not killed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "forty.yaml").write_text(GRID)
    assert main(["sweep", str(folder / "forty.yaml"), "--out", str(folder)]) == 0
    return rows_in(folder)


def test_each_point_has_a_row_with_the_swept_parameters_in_order_of_its_name(expected):
    assert len(expected) == 40
    assert expected["point"].is_monotonic_increasing and expected["point"].is_unique
    for name in ("strategy", "block_size"):
        assert list(expected[f"param_{name}"]) == list(expected[name])
    assert "seconds" not in expected and expected["completed"].eq(300).all()


def test_a_sweep_killed_three_times_ends_with_equal_rows_and_runs_no_finished_point_again(
    file, tmp_path, expected
):
    rng, folder = random.Random(7), tmp_path / "forty" / "points"
    stamps: dict[str, int] = {}
    for _ in range(3):
        process = start(file, tmp_path, "--jobs", "2")
        while process.poll() is None:
            if len(list(folder.glob("*.parquet"))) >= len(stamps) + rng.randint(2, 6):
                break
            time.sleep(0.01)
        time.sleep(rng.random() / 5)
        assert process.poll() is None, "the sweep ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        files = [path for path in folder.glob("*.parquet") if not path.name.startswith(".")]
        found = {path.name: path.stat().st_mtime_ns for path in files}
        assert stamps.items() <= found.items() and 0 < len(found) < 40
        assert all(len(pd.read_parquet(path)) == 1 for path in files), "a file is not whole"
        assert not (tmp_path / "forty" / "rows.parquet").exists()
        stamps = found
    assert start(file, tmp_path, "--jobs", "2").wait() == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    assert_frame_equal(rows_in(tmp_path), expected)


def start(file: Path, out: Path, *options: str) -> subprocess.Popen:
    """A sweep in a process group of its own."""
    command = [sys.executable, "-m", "cortexlab", "sweep", str(file), "--out", str(out), *options]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, **silent)


def test_a_sweep_that_is_running_is_not_started_twice(file, tmp_path, capsys, expected):
    process, folder = start(file, tmp_path), tmp_path / "forty" / "points"
    try:
        while process.poll() is None and not list(folder.glob("*.parquet")):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        assert main(["sweep", str(file), "--out", str(tmp_path)]) == 2
        assert "another process" in capsys.readouterr().err
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert main(["sweep", str(file), "--out", str(tmp_path)]) == 0, "the lock outlives its process"
    assert_frame_equal(rows_in(tmp_path), expected)


DASK = "an extra: pip install 'cortexlab[dask]'"


def test_two_processes_of_a_dask_cluster_yield_equal_rows(file, tmp_path, expected):
    distributed = pytest.importorskip("distributed", reason=DASK)
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True}
    options |= {"host": "127.0.0.1", "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        words = ["--out", str(tmp_path), "--dask", cluster.scheduler_address]
        assert main(["sweep", str(file), *words]) == 0
    assert_frame_equal(rows_in(tmp_path), expected)


def test_the_address_of_a_missing_dask_scheduler_is_refused_by_name(file, tmp_path, capsys):
    pytest.importorskip("distributed", reason=DASK)
    assert main(["sweep", str(file), "--out", str(tmp_path), "--dask", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_point_has_a_new_name_after_an_edit_of_its_trace_or_of_an_allocator(
    tmp_path, monkeypatch
):
    package = tmp_path / "cortexlab"
    shutil.copytree(ROOT / "cortexlab", package, ignore=shutil.ignore_patterns("__pycache__"))
    trace = tmp_path / "t.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    )
    spec = replay_spec({"block_size": [16]}, trace=str(trace))

    def name() -> str:
        (point,) = sweep.named(spec, sweep.FUNCTIONS["replay"])
        return point.name

    first = name()
    assert name() == first
    trace.write_text(trace.read_text().replace("374", "375"))
    second = name()
    assert second != first
    edited = package / "allocators" / "paged.py"
    assert sweep_worker.package_sha256(package) == sweep_worker.LOADED
    edited.write_text(edited.read_text() + "\n# edited\n")
    # A process that starts after the edit loads the edited source.
    monkeypatch.setattr(sweep_worker, "LOADED", sweep_worker.package_sha256(package))
    assert name() not in (first, second)


def test_a_worker_with_other_source_refuses_a_point(monkeypatch):
    work = sweep.FUNCTIONS["replay"]
    (point,) = sweep.named(replay_spec({"num_requests": [3]}), work)
    assert len(sweep._run(work, point).rows) == 1
    monkeypatch.setattr(sweep_worker, "LOADED", b"another")
    assert "source" in sweep._run(work, point).error


def test_a_notebooks_point_is_named_by_its_code_cells_and_not_by_its_text_cells(monkeypatch):
    def name(*cells) -> str:
        text = nbformat.writes(nbformat.v4.new_notebook(cells=list(cells)))
        return sweep.name_of(sweep_worker.Notebook(text, "."), {"seed": 1})

    code, words = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    first = name(code("a = 1"), words("one"))
    assert first == name(code("a = 1"), words("two")) == name(words("two"), code("a = 1"))
    assert len({first, name(code("a = 2")), name(code("a ="), code("1"))}) == 3
    monkeypatch.setattr(sweep_worker, "package_sha256", lambda: b"another")
    assert name(code("a = 1"), words("one")) != first


def test_a_failed_point_keeps_its_error_stops_no_other_point_and_runs_again_only_with_retry(
    tmp_path, capsys
):
    arguments = sweep_of(tmp_path, "{num_requests: 20}", "{strategy: [paged, nonsense]}")
    assert main(arguments) == 1
    assert "nonsense" in capsys.readouterr().out
    assert list(rows_in(tmp_path)["strategy"]) == ["paged"]
    (error,) = (tmp_path / "forty" / "points").glob("*.error.txt")
    before = error.stat().st_mtime_ns
    assert "nonsense" in error.read_text()
    assert main(arguments) == 1 and error.stat().st_mtime_ns == before, "the point ran again"
    assert main([*arguments, "--retry"]) == 1 and error.stat().st_mtime_ns > before


def sweep_of(folder: Path, parameters: str, grid: str, more: str = "") -> list[str]:
    """Arguments of the sweep ``forty`` of replays, written to ``folder``."""
    file = folder / "forty.yaml"
    file.write_text(f"function: replay\nparameters: {parameters}\ngrid: {grid}\n{more}\n")
    return ["sweep", str(file), "--out", str(folder)]


def test_a_point_that_succeeds_when_retried_leaves_no_error_file(tmp_path):
    point, rows = Point("abc", {}), pd.DataFrame({"a": [1]})
    sweep._keep(tmp_path, point, sweep_worker.Outcome(1.0, error="boom", notebook="{}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abc.error.txt", "abc.failed.ipynb"]
    sweep._keep(tmp_path, point, sweep_worker.Outcome(1.0, rows=rows, notebook="{}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abc.ipynb", "abc.parquet"]


# --- what a sweep started ends with it ------------------------------------------------------------


def notebook(file: Path, parameters: str, *cells: str) -> None:
    """Write a notebook as nbformat does by itself: without the name of a kernel."""
    first = nbformat.v4.new_code_cell(f"rows_file: str = ''\n{parameters}")
    first.metadata["tags"] = ["parameters"]
    others = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *others]), file)


def notebook_sweep(folder: Path, grid: str, *cells: str, more: str = "") -> Path:
    """The sweep ``forty`` of a notebook with a parameter ``n``, which leaves a row for each."""
    write = "import pandas\npandas.DataFrame({'a': [n]}).to_parquet(rows_file)"
    notebook(folder / "own.ipynb", "n: int = 1", "import os, pathlib, time", *cells, write)
    file = folder / "forty.yaml"
    file.write_text(f"notebook: own.ipynb\ngrid: {grid}\n{more}\n")
    return file


def marked(mark: str) -> list[str]:
    """Command lines of the processes whose environment holds ``mark``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def until(is_so, seconds: float) -> float:
    """Seconds until ``is_so()``, at most ``seconds``."""
    started = time.monotonic()
    while not is_so():
        passed = time.monotonic() - started
        assert passed < seconds, "it never came to be so"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize(
    ("number", "jobs", "send"),
    [
        ("SIGINT", 1, os.killpg),  # as a terminal does
        ("SIGINT", 2, os.killpg),
        ("SIGTERM", 1, os.kill),
        ("SIGTERM", 2, os.kill),
        ("SIGHUP", 2, os.killpg),
        ("SIGKILL", 2, os.kill),
    ],
)
def test_no_process_of_a_sweep_is_left_after_a_signal_and_the_same_command_goes_on(
    tmp_path, monkeypatch, number, jobs, send
):
    mark = f"CORTEXLAB_TEST_{os.getpid()}_{number}_{jobs}"
    wait = (
        "pathlib.Path(f'begun{n}').touch()\nwhile not pathlib.Path('go').exists(): time.sleep(.1)"
    )
    file = notebook_sweep(tmp_path, "{n: [1, 2]}", wait)
    with monkeypatch.context() as context:
        context.setenv(mark, "1")
        process = start(file, tmp_path, "--jobs", str(jobs))
    until(lambda: len(list(tmp_path.glob("begun*"))) == jobs, 60)
    assert sum("ipykernel" in words for words in marked(mark)) == jobs
    send(process.pid, signal.Signals[number])
    code = process.wait(20)
    until(lambda: not marked(mark), 20)
    assert code == (130 if number == "SIGINT" else -signal.Signals[number])
    assert not list((tmp_path / "forty" / "points").glob("*.error.txt"))
    if number == "SIGKILL":
        (tmp_path / "go").touch()
        assert start(file, tmp_path, "--jobs", "2").wait() == 0 and len(rows_in(tmp_path)) == 2


def test_a_killed_worker_costs_its_point_at_most(tmp_path, capsys):
    """Point 2 kills its worker always, point 3 once."""
    kill = "once = pathlib.Path('once')\nif n == 2 or n == 3 and not once.exists():\n"
    kill += "    n == 3 and once.touch()\n    os.kill(os.getppid(), 9)\n    time.sleep(60)"
    file = notebook_sweep(tmp_path, "{n: [1, 2, 3, 4]}", kill)
    assert main(["sweep", str(file), "--out", str(tmp_path), "--jobs", "2"]) == 1
    assert sorted(rows_in(tmp_path)["param_n"]) == [1, 3, 4]
    failed, _, last = capsys.readouterr().out.splitlines()
    assert "{'n': 2}" in failed and "its worker was killed" in failed
    assert last.startswith("3 points (0 done before), 1 failed: ")
    (told,) = json.loads((tmp_path / "forty" / "run.json").read_text())["points"]["failed"]
    assert told["parameters"] == {"n": 2} and "killed" in told["error"]
    page = report.write(tmp_path / "forty").read_text()
    assert "1 of 4 points failed" in page and html.escape(told["error"]) in page


def test_a_worker_killed_between_two_points_stops_nothing(tmp_path, monkeypatch):
    """Killed while the sweep writes the outcome of its first point."""
    keep, start, workers, killed = sweep._keep, sweep_pool.Worker._start, [], []

    def starting(worker):
        start(worker)
        workers.append(worker)

    def killing(folder, point, outcome):
        if not killed:
            killed.extend(workers[-1]._pool._processes)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            time.sleep(1)
        keep(folder, point, outcome)

    monkeypatch.setattr(sweep_pool.Worker, "_start", starting)
    monkeypatch.setattr(sweep, "_keep", killing)
    words = sweep_of(tmp_path, "{num_requests: 5}", "{seed: [1, 2, 3]}")
    assert main([*words, "--point-timeout", "60"]) == 0
    assert killed and len(rows_in(tmp_path)) == 3


def test_a_damaged_point_is_run_again(tmp_path):
    words = sweep_of(tmp_path, "{num_requests: 5}", "{seed: [1, 2]}")
    assert main(words) == 0
    file = min((tmp_path / "forty" / "points").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:50])
    assert main(words) == 0 and len(rows_in(tmp_path)) == 2


def test_a_cell_that_never_ends_fails_its_point_only(tmp_path, capsys):
    file = notebook_sweep(tmp_path, "{n: [1, 2]}", "while n == 2: pass", more="timeout: 2")
    assert main(["sweep", str(file), "--out", str(tmp_path)]) == 1
    assert list(rows_in(tmp_path)["param_n"]) == [1]
    assert "{'n': 2}: 'a cell took longer than 2 s" in capsys.readouterr().out
    (left,) = (tmp_path / "forty" / "points").glob("*.failed.ipynb")
    assert "while n == 2" in left.read_text()


def test_a_replay_that_takes_too_long_fails_its_point_only(tmp_path, capsys):
    words = sweep_of(tmp_path, "{}", "{num_requests: [20, 1000000]}")
    assert main([*words, "--point-timeout", "2.5"]) == 1
    assert list(rows_in(tmp_path)["param_num_requests"]) == [20]
    assert "1000000}: 'took longer than 2.5 s" in capsys.readouterr().out


def test_a_time_limit_is_checked_before_anything_runs(tmp_path, capsys):
    words = sweep_of(tmp_path, "{}", "{seed: [1]}")
    assert main([*words, "--point-timeout", "0"]) == 2
    assert "--point-timeout must be seconds above 0, not 0.0" in capsys.readouterr().err
    assert main([*words, "--point-timeout", "1", "--dask", "tcp://127.0.0.1:1"]) == 2
    assert "Dask cannot stop it" in capsys.readouterr().err


def cluster(num_workers: int):
    distributed = pytest.importorskip("distributed", reason=DASK)
    options = {"n_workers": num_workers, "threads_per_worker": 1, "processes": True}
    return distributed.LocalCluster(**options, host="127.0.0.1", dashboard_address=None)


def test_a_killed_worker_of_a_dask_cluster_costs_its_point_only():
    pytest.importorskip("distributed", reason=DASK)
    import dask

    def run(n: int) -> sweep_worker.Outcome:
        import os

        return os.kill(os.getpid(), 9) if n == 2 else sweep_worker.Outcome(float(n))

    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), cluster(1) as workers:
        found = dict(sweep_pool.on_dask(run, [1, 2, 3], workers.scheduler_address))
    assert "its worker was killed" in found[2].error
    assert [found[n].seconds for n in (1, 3)] == [1.0, 3.0]


def test_a_dask_scheduler_without_workers_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_pool, "DASK_S", 2.0)
    words = sweep_of(tmp_path, "{num_requests: 5}", "{seed: [1]}")
    with cluster(0) as empty:
        assert main([*words, "--dask", empty.scheduler_address]) == 2
    error = capsys.readouterr().err
    assert "has no workers" in error and error.count("\n") == 1


# --- values of the grid ---------------------------------------------------------------------------


def test_equal_numbers_are_one_point_and_a_truth_is_no_number():
    work = sweep.FUNCTIONS["replay"]
    assert len(sweep.named(replay_spec({"request_rate": [30, 30.0, 8.5]}), work)) == 2
    assert sweep.name_of(work, {"n": 1}) == sweep.name_of(work, {"n": 1.0})
    assert sweep.name_of(work, {"n": [2]}) == sweep.name_of(work, {"n": [2.0]})
    assert sweep.name_of(work, {"n": 1}) != sweep.name_of(work, {"n": True})


def test_an_infinite_value_is_a_text_in_run_json(tmp_path):
    assert main(sweep_of(tmp_path, "{num_requests: 5}", "{request_rate: [.inf, 8]}")) == 0

    def refused(name: str):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "forty" / "run.json").read_text()
    run = json.loads(text, parse_constant=refused)
    assert run["spec"]["grid"] == {"request_rate": ["inf", 8]}
    assert run["points"] == {"done": 2, "failed": []}


@pytest.mark.parametrize(
    ("values", "plot", "names"),
    [
        ("[1, .inf]", "{x: v, lines: w}", "plot.x is v, but no axis can show '.inf'"),
        (f"[1, {10**400}]", "{x: v, lines: w}", "plot.x is v, but no axis can show '1000"),
        ("[1, null]", "{x: v, lines: w}", "plot.x is v, but no axis can show 'null'"),
        ("[[1, 2]]", "{x: v, lines: w}", "plot.x is v, but no axis can show '[1, 2]'"),
        ("[1, a]", "{x: v, lines: w}", "no axis can show both texts and numbers"),
        ("[null, a]", "{x: w, lines: v}", "plot.lines is v, but no line can be named 'null'"),
    ],
)
def test_values_that_a_plot_cannot_show_are_refused_in_one_line(
    tmp_path, capsys, values, plot, names
):
    notebook(tmp_path / "own.ipynb", "v = 1\nw = 1")
    file = tmp_path / "bad.yaml"
    file.write_text(f"notebook: own.ipynb\ngrid: {{v: {values}, w: [1, 2]}}\nplot: {plot}")
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert names in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    file.write_text(f"notebook: own.ipynb\ngrid: {{v: {values}, w: [1, 2]}}")
    assert SweepSpec.load(file).grid["w"] == [1, 2], "what is not drawn may be anything"


SEEDS = "{seed: [1, 2], block_size: [1, 8]}"
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"


def test_seeds_that_change_nothing_are_said_to(tmp_path, capsys):
    (tmp_path / "t.csv").write_text(TRACE)
    assert main(sweep_of(tmp_path, "{trace: t.csv, num_blocks: unlimited}", SEEDS)) == 0
    assert "the rows of seed 1, 2 are equal: the seed changes nothing" in capsys.readouterr().out
    assert main(sweep_of(tmp_path, "{num_requests: 20}", "{seed: [1, 2]}")) == 0
    assert "equal" not in capsys.readouterr().out


# --- what lies beside the sweep file --------------------------------------------------------------

TIDY = "from cortexlab.allocators import Paged\n\nclass Tidy(Paged):\n    pass\n"


def test_a_strategy_of_ones_own_lies_beside_the_sweep_file_and_names_its_points(tmp_path, capsys):
    (tmp_path / "mine_swept.py").write_text(TIDY)
    words = sweep_of(tmp_path, "{num_requests: 20}", "{strategy: ['mine_swept:Tidy', paged]}")
    assert main(words) == 0
    rows = rows_in(tmp_path).set_index("param_strategy")
    assert list(rows["strategy"].sort_index()) == ["Tidy", "paged"]
    assert rows["peak_blocks"].nunique() == 1
    (tmp_path / "mine_swept.py").write_text(TIDY + "\n# edited\n")
    assert main(words) == 0
    assert "2 points (1 done before)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "reason"), [("", "Tidy"), ("1 / 0", "division"), ("Tidy = int", "int")]
)
def test_a_strategy_that_cannot_be_used_is_refused_before_anything_runs(
    tmp_path, capsys, source, reason
):
    module = f"mine_{len(source)}"
    (tmp_path / f"{module}.py").write_text(source)
    words = sweep_of(tmp_path, "{num_requests: 20}", f"{{strategy: [paged, '{module}:Tidy']}}")
    assert main([*words[:-1], str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"cannot use strategy '{module}:Tidy'" in error and reason in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_relative_trace_is_one_file_for_hash_and_notebook(tmp_path, monkeypatch):
    """The sweep file lies in ``grids``, its notebook in ``books``; the command runs elsewhere."""
    for folder in ("grids", "books", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_text(TRACE.replace("374", str(len(folder))))
    read = "import pandas\npandas.read_csv(trace).to_parquet(rows_file)"
    notebook(tmp_path / "books" / "own.ipynb", "trace: str = ''", read)
    file = tmp_path / "grids" / "forty.yaml"
    file.write_text("notebook: ../books/own.ipynb\ngrid: {trace: [t.csv]}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = SweepSpec.load(file)
    (before,) = sweep.named(spec, spec.work())
    assert main(["sweep", str(file), "--out", str(tmp_path)]) == 0
    (row,) = rows_in(tmp_path).to_dict("records")
    assert (row["point"], row["param_trace"]) == (before.name, "t.csv")
    assert row["ContextTokens"] == len("grids")
    (tmp_path / "grids" / "t.csv").write_text(TRACE)
    assert sweep.named(spec, spec.work()) != [before]


def test_a_replays_points_are_named_by_the_rows_that_they_use(tmp_path):
    trace = tmp_path / "t.csv"
    file = tmp_path / "forty.yaml"
    file.write_text("function: replay\ngrid: {trace: [t.csv], num_requests: [1, 0]}")
    spec, names = SweepSpec.load(file), []
    for more in ("", "2023-11-16 19:15:46.6805900,374,44\n"):
        trace.write_text(TRACE + more)
        names.append(
            {each.parameters["num_requests"]: each.name for each in sweep.named(spec, spec.work())}
        )
    before, after = names
    assert before[1] == after[1] and before[0] != after[0]


# --- notebooks ------------------------------------------------------------------------------------


def test_a_notebook_without_a_kernels_name_runs_and_its_rows_are_asked_for_by_name(
    tmp_path, capsys
):
    """Point 1 leaves no rows, 2 no Parquet, 3 and 4 columns that are the sweep's, 5 a row."""
    write = "if n == 2: pathlib.Path(rows_file).write_text('a')\n"
    write += "import pandas\nnames = {3: 'row', 4: 'param_n', 5: 'a'}\n"
    write += "if n > 2: pandas.DataFrame({names[n]: [n]}).to_parquet(rows_file)"
    notebook(tmp_path / "own.ipynb", "n: int = 1", "import pathlib", write)
    file = tmp_path / "forty.yaml"
    file.write_text("notebook: own.ipynb\ngrid: {n: [1, 2, 3, 4, 5]}")
    assert main(["sweep", str(file), "--out", str(tmp_path), "--jobs", "2"]) == 1
    assert list(rows_in(tmp_path)["a"]) == [5]
    out = capsys.readouterr().out
    told = {
        n: next(line for line in out.splitlines() if f"{{'n': {n}}}" in line) for n in range(1, 5)
    }
    assert "wrote no rows" in told[1] and "to_parquet(rows_file)" in told[1]
    assert "not Parquet" in told[2] and "to_parquet(rows_file)" in told[2]
    assert "'row'" in told[3] and "'param_n'" in told[4]


@pytest.mark.parametrize("text", ['{"cells": [', "[]", "{}", '{"nbformat": 4, "cells": 3}', ""])
def test_a_damaged_notebook_is_refused_in_one_line(tmp_path, capsys, text):
    (tmp_path / "own.ipynb").write_text(text)
    file = tmp_path / "bad.yaml"
    file.write_text("notebook: own.ipynb\ngrid: {n: [1]}")
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "own.ipynb is no notebook" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- refusals -------------------------------------------------------------------------------------

ONE_SEED = "function: replay\ngrid: {seed: [1]}\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("function: nonsense\ngrid: {seed: [1]}", "nonsense"),
        ("function: replay\ngrid: {nonsense: [1]}", "nonsense"),
        ("function: replay\ngrid: {block_size: ['16']}", "'16'"),
        ("function: replay\nparameters: {seed: 1}\ngrid: {seed: [1]}", "seed"),
        ("function: replay\ngrid: {trace: [nowhere]}", "nowhere"),
        ("function: replay\nnotebook: x.ipynb\ngrid: {seed: [1]}", "function"),
        ("function: [a]\ngrid: {seed: [1]}", "['a']"),
        ("function: replay\ngrid: {oom_policy: [wait, foo]}", "bad.yaml: unknown oom_policy 'foo'"),
        ("function: replay\ngrid: {watermark: [0.1, 5.0]}", "watermark must be a share"),
        (ONE_SEED + "plot: {x: [1], lines: strategy}", "plot.x"),
        (ONE_SEED + "plot: {x: strategy, lines: seed}", "plot.x"),
        (ONE_SEED + "plot: {x: seed, lines: strategy, y: token_share}", "plot.y"),
        (ONE_SEED + "plot: {x: seed, lines: strategy, z: a}", "'z'"),
    ],
)
def test_a_bad_replay_sweep_is_refused_in_one_line(tmp_path, capsys, text, names):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert names in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_parameter_of_a_notebook_is_not_taken_for_an_option(tmp_path, capsys):
    cell = nbformat.v4.new_code_cell("rows_file: str = ''\nname: str = ''")
    cell.metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    body = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    (tmp_path / "own.ipynb").write_text(nbformat.writes(body))
    (tmp_path / "bad.yaml").write_text("notebook: own.ipynb\ngrid: {name: [3]}")
    assert main(["sweep", str(tmp_path / "bad.yaml"), "--out", str(tmp_path)]) == 2
    assert "bad.yaml: parameter 'name' must be str, not 3\n" in capsys.readouterr().err


def test_a_list_as_a_parameters_value_is_a_text_in_its_rows():
    points = [Point(name, {"strategies": ["paged", name]}) for name in ("runs", "static")]
    rows = pd.concat(pd.DataFrame({"output_throughput": [1.0]}).assign(**p.columns) for p in points)
    assert list(rows["param_strategies"]) == ["['paged', 'runs']", "['paged', 'static']"]
    assert len(report.summary(rows)) == 2


@pytest.mark.parametrize(
    "plot", ["{x: seed, lines: nothing}", "{x: seed, lines: strategy, y: [nothing]}"]
)
def test_a_missing_column_to_plot_is_reported_after_the_rows_are_written(tmp_path, capsys, plot):
    assert main(sweep_of(tmp_path, "{num_requests: 5}", "{seed: [1]}", f"plot: {plot}")) == 1
    *_, told = capsys.readouterr().out.splitlines()
    assert told.startswith("no figure: the rows have no column 'nothing'")
    assert len(rows_in(tmp_path)) == 1


def test_a_column_without_numbers_is_not_drawn_and_said_so_in_one_line(tmp_path, capsys):
    plot = "plot: {x: seed, lines: block_size, y: [strategy]}"
    assert main(sweep_of(tmp_path, "{num_requests: 5}", "{seed: [1]}", plot)) == 1
    *_, told = capsys.readouterr().out.splitlines()
    assert told == "no figure: column 'strategy' has no numbers"


def test_a_sweep_does_not_write_into_another_commands_result(tmp_path, capsys):
    words = ["replay", "--requests", "5", "--out", str(tmp_path), "--name", "forty"]
    assert main(words) == 0
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "forty").iterdir())
    assert main(sweep_of(tmp_path, "{num_requests: 5}", "{seed: [1]}")) == 2
    assert "are of another command" in capsys.readouterr().err
    assert before == sorted((path, path.read_bytes()) for path in (tmp_path / "forty").iterdir())


def test_swept_words_are_drawn_without_a_logarithmic_scale(tmp_path, recwarn):
    plot = "plot: {x: workload, lines: strategy}"
    assert main(sweep_of(tmp_path, "{num_requests: 5}", "{workload: [chat, lognormal]}", plot)) == 0
    assert (tmp_path / "forty" / "sweep.png").exists()
    assert not [each for each in recwarn if "log" in str(each.message)]


def test_of_many_failed_points_the_first_are_printed_and_the_others_counted(tmp_path, capsys):
    assert main(sweep_of(tmp_path, "{num_requests: -1}", f"{{seed: {list(range(30))}}}")) == 1
    out = capsys.readouterr().out
    assert out.count("failed: {") == sweep.MOST_TOLD and "and 20 more" in out
    assert out.splitlines()[-1] == "0 points (0 done before), 30 failed: there are no rows"


def test_jobs_below_one_are_refused(file, tmp_path, capsys):
    assert main(["sweep", str(file), "--out", str(tmp_path), "--jobs", "0"]) == 2
    assert "jobs" in capsys.readouterr().err


def test_goodput_counts_requests_served_in_time():
    """Five requests in 2 s: in time; first token late; later tokens slow; failed; in time with one
    token, which has no TPOT.
    """
    requests = pd.DataFrame(
        {
            "state": ["finished", "finished", "finished", "failed", "finished"],
            "arrived_at": [0.0, 0.0, 0.0, 0.0, 1.0],
            "first_token_at": [0.1, 0.9, 0.1, None, 1.1],
            "finished_at": [0.5, 1.0, 2.0, 0.2, 1.1],
            "output_tokens": [5, 2, 5, 5, 1],
        }
    )
    assert metrics.goodput(requests, 2.0, ttft=0.5, tpot=0.1) == 1.0
