"""Sweeps: killed for real at any moment, on one process, on two, on a Dask cluster; the table is
the same.
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
from cortexlab.results import sweep
from cortexlab.results import sweep_worker as points
from cortexlab.results.sweep import Point

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
    path = tmp_path / "forty.yaml"
    path.write_text(GRID)
    return path


def rows_in(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "forty" / "rows.parquet")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> pd.DataFrame:
    """Of a sweep that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "forty.yaml").write_text(GRID)
    assert main(["sweep", str(folder / "forty.yaml"), "--out", str(folder)]) == 0
    return rows_in(folder)


def test_a_row_a_point_sorted_with_what_was_swept(expected):
    assert (
        len(expected) == 40
        and expected["point"].is_monotonic_increasing
        and expected["point"].is_unique
    )
    assert set(zip(expected["param_strategy"], expected["param_block_size"], strict=True)) == set(
        zip(expected["strategy"], expected["block_size"], strict=True)
    )
    assert "seconds" not in expected and expected["completed"].eq(300).all()


def test_killed_three_times_it_ends_with_the_same_rows_and_runs_no_finished_point_again(
    file, tmp_path, expected
):
    rng, folder = random.Random(7), tmp_path / "forty" / "points"
    stamps: dict[str, int] = {}
    for _ in range(3):
        process = start(file, tmp_path, "--jobs", "2")
        known = len(stamps)
        while process.poll() is None and len(list(folder.glob("*.parquet"))) < known + rng.randint(
            2, 6
        ):
            time.sleep(0.01)
        time.sleep(rng.random() / 5)
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = {
            path.name: path.stat().st_mtime_ns
            for path in folder.glob("*.parquet")
            if not path.name.startswith(".")
        }
        assert stamps.items() <= found.items() and 0 < len(found) < 40
        assert all(len(pd.read_parquet(folder / name)) == 1 for name in found), "no half file"
        assert not (tmp_path / "forty" / "rows.parquet").exists()
        stamps = found
    assert start(file, tmp_path, "--jobs", "2").wait() == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    assert_frame_equal(rows_in(tmp_path), expected)


def start(file: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cortexlab", "sweep", str(file), "--out", str(out), *options]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_a_sweep_that_is_running_is_not_started_twice(file, tmp_path, capsys, expected):
    process = start(file, tmp_path)
    try:
        while process.poll() is None and not list(
            (tmp_path / "forty" / "points").glob("*.parquet")
        ):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        assert main(["sweep", str(file), "--out", str(tmp_path)]) == 2
        assert "another process" in capsys.readouterr().err
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert main(["sweep", str(file), "--out", str(tmp_path)]) == 0, "the lock ends with the process"
    assert_frame_equal(rows_in(tmp_path), expected)


def test_two_processes_of_a_dask_cluster_yield_the_same_rows(file, tmp_path, expected):
    distributed = pytest.importorskip(
        "distributed", reason="an extra: pip install 'cortexlab[dask]'"
    )
    options = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "processes": True,
        "host": "127.0.0.1",
        "dashboard_address": None,
    }
    with distributed.LocalCluster(**options) as cluster:
        assert (
            main(["sweep", str(file), "--out", str(tmp_path), "--dask", cluster.scheduler_address])
            == 0
        )
    assert_frame_equal(rows_in(tmp_path), expected)


