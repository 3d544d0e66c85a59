"""Notebooks as committed and run with other parameters; sweeps; figures. nbval runs the notebooks
with their defaults (pyproject.toml).
"""

import re
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command

from cortexlab import plots
from cortexlab.cli.main import main
from cortexlab.results import sweep

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_was_run_in_order_has_short_cells_and_is_tagged(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.source.count("\n") < 15 for cell in cells)
    assert not [
        output for cell in cells for output in cell.outputs if output.output_type == "error"
    ]
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and tags.count("finding") == 1
    assert "finding" in cells[-1].metadata.tags


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_lists_every_parameter_with_its_type_default_and_comment(path):
    (source,) = [
        cell.source
        for cell in nbformat.read(path, 4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    told = CliRunner().invoke(papermill_command, ["--help-notebook", str(path)]).output
    told = " ".join(told.split())
    for line in source.splitlines():
        name, kind, default, words = re.fullmatch(r"(\w+): (\w+) = (.+?)  # (.+)", line).groups()
        assert f"{name}: {kind} (default {default}) {words}" in told


OTHERWISE = {  # parameters that are quick and differ from a notebook's defaults
    "00_quickstart": {
        "model_name": "tiny",
        "workload": "heavy-tail",
        "block_size": 8,
        "num_blocks": "45%",
        "strategies": "buddy,runs",
        "seed": 5,
    },
    "01_allocators": {
        "num_blocks": 100,
        "num_requests": 300,
        "largest_request": 40,
        "pool_sizes": "64,256",
        "seed": 5,
        "script": "x+3 y+2 x-",
    },
    "02_fragmentation": {
        "workload": "lognormal",
        "num_requests": 120,
        "request_rate": 20.0,
        "strategies": "cortexstream,paged,runs",
        "block_size": 8,
        "num_blocks": "50%",
        "block_sizes": "4,64",
        "watermarks": "0,0.01,0.1",
        "copy_shares": "0,0.05",
        "seed": 5,
    },
    "03_published_figure": {
        "num_requests": 300,
        "num_slots": 9000,
        "block_size": 32,
        "prompt_mean": 80.0,
        "seed": 5,
    },
    "04_engine": {
        "model_name": "tiny",
        "num_requests": 5,
        "batch_limits": "2,3",
        "block_size": 8,
        "decode_rows": "2",
        "prefill_rows": "16",
        "context": 64,
        "extent_slots": "8,32",
        "num_sequences": 2,
        "repeats": 2,
        "workload": "heavy-tail",
        "scale_lengths": 0.1,
        "seed": 5,
    },
    "05_block_size": {
        "workload": "lognormal",
        "num_requests": 100,
        "num_blocks": "50%",
        "block_sizes": "1,8,16,128",
        "growth_steps": "0,32,256",
        "extent_slots": "8,128",
        "repeats": 2,
        "seed": 5,
    },
    "06_strategies": {
        "model_name": "tiny",
        "workloads": "shared-prefix,heavy-tail",
        "strategies": "best_fit,paged",
        "num_requests": 80,
        "engine_requests": 4,
        "seed": 5,
    },
    "07_triton_style": {
        "model_name": "tiny",
        "workload": "heavy-tail",
        "strategies": "buddy,runs",
        "request_rates": "5,50",
        "num_requests": 60,
        "pool_slots": 4096,
        "block_sizes": "8,32",
        "engine_requests": 3,
        "seed": 5,
    },
    "08_prefix_sharing": {
        "model_name": "tiny",
        "num_conversations": 12,
        "system_tokens": 100,
        "block_sizes": "16,32",
        "pool_slots": "8192,16384",
        "engine_requests": 3,
        "seed": 5,
    },
    "09_batch_size": {
        "model_name": "tiny",
        "workloads": "chat",
        "scale_lengths": 0.02,
        "num_requests": 5,
        "batch_limits": "2,5",
        "padded_limits": "1,3",
        "seed": 5,
    },
    "10_memory_calculator": {
        "memory_gb": 3.5,
        "mean_tokens": 77,
        "context": 1000,
        "block_size": 64,
        "group_size": 32,
    },
    "explorer": {
        "workload": "chat",
        "num_requests": 40,
        "left": "buddy",
        "right": "paged",
        "block_size": 32,
        "num_blocks": "80%",
        "seed": 5,
    },
    "own_strategy": {
        "steps": 100,
        "num_requests": 60,
        "num_blocks": "80%",
        "engine_requests": 4,
        "seed": 5,
    },
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_invariants_hold_under_other_parameters(path, tmp_path):
    """A notebook runs as in a sweep, without its finding, which holds for the defaults only."""
    notebook = nbformat.read(path, 4)
    notebook.cells = [
        cell for cell in notebook.cells if "finding" not in cell.metadata.get("tags", [])
    ]
    assert any("invariants" in cell.metadata.get("tags", []) for cell in notebook.cells)
    nbformat.write(notebook, tmp_path / "body.ipynb")
    papermill.execute_notebook(
        tmp_path / "body.ipynb",
        tmp_path / "done.ipynb",
        OTHERWISE[path.stem],
        progress_bar=False,
        cwd=ROOT / "notebooks",
    )


def test_a_sweep_collects_every_point_skips_finished_points_and_survives_a_failure(
    tmp_path, capsys
):
    file = tmp_path / "small.yaml"
    notebook = ROOT / "notebooks" / "00_quickstart.ipynb"
    file.write_text(
        f"notebook: {notebook}\n"
        "parameters: {model_name: tiny, num_requests: 3}\n"
        "grid: {block_size: [8, 64], strategies: [static, paged]}\n"
        "plot: {x: block_size, lines: strategy}\n"
    )
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 0
    target = tmp_path / "out" / "small"
    rows = pd.read_parquet(target / "rows.parquet")
    assert sorted(zip(rows["param_block_size"], rows["strategy"], strict=True)) == [
        (8, "paged"),
        (8, "static"),
        (64, "paged"),
        (64, "static"),
    ]
    assert (target / "sweep.png").stat().st_size > 10_000
    next((target / "points").glob("*.parquet")).unlink()
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 0
    # Columns measured by the wall clock stand in timings.parquet, so equal points give equal rows.
    pd.testing.assert_frame_equal(pd.read_parquet(target / "rows.parquet"), rows)
    timings = set(pd.read_parquet(target / "timings.parquet"))
    assert {
        "duration",
        "output_throughput_low",
        "p99_itl_ms",
        "token_share",
        "point_seconds",
    } <= timings and "repeats" in rows
    stamps = {path: path.stat().st_mtime_ns for path in (target / "points").iterdir()}
    file.write_text(file.read_text().replace("[static, paged]", "[static, nonsense]"))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 1, (
        "a failed point gives exit code 1"
    )
    assert "nonsense" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, (
        "a finished point ran again"
    )
    assert sorted(pd.read_parquet(target / "rows.parquet")["strategy"]) == ["static", "static"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("grid: {a: [1]}", "notebook"),
        ("notebook: x.ipynb\ngrid: {a: [1]}", "x.ipynb"),
        ("notebook: NB\ngrid: {nonsense: [1]}", "nonsense"),
        ("notebook: NB\ngrid: {block_size: 16}", "block_size"),
        ("notebook: NB\ngrid: {block_size: [large]}", "'large'"),
        ("notebook: NB\ngrid: {block_size: [16]}\nextra: 1", "extra"),
        ("notebook: [", "YAML"),
    ],
)
def test_a_bad_sweep_file_is_refused_in_one_line(tmp_path, capsys, text, names):
    file = tmp_path / "bad.yaml"
    file.write_text(text.replace("NB", str(ROOT / "notebooks" / "00_quickstart.ipynb")))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert names in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_committed_sweep_files_are_valid(path):
    assert list(sweep.grid_points(sweep.SweepSpec.load(path)))


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tiny):
    import matplotlib

    matplotlib.use("Agg")
    from cortexlab.bench.serve import Setting, run_bench
    from cortexlab.workloads.synthetic import make_workload

    items = make_workload("lognormal", 8, seed=1, scale_lengths=0.5)
    bench = run_bench(tiny, items, setting=Setting(batch_size=4, num_blocks="60%"), repeats=2)
    return {"rows": pd.DataFrame(bench.rows), "requests": bench.requests(), "steps": bench.steps()}


def test_a_figure_shows_its_data(tables):
    strategies = list(tables["rows"]["strategy"])
    memory = plots.memory_over_time(tables["steps"])
    assert [axes.get_title(loc="left").split(":")[0] for axes in memory] == strategies
    assert len({axes.get_ylim() for axes in memory}) == 1, "panels differ in scale"
    throughput = plots.throughput_against_ttft(tables["rows"])
    assert len(throughput.containers) == len(strategies)
    assert throughput.containers[0][0].get_xydata()[0][1] == pytest.approx(
        tables["rows"]["output_throughput"][0]
    )
    ttft, gaps = plots.latency_distribution(tables["requests"])
    assert len(ttft.lines) == len(gaps.lines) == len(strategies)
    assert all(
        axes.get_xlabel() and "(" in axes.get_xlabel()
        for axes in (ttft, gaps, throughput, memory[-1])
    )


def test_the_block_map_shows_every_used_and_free_block(tables):
    steps = tables["steps"]
    step = steps[steps["strategy"] == "paged"].sort_values("used_blocks").iloc[-1]
    owners = plots.block_owners(step)
    assert (owners >= 0).sum() == step["used_blocks"] and len(owners) == step["used_blocks"] + step[
        "free_blocks"
    ]
    image = plots.map_image(owners)
    assert image.shape[0] * image.shape[1] >= len(owners)


def test_the_slider_changes_the_picture_and_shows_errors(tables, monkeypatch):
    from cortexlab.plots import widgets

    box = widgets.block_map_slider(tables["steps"])
    slider, picture, message = box.children
    first = picture.value
    slider.value = slider.max / 2
    assert picture.value != first and not message.value
    monkeypatch.setattr(plots, "draw_map", lambda *_: 1 / 0)
    slider.value = slider.max
    assert "ZeroDivisionError" in message.value
