"""Notebooks as committed, and run with other parameters. Strict nbval runs beside this file (pyproject.toml)."""

from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from cortexlab import plots, sweep
from cortexlab.cli import main

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_run_in_order_short_and_tagged(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.source.count("\n") < 15 for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and tags.count("finding") == 1
    assert "finding" in cells[-1].metadata.tags


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_type_and_a_help_text(path):
    cells = nbformat.read(path, 4).cells
    (source,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    known = papermill.inspect_notebook(str(path))
    assert len(known) == len(source.splitlines())
    for name, parameter in known.items():
        assert parameter["inferred_type_name"] != "None" and parameter["help"], name


def test_a_sweep_collects_every_point_skips_what_is_done_and_survives_a_failure(tmp_path, capsys):
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
    stamps = {path: path.stat().st_mtime_ns for path in (target / "points").iterdir()}
    file.write_text(file.read_text().replace("[static, paged]", "[static, nonsense]"))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 1, "a failed point"
    assert "nonsense" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "no finished point ran again"
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


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_sweep_files_are_valid(path):
    assert list(sweep.grid_points(sweep.read_spec(path)))


# --- figures ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tiny):
    import matplotlib

    matplotlib.use("Agg")
    from cortexlab.bench import Setting, run_bench
    from cortexlab.workload import make_workload

    items = make_workload("lognormal", 8, seed=1, scale_lengths=0.5)
    bench = run_bench(tiny, items, setting=Setting(batch_size=4, num_blocks="60%"), repeats=2)
    return {"rows": pd.DataFrame(bench.rows), "requests": bench.requests(), "steps": bench.steps()}


def test_figures_show_their_data(tables):
    strategies = list(tables["rows"]["strategy"])
    memory = plots.memory_over_time(tables["steps"])
    assert [axes.get_title(loc="left").split(":")[0] for axes in memory] == strategies
    assert len({axes.get_ylim() for axes in memory}) == 1, "one scale"
    throughput = plots.throughput_against_ttft(tables["rows"])
    assert len(throughput.containers) == len(strategies)
    assert throughput.containers[0][0].get_xydata()[0][1] == pytest.approx(tables["rows"]["output_throughput"][0])
    ttft, gaps = plots.latency_distribution(tables["requests"])
    assert len(ttft.lines) == len(gaps.lines) == len(strategies)
    assert all(axes.get_xlabel() and "(" in axes.get_xlabel() for axes in (ttft, gaps, throughput, memory[-1]))


def test_the_block_map_is_the_block_table(tables):
    steps = tables["steps"]
    step = steps[steps["strategy"] == "paged"].sort_values("used_blocks").iloc[-1]
    owners = plots.block_owners(step)
    assert (owners >= 0).sum() == step["used_blocks"] and len(owners) == step["used_blocks"] + step["free_blocks"]
    image = plots.map_image(owners)
    assert image.shape[0] * image.shape[1] >= len(owners)


def test_the_slider_moves_the_picture_and_shows_errors(tables, monkeypatch):
    from cortexlab import widgets

    box = widgets.block_map_slider(tables["steps"])
    slider, picture, message = box.children
    first = picture.value
    slider.value = slider.max / 2
    assert picture.value != first and not message.value
    monkeypatch.setattr(plots, "draw_map", lambda *_: 1 / 0)
    slider.value = slider.max
    assert "ZeroDivisionError" in message.value