def test_a_dask_scheduler_that_is_not_there_is_one_line(file, tmp_path, capsys):
    pytest.importorskip("distributed", reason="an extra: pip install 'cortexlab[dask]'")
    assert main(["sweep", str(file), "--out", str(tmp_path), "--dask", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_an_edited_allocator_and_an_edited_trace_make_points_new(tmp_path, monkeypatch):
    package = tmp_path / "cortexlab"
    shutil.copytree(ROOT / "cortexlab", package, ignore=shutil.ignore_patterns("__pycache__"))
    trace = tmp_path / "t.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    )
    spec = {"parameters": {"trace": str(trace)}, "grid": {"block_size": [16]}}

    def name() -> str:
        (point,) = sweep.named(spec, sweep.FUNCTIONS["replay"])
        return point.name

    first = name()
    assert name() == first
    trace.write_text(trace.read_text().replace("374", "375"))
    second = name()
    assert second != first
    edited = package / "allocators" / "paged.py"
    assert points.package_sha256(package) == points.LOADED
    edited.write_text(edited.read_text() + "\n# edited\n")
    monkeypatch.setattr(
        points, "LOADED", points.package_sha256(package)
    )  # as in a process that starts now
    assert name() not in (first, second)


def test_a_worker_with_other_source_refuses_a_point(monkeypatch):
    work = sweep.FUNCTIONS["replay"]
    (point,) = sweep.named({"parameters": {}, "grid": {"num_requests": [3]}}, work)
    assert len(sweep._run(work, point)[1].rows) == 1
    monkeypatch.setattr(points, "LOADED", b"another")
    assert "source" in sweep._run(work, point)[1].error


def test_a_notebooks_point_is_named_by_its_code_and_not_by_its_words(monkeypatch):
    def name(*cells) -> str:
        return sweep.name_of(
            points.Notebook(nbformat.writes(nbformat.v4.new_notebook(cells=list(cells))), "."),
            {"seed": 1},
        )

    code, words = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    first = name(code("a = 1"), words("one"))
    assert first == name(code("a = 1"), words("two")) == name(words("two"), code("a = 1"))
    assert len({first, name(code("a = 2")), name(code("a ="), code("1"))}) == 3
    monkeypatch.setattr(points, "package_sha256", lambda: b"another")
    assert name(code("a = 1"), words("one")) != first


def test_a_failed_point_keeps_its_error_stops_no_other_and_runs_again_only_when_told(
    tmp_path, capsys
):
    file = tmp_path / "forty.yaml"
    file.write_text(
        "function: replay\nparameters: {num_requests: 20}\ngrid: {strategy: [paged, nonsense]}\n"
    )
    arguments = ["sweep", str(file), "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "nonsense" in capsys.readouterr().out and list(rows_in(tmp_path)["strategy"]) == [
        "paged"
    ]
    (error,) = (tmp_path / "forty" / "points").glob("*.error.txt")
    before = error.stat().st_mtime_ns
    assert "nonsense" in error.read_text()
    assert main(arguments) == 1 and error.stat().st_mtime_ns == before, "left alone"
    assert main([*arguments, "--retry"]) == 1 and error.stat().st_mtime_ns > before


def test_a_point_that_works_when_retried_is_no_failure_any_more(tmp_path):
    point = Point("abc", {})
    sweep._keep(tmp_path, point, points.Outcome(1.0, error="boom", notebook="{}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abc.error.txt", "abc.failed.ipynb"]
    sweep._keep(tmp_path, point, points.Outcome(1.0, rows=pd.DataFrame({"a": [1]}), notebook="{}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abc.ipynb", "abc.parquet"]


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
        ("function: replay\ngrid: {seed: [1]}\nplot: {x: [1], lines: strategy}", "plot.x"),
        ("function: replay\ngrid: {seed: [1]}\nplot: {x: strategy, lines: seed}", "plot.x"),
        (
            "function: replay\ngrid: {seed: [1]}\nplot: {x: seed, lines: strategy, y: token_share}",
            "plot.y",
        ),
        ("function: replay\ngrid: {seed: [1]}\nplot: {x: seed, lines: strategy, z: a}", "'z'"),
    ],
)
def test_a_bad_replay_sweep_is_refused_in_one_line(tmp_path, capsys, text, names):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert names in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "plot", ["{x: seed, lines: nothing}", "{x: seed, lines: strategy, y: [nothing]}"]
)
def test_what_cannot_be_drawn_is_said_when_the_rows_are_safe(tmp_path, capsys, plot):
    file = tmp_path / "forty.yaml"
    file.write_text(
        f"function: replay\nparameters: {{num_requests: 5}}\ngrid: {{seed: [1]}}\nplot: {plot}\n"
    )
    assert main(["sweep", str(file), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "'nothing'" in error and error.count("\n") == 1 and len(rows_in(tmp_path)) == 1


def test_words_are_drawn_in_their_order_not_on_a_scale(tmp_path, recwarn):
    file = tmp_path / "forty.yaml"
    file.write_text(
        "function: replay\nparameters: {num_requests: 5}\ngrid: "
        "{workload: [chat, lognormal]}\nplot: {x: workload, lines: strategy}\n"
    )
    assert main(["sweep", str(file), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "forty" / "sweep.png").exists() and not [
        each for each in recwarn if "log" in str(each.message)
    ]


def test_of_many_failures_the_first_are_told(tmp_path, capsys):
    file = tmp_path / "forty.yaml"
    file.write_text(
        f"function: replay\nparameters: {{num_requests: -1}}\ngrid: {{seed: {list(range(30))}}}\n"
    )
    assert main(["sweep", str(file), "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("failed: ") == sweep.MOST_TOLD and "and 20 more" in out


def test_jobs_below_one_are_refused(file, tmp_path, capsys):
    assert main(["sweep", str(file), "--out", str(tmp_path), "--jobs", "0"]) == 2
    assert "jobs" in capsys.readouterr().err


def test_goodput_counts_who_was_served_in_time():
    """Of four in 2 s: in time; a late first token; slow behind it; failed. A single token has no
    time per token.
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
