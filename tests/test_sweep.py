"""A sweep leaves one table, with equal rows in one process, in two, on a Dask cluster, and after it
was killed at any moment.
"""

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
from cortexlab.results import report, sweep, sweep_worker
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
    assert len(sweep._run(work, point)[1].rows) == 1
    monkeypatch.setattr(sweep_worker, "LOADED", b"another")
    assert "source" in sweep._run(work, point)[1].error


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
    assert main(sweep_of(tmp_path, "{num_requests: 5}", "{seed: [1]}", f"plot: {plot}")) == 2
    error = capsys.readouterr().err
    assert "'nothing'" in error and error.count("\n") == 1 and len(rows_in(tmp_path)) == 1


def test_swept_words_are_drawn_without_a_logarithmic_scale(tmp_path, recwarn):
    plot = "plot: {x: workload, lines: strategy}"
    assert main(sweep_of(tmp_path, "{num_requests: 5}", "{workload: [chat, lognormal]}", plot)) == 0
    assert (tmp_path / "forty" / "sweep.png").exists()
    assert not [each for each in recwarn if "log" in str(each.message)]


def test_of_many_failed_points_the_first_are_printed_and_the_others_counted(tmp_path, capsys):
    assert main(sweep_of(tmp_path, "{num_requests: -1}", f"{{seed: {list(range(30))}}}")) == 1
    out = capsys.readouterr().out
    assert out.count("failed: ") == sweep.MOST_TOLD and "and 20 more" in out


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
