"""What a result says: two runs side by side, one page of its own, all runs of an experiment in one
table.
"""

import json
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cortexlab.cli.main import main
from cortexlab.results import report
from cortexlab.results import store as results


def write_run(folder: Path, rows: list[dict], more: dict | None = None, **environment) -> Path:
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet")
    run = {
        "command": "bench",
        "arguments": {"model": "tiny", "seed": 1, "json": False, "ignore_eos": False},
        "environment": environment,
    }
    (folder / "run.json").write_text(json.dumps(run | (more or {})))
    return folder


def row(
    strategy: str, throughput: float, low: float | None = None, high: float | None = None, **more
) -> dict:
    ends = {"output_throughput_low": low, "output_throughput_high": high}
    return (
        {
            "strategy": strategy,
            "block_size": 16,
            "output_throughput": throughput,
            "token_share": 0.5,
        }
        | ends
        | more
    )


@pytest.fixture
def runs(tmp_path):
    first = write_run(
        tmp_path / "a",
        [row("paged", 10.0, 9.0, 11.0), row("static", 5.0, 4.0, 6.0)],
        mlx_version="1",
        cores=2,
    )
    second = write_run(
        tmp_path / "b", [row("paged", 20.0, 19.0, 21.0), row("runs", 5.0)], mlx_version="2", cores=2
    )
    return first, second


def test_a_comparison_names_what_differs_and_whose_intervals_are_apart(runs, capsys):
    assert main(["compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "environment.mlx_version: 1 | 2" in lines and not [
        line for line in lines if "cores" in line
    ]
    assert (
        "only in A: static" in lines
        and "only in B: runs" in lines
        and "1 of 2 figures are equal;  * intervals apart" in lines
    )
    assert lines[-2] == "paged", "a block size that all have needs no telling"
    assert lines[-1].split() == [
        "output_throughput",
        "10",
        "[9,",
        "11]",
        "20",
        "[19,",
        "21]",
        "2.000",
        "*",
    ]


def test_a_comparison_fits_the_terminal_and_says_what_it_left_out(runs):
    a, b = report.comparison(*runs, width=58), report.comparison(*runs, width=40)
    assert max(map(len, a.splitlines()[4:])) <= 58 and "[9, 11]" in a and "left out" not in a
    assert "[9, 11]" not in b and "left out" in b


def test_rows_that_differ_in_block_size_are_told_apart_by_it(tmp_path):
    rows = [
        row("paged", 1.0),
        row("paged", 2.0) | {"block_size": 64},
        row("mlx-lm", 3.0) | {"block_size": None},
    ]
    first = write_run(tmp_path / "a", rows)
    second = write_run(tmp_path / "b", [each | {"output_throughput": 9.0} for each in rows])
    assert [
        line for line in report.comparison(first, second).splitlines()[5:] if line[0] != " "
    ] == ["mlx-lm", "paged, block_size 16", "paged, block_size 64"]


def test_equal_results_differ_in_nothing(runs, capsys):
    assert main(["compare", str(runs[0]), str(runs[0])]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["", "4 of 4 figures are equal"]


def test_rows_that_differ_only_in_their_seed_are_repeats():
    rows = pd.DataFrame(
        [row("paged", value, param_seed=seed) for seed, value in enumerate((1.0, 2.0, 9.0))]
    )
    found = report.summary(rows).loc[("paged", 16, "output_throughput")]
    assert (found["value"], found["low"], found["high"]) == (2.0, 1.0, 9.0)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]


def test_a_report_is_one_page_that_needs_nothing_else(runs, capsys):
    picture = runs[0] / "memory.png"
    picture.write_bytes(
        (Path(__file__).parent.parent / "results" / "reference" / "memory.png").read_bytes()
    )
    assert main(["report", "a", "--out", str(runs[0].parent)]) == 0
    page = (runs[0] / "report.html").read_text()
    assert str(runs[0] / "report.html") in capsys.readouterr().out
    links = Links()
    links.feed(page)
    assert len(links.found) == 1 and links.found[0].startswith("data:image/png;base64,")
    assert (
        "cortexlab bench --model tiny --seed 1 --no-ignore-eos" in page
        and "mlx_version" in page
        and "10 [9, 11]" in page
    )


def test_a_report_begins_with_the_answer_and_tells_once_what_all_rows_share(tmp_path):
    rows = [row("paged", rate, param_rate=rate, param_pool="60%") for rate in (1.0, 2.0)]
    folder = write_run(tmp_path / "a", rows, {"recommendation": "Use <paged>."})
    page = report.write(folder).read_text()
    assert page.index("Use &lt;paged&gt;.") < page.index("<h2>")
    assert (
        "the same in all rows: block_size 16, pool 60%" in page
        and "<th>rate</th>" in page
        and "<th>pool</th>" not in page
    )


def test_a_sweep_is_reproduced_by_its_file(tmp_path):
    spec = {"function": "replay", "parameters": {"num_blocks": "3000"}, "grid": {"seed": [1, 2]}}
    text = report.command({"command": "sweep", "spec": spec})
    assert yaml.safe_load(text.partition("\n\n")[2]) == spec


def test_a_sweeps_rows_come_with_what_the_wall_clock_said(tmp_path):
    folder = write_run(
        tmp_path / "a",
        [
            {"point": "x", "row": 0, "token_share": 0.5},
            {"point": "y", "row": 0, "token_share": 0.6},
        ],
    )
    pd.DataFrame({"point": ["y", "x"], "row": 0, "output_throughput": [2.0, 1.0]}).to_parquet(
        folder / "timings.parquet"
    )
    assert list(results.read(folder)["rows"]["output_throughput"]) == [1.0, 2.0]


def test_all_runs_of_an_experiment_are_one_table(runs):
    rows = results.read_rows(runs[0].parent)
    assert list(rows["run"]) == ["a", "a", "b", "b"] and list(rows["strategy"]) == [
        "paged",
        "static",
        "paged",
        "runs",
    ]


@pytest.mark.parametrize("command", [["compare", "a", "nowhere"], ["report", "nowhere"]])
def test_what_is_no_result_is_refused_by_name(runs, command, capsys):
    assert main([*command, "--out", str(runs[0].parent)]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_results_that_are_named_by_other_things_cannot_be_compared(runs, tmp_path, capsys):
    swept = write_run(tmp_path / "c", [row("paged", 1.0, param_rate=1)])
    assert main(["compare", str(runs[0]), str(swept)]) == 2
    assert "param_rate" in capsys.readouterr().err
    with pytest.raises(results.BadInput, match="no result"):
        results.read_rows(tmp_path / "a" / "nothing")
