"""`compare` sets two results side by side, `report` writes a page about one, and `read_rows` gives
all runs of an experiment in one table.
"""

import json
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml
from pyarrow.parquet import read_schema

from cortexlab.answer import Comparison
from cortexlab.cli.main import main
from cortexlab.errors import BadInput
from cortexlab.metrics import COLUMNS, kind_of
from cortexlab.plots import SWEEP_WORDS
from cortexlab.results import report, sweep
from cortexlab.results import store as results
from cortexlab.results.console import BENCH_COLUMNS, REPLAY_COLUMNS
from cortexlab.workloads.synthetic import REPLAY_REQUESTS


def write_run(folder: Path, rows: list[dict], more: dict | None = None, **environment) -> Path:
    """A result of `bench` with ``rows``, and ``more`` in its run.json."""
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet")
    arguments = {"model": "tiny", "seed": 1, "json": False, "ignore_eos": False}
    run = {"command": "bench", "arguments": arguments, "environment": environment}
    (folder / "run.json").write_text(json.dumps(run | (more or {})))
    return folder


def row(strategy: str, throughput: float, low=None, high=None, **more) -> dict:
    known = {"strategy": strategy, "block_size": 16, "token_share": 0.5}
    known |= {"output_throughput": throughput}
    return known | {"output_throughput_low": low, "output_throughput_high": high} | more


@pytest.fixture
def runs(tmp_path):
    """Folders of the results a and b."""
    first = [row("paged", 10.0, 9.0, 11.0), row("static", 5.0, 4.0, 6.0)]
    second = [row("paged", 20.0, 19.0, 21.0), row("runs", 5.0)]
    return (
        write_run(tmp_path / "a", first, mlx_version="1", cores=2),
        write_run(tmp_path / "b", second, mlx_version="2", cores=2),
    )


def test_a_comparison_names_differences_and_marks_intervals_that_are_apart(runs, capsys):
    assert main(["compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "environment.mlx_version: 1 | 2" in lines
    assert not [line for line in lines if "cores" in line]
    assert "only in A: static" in lines and "only in B: runs" in lines
    assert "1 of 2 figures are equal;  * intervals apart" in lines
    assert lines[-2] == "paged", "a block size that all rows share is not left out"
    assert " ".join(lines[-1].split()) == "output_throughput 10 [9, 11] 20 [19, 21] 2.000 *"


def test_intervals_are_apart_whichever_is_the_higher(runs):
    there, back = report.comparison(*runs), report.comparison(*reversed(runs))
    assert [line.rstrip().endswith("*") for line in (there, back)] == [True, True]


def test_a_comparison_fits_the_terminal_and_says_that_intervals_were_left_out(runs):
    a, b = report.comparison(*runs, width=58), report.comparison(*runs, width=40)
    assert max(map(len, a.splitlines()[4:])) <= 58 and "[9, 11]" in a and "left out" not in a
    assert "[9, 11]" not in b and "left out" in b


def test_rows_that_differ_in_block_size_are_named_by_their_block_size(tmp_path):
    rows = [row("paged", 1.0), row("paged", 2.0, block_size=64)]
    rows += [row("mlx-lm", 3.0, block_size=None)]
    first = write_run(tmp_path / "a", rows)
    second = write_run(tmp_path / "b", [each | {"output_throughput": 9.0} for each in rows])
    lines = report.comparison(first, second).splitlines()[5:]
    named = [line for line in lines if line[0] != " "]
    assert named == ["mlx-lm", "paged, block_size 16", "paged, block_size 64"]


def test_equal_results_show_no_difference(runs, capsys):
    assert main(["compare", str(runs[0]), str(runs[0])]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["", "4 of 4 figures are equal"]


def test_rows_that_differ_only_in_their_seed_are_repeats():
    rows = [row("paged", value, param_seed=seed) for seed, value in enumerate((1.0, 2.0, 9.0))]
    found = report.summary(pd.DataFrame(rows)).loc[("paged", 16, "output_throughput")]
    assert (found["value"], found["low"], found["high"]) == (2.0, 1.0, 9.0)


def test_rows_that_only_a_seed_names_are_repeats_of_one_row(tmp_path, capsys):
    rows = [{"param_seed": seed, "output_throughput": 1.0 + seed} for seed in (0, 1, 2)]
    for name in ("a", "b"):
        write_run(tmp_path / name, rows)
    found = report.summary(pd.DataFrame(rows))
    assert list(found.loc[("all", "output_throughput")]) == [2.0, 1.0, 3.0]
    assert main(["report", "a", "--out", str(tmp_path)]) == 0
    assert "2 [1, 3]" in (tmp_path / "a" / "report.html").read_text()
    capsys.readouterr()
    assert main(["compare", "a", "b", "--out", str(tmp_path)]) == 0
    assert "1 of 1 figures are equal" in capsys.readouterr().out


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]


def test_a_report_is_one_page_that_needs_no_other_file(runs, capsys):
    picture = Path(__file__).parent.parent / "results" / "reference" / "memory.png"
    (runs[0] / "memory.png").write_bytes(picture.read_bytes())
    assert main(["report", "a", "--out", str(runs[0].parent)]) == 0
    page = (runs[0] / "report.html").read_text()
    assert str(runs[0] / "report.html") in capsys.readouterr().out
    links = Links()
    links.feed(page)
    assert len(links.found) == 1 and links.found[0].startswith("data:image/png;base64,")
    command = "cortexlab bench --model tiny --seed 1 --no-ignore-eos"
    for words in (command, "mlx_version", "10 [9, 11]"):
        assert words in page


def test_a_report_begins_with_the_recommendation_and_names_common_parameters_once(tmp_path):
    rows = [row("paged", rate, param_rate=rate, param_pool="60%") for rate in (1.0, 2.0)]
    folder = write_run(tmp_path / "a", rows, {"recommendation": "Use <paged>."})
    page = report.write(folder).read_text()
    assert page.index("Use &lt;paged&gt;.") < page.index("<h2>")
    assert "the same in all rows: block_size 16, pool 60%" in page
    assert "<th>rate</th>" in page and "<th>pool</th>" not in page


def test_a_report_shows_the_differences_in_speed_of_all_pairs(tmp_path):
    found = Comparison({"paged": [10.0, 10.1], "<runs>": [5.0, 5.1]}).as_dict()
    folder = write_run(tmp_path / "a", [row("paged", 1.0)], {"differences": found})
    page = report.write(folder).read_text()
    assert "paged / &lt;runs&gt;" in page and "1.99 [" in page and "faster" in page


def test_a_sweeps_report_shows_the_sweep_file(tmp_path):
    spec = {"function": "replay", "parameters": {"num_blocks": "3000"}, "grid": {"seed": [1, 2]}}
    text = report.command({"command": "sweep", "spec": spec})
    assert yaml.safe_load(text.partition("\n\n")[2]) == spec


def test_a_sweeps_rows_are_read_with_their_timings(tmp_path):
    first = {"point": "x", "row": 0, "token_share": 0.5}
    folder = write_run(tmp_path / "a", [first, first | {"point": "y", "token_share": 0.6}])
    timings = pd.DataFrame({"point": ["y", "x"], "row": 0, "output_throughput": [2.0, 1.0]})
    timings.to_parquet(folder / "timings.parquet")
    assert list(results.read(folder)["rows"]["output_throughput"]) == [1.0, 2.0]


def test_all_runs_of_an_experiment_are_one_table(runs):
    rows = results.read_rows(runs[0].parent)
    assert list(rows["run"]) == ["a", "a", "b", "b"]
    assert list(rows["strategy"]) == ["paged", "static", "paged", "runs"]


@pytest.mark.parametrize("command", [["compare", "a", "nowhere"], ["report", "nowhere"]])
def test_a_folder_without_a_result_is_refused_by_name(runs, command, capsys):
    assert main([*command, "--out", str(runs[0].parent)]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_results_whose_rows_differ_in_parameters_cannot_be_compared(runs, tmp_path, capsys):
    swept = write_run(tmp_path / "c", [row("paged", 1.0, param_rate=1)])
    assert main(["compare", str(runs[0]), str(swept)]) == 2
    assert "param_rate" in capsys.readouterr().err


@pytest.fixture
def nested(runs, tmp_path, monkeypatch):
    """A working directory beside the results."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


@pytest.mark.parametrize("folder", ["..", "../.hid/x", "../link", "../notebooks/.."])
def test_results_are_found_by_any_path_to_their_folder(folder, nested):
    (nested / ".hid").mkdir()
    (nested / ".hid" / "x").symlink_to(nested)
    (nested / "link").symlink_to(nested)
    rows = results.read_rows(folder)
    assert list(rows["run"]) == ["a", "a", "b", "b"], "a link is no second result"
    assert list(results.read_rows(nested / ".hid" / "x")["run"]) == list(rows["run"])


def test_a_linked_result_is_read_and_a_hidden_one_is_not(runs, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(runs[0])
    write_run(tmp_path / "all" / ".hidden" / "c", [row("runs", 1.0)])
    assert set(results.read_rows(tmp_path / "all")["run"]) == {"linked"}


DAMAGED = ["run.json", "rows.parquet", "steps.parquet"]


@pytest.mark.parametrize("rest", [b"", b"half"], ids=["empty", "truncated"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_result_is_left_out_and_named(name, rest, runs, tmp_path, capsys):
    (tmp_path / "foreign").mkdir()  # of another program
    (tmp_path / "foreign" / "run.json").write_text("{")
    (runs[0] / "steps.parquet").write_bytes((runs[0] / "rows.parquet").read_bytes())
    damaged = runs[0] / name
    damaged.write_bytes(damaged.read_bytes()[:50] if rest else b"")
    with pytest.warns(UserWarning) as told:
        rows = results.read_rows(tmp_path)
    assert set(rows["run"]) == {"b"}
    assert len(told) == 1 and str(damaged) in str(told[0].message)
    with pytest.raises(results.BadInput, match=name):
        results.read(runs[0])
    for words in (["report", "a"], ["compare", "a", "b"]):
        assert main([*words, "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(damaged) in line


def test_a_damaged_figure_is_named(runs, tmp_path, capsys):
    (runs[0] / "._memory.png").write_bytes(b"what macOS leaves beside")
    assert main(["report", "a", "--out", str(tmp_path)]) == 0
    (runs[0] / "memory.png").write_bytes(b"half")
    assert main(["report", "a", "--out", str(tmp_path)]) == 2
    assert str(runs[0] / "memory.png") in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    (runs[0] / "report.html").mkdir()
    assert main(["report", "a", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(runs[0]) in line


def test_a_comparison_names_the_figures_that_one_side_lacks(tmp_path):
    first = [row("paged", 1.0, median_tpot_ms=2.0, p99_itl_ms=3.0), row("runs", 1.0)]
    second = [row("paged", 1.0, median_tpot_ms=None, p99_itl_ms=None)]
    folders = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second)]
    lines = report.comparison(*folders).splitlines()
    assert "only in A: paged median_tpot_ms, p99_itl_ms; runs" in lines
    assert not [line for line in lines if line.startswith("only in B") or "WARNING" in line]


@pytest.mark.parametrize(
    ("arguments", "tokens", "named"),
    [
        ({"seed": 2}, 7, "(seed)"),
        ({"workload": "chat", "requests": 3, "shuffle_lengths": False}, 7, "(requests, workload)"),
        ({"seed": 1}, 8, "(total_output_tokens)"),
    ],
)
def test_a_comparison_of_different_work_warns(arguments, tokens, named, tmp_path):
    first = write_run(tmp_path / "a", [row("paged", 1.0, total_output_tokens=7)])
    given = {"model": "tiny", "seed": 1} | arguments
    rows = [row("paged", 1.0, total_output_tokens=tokens)]
    second = write_run(tmp_path / "b", rows, {"arguments": given})
    (line,) = [each for each in report.comparison(first, second).splitlines() if "WARNING" in each]
    assert named in line and "workloads differ" in line


def test_results_without_rows_cannot_be_compared(runs, tmp_path, capsys):
    (runs[1] / "rows.parquet").unlink()
    assert main(["compare", "a", "b", "--out", str(tmp_path)]) == 2
    assert str(runs[1]) in capsys.readouterr().err


def test_a_missing_folder_has_no_rows_to_read(tmp_path):
    with pytest.raises(results.BadInput, match="no result"):
        results.read_rows(tmp_path / "a" / "nothing")


# --- columns --------------------------------------------------------------------------------------


def test_a_bench_stores_an_interval_of_each_latency_and_throughput():
    expected = {"duration", "request_throughput", "output_throughput"}
    for statistic in ("mean", "median", "p99"):
        expected |= {f"{statistic}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")}
    assert {name for name, column in COLUMNS.items() if column.interval} == expected


VALUES = {"double": 0.5, "int64": 1, "string": "x", "doubles": [0.5], "extents": [[1, 2, 3]]}


@pytest.mark.parametrize("values", ["missing", "some missing", "whole"])
def test_a_column_has_one_type_whatever_its_values(values, tmp_path):
    names = [*COLUMNS, *(f"{name}_low" for name in COLUMNS if COLUMNS[name].interval)]
    full = {name: VALUES[kind_of(name)] for name in names}
    if values == "whole":  # numbers, and lists of nothing
        full |= {name: 1 if kind_of(name) == "double" else full[name] for name in names}
        full |= {"itl_ms": [], "extents": []}
    none = dict.fromkeys(names)
    frame = pd.DataFrame({"missing": [none], "some missing": [none, full], "whole": [full]}[values])
    results.write_table(tmp_path / "x.parquet", frame)
    types = read_schema(tmp_path / "x.parquet")
    assert {name: types.field(name).type for name in names} == {
        name: results.KINDS[kind_of(name)] for name in names
    }
    assert kind_of("duration_high") == "double"


def test_a_column_that_the_table_does_not_know_keeps_its_type(tmp_path):
    frame = pd.DataFrame({"param_seed": [1], "mine": [True], "peak_blocks": ["a few"]})
    results.write_table(tmp_path / "x.parquet", frame)
    assert list(results.read_table(tmp_path / "x.parquet").iloc[0]) == [1, True, "a few"]


@pytest.mark.filterwarnings("error")
def test_results_of_an_older_form_are_read_with_the_same_types(tmp_path):
    write_run(tmp_path / "a", [row("paged", 1.0, prefix_hit_rate=None, cached_tokens=None)])
    write_run(tmp_path / "b", [row("paged", 1.0, prefix_hit_rate=0.5, cached_tokens=3)])
    rows = results.read_rows(tmp_path)
    assert rows.groupby("strategy").mean(numeric_only=True)["prefix_hit_rate"].item() == 0.5
    assert rows["cached_tokens"].dtype == "float64"


def test_a_column_has_words_for_pages_axes_and_printed_tables():
    column = COLUMNS["mean_ttft_ms"]
    assert report.MEASURES["mean_ttft_ms"] == column.label == "TTFT, mean (ms)"
    assert SWEEP_WORDS["mean_ttft_ms"] == "mean time to first token (ms)"
    assert (column.heading, column.text(16_123.0)) == ("mean TTFT s", "16.1")
    assert column.text(1_234_567.0) == "1,235" and column.text(None) == "-"


def test_pages_and_tables_show_the_most_important_measures_first():
    assert list(report.MEASURES)[:3] == ["output_throughput", "request_throughput", "mean_ttft_ms"]
    for columns in (BENCH_COLUMNS, REPLAY_COLUMNS):
        assert columns[0].name == "strategy" and not columns[0].drop
        assert all(column.heading for column in columns)


@pytest.mark.parametrize("measured", [True, False], ids=["bench", "replay"])
def test_figures_that_depend_on_the_real_clock_are_in_a_table_of_their_own(measured):
    """The clock of a replay is virtual; seconds of the wall clock alone are real there."""
    of_bench = {"output_throughput", "output_throughput_low", "token_share", "num_holes"}
    timings = of_bench if measured else set()
    names = ["output_throughput", "output_throughput_low", "token_share", "num_holes"]
    names += ["copied_bytes", "prefix_hit_rate", "param_duration", "seconds", "point_seconds"]
    rows = pd.DataFrame([{"point": "x", "row": 0} | dict.fromkeys(names, 1)])
    tables = sweep._by_clock(rows.assign(repeats=1) if measured else rows)
    named = {"point", "row", "param_duration"}
    assert set(tables["timings"]) == named | timings | {"seconds", "point_seconds"}
    assert set(tables["timings"]) & set(tables["rows"]) == named


@pytest.mark.parametrize(
    "run",
    [
        {"arguments": 3}, {"arguments": None}, {"differences": {"pairs": [3]}}, {"spec": {}},
        {"recommendation": 5}, {"environment": "x"}, {"points": {"failed": [1]}},
    ],
)  # fmt: skip
def test_a_foreign_run_json_is_refused_or_read_but_never_a_traceback(tmp_path, run):
    folder = write_run(tmp_path / "a", [row("paged", 1.0)])
    kept = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(kept | run))
    for call in (report.write, lambda each: report.comparison(each, each)):
        try:
            call(folder)
        except BadInput as error:
            assert "\n" not in str(error) and str(folder) in str(error)


def test_a_folder_that_reads_like_a_uri_takes_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["replay", "--requests", "5", "--out", "os:getcwd", "--name", "a"]
    assert main(words) == 0
    assert len(results.read_rows("os:getcwd")) == 1


def test_block_sizes_are_whole_numbers_on_a_page_also_beside_mlx_lm(tmp_path):
    rows = [row("paged", 1.0), row("mlx-lm", 3.0, block_size=None)]
    page = report.write(write_run(tmp_path / "a", rows)).read_text()
    assert "<td>16</td>" in page and "<td></td>" in page
    assert not {"<td>16.0</td>", "<td>nan</td>", "<td>&lt;NA&gt;</td>"} & {*page.split()}


def test_rows_without_timings_are_not_lost(tmp_path):
    folder = write_run(tmp_path / "a", [row("paged", 1.0) | {"point": "x", "row": 0}])
    timings = pd.DataFrame([{"point": "other", "row": 0, "seconds": 1.0}])
    results.write_table(folder / "timings.parquet", timings)
    assert len(results.read(folder)["rows"]) == 1


def test_default_and_named_requests_are_one_workload(tmp_path, capsys):
    for name, more in (("a", []), ("b", ["--requests", str(REPLAY_REQUESTS)])):
        words = ["replay", "--out", str(tmp_path), "--name", name, "--scale-lengths", "0.1"]
        assert main([*words, *more]) == 0
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "workloads differ" not in capsys.readouterr().out
