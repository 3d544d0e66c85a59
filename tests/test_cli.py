"""The command line: a good run leaves a whole result, bad input one line on standard error and no
file.
"""

import argparse
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
from conftest import strict
from pyarrow.dataset import dataset
from pyarrow.parquet import read_schema

from cortexlab import allocators
from cortexlab.cli import main as cli
from cortexlab.cli import options
from cortexlab.lab import conformance
from cortexlab.results import store as results

STRATEGIES = ["static", "cortexstream", "paged", "mlx-lm"]
ROW = ["strategy", "block_size", "num_blocks", "batch_size", "completed", "refused", "duration"]
ROW += ["total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput"]
ROW += ["token_share", "reserved_share", "internal_share", "external_share"]
ROW += ["external_fragmentation", "num_holes", "copied_bytes", "peak_kv_bytes", "arena_bytes"]
ROW += ["num_preemptions", "tokens_sha256", "requests_identical", "requests_near_tie", "max_gap"]
ROW += [
    f"{statistic}_{name}_ms"
    for statistic in ("mean", "median", "p99")
    for name in ("ttft", "tpot", "itl", "e2el")
]
SMALL = ["--model", "tiny", "--requests", "6", "--batch-size", "3", "--seed", "1"]
SMALL += ["--workload", "lognormal", "--scale-lengths", "0.3"]
ONE = ["bench", "--model", "tiny", "--requests", "2", "--batch-size", "2", "--scale-lengths", "0.1"]
ONE += ["--workload", "lognormal", "--strategies", "cortexstream", "--json"]


def process(*words, **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cortexlab", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


@pytest.fixture
def run(capsys):
    """The command line in this process: ``(exit code, stdout, stderr)``."""

    def run(*words):
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Run a command and assert that it is refused: exit code 2, one line on standard error, nothing
    on standard output, no file. Returns the line.
    """

    def refused(*words, out: Path = tmp_path / "out"):
        code, stdout, stderr = run(*words, "--out", out)
        assert (code, stdout) == (2, "")
        assert stderr.count("\n") == 1 and stderr.endswith("\n")
        assert not out.exists() or not list(out.iterdir())
        return stderr

    return refused


# --- a good run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The process and the result folder of one bench of four strategies."""
    out = tmp_path_factory.mktemp("results")
    words = ["--strategies", ",".join(STRATEGIES), "--out", out, "--name", "good"]
    done = process("bench", "--json", *SMALL, *words)
    assert done.returncode == 0, done.stderr
    return done, out / "good"


def test_with_json_a_bench_prints_one_document_and_no_other_line(bench):
    done, _ = bench
    document = strict(done.stdout)
    assert set(document) >= {"environment", "rows", "ratios", "differences"}
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_bench_that_goes_on_until_it_knows_books_its_looks(run, tmp_path):
    words = ["--repeats", "auto", "--seconds", "0.001", "--out", tmp_path, "--name", "auto"]
    code, stdout, _ = run("bench", *SMALL, *words, "--strategies", "paged,runs")
    assert code == 0 and ", 1 repeat\n" in stdout and "One run cannot tell" in stdout
    made = strict((tmp_path / "auto" / "run.json").read_text())
    assert made["differences"]["looks"] == [{"repeats": 1, "error": 0.05}]
    assert made["arguments"]["repeats"] == "auto"
    assert " ".join(stdout.split()).count(made["recommendation"]) == 1


def test_every_row_of_a_bench_has_every_field(bench):
    rows = strict(bench[0].stdout)["rows"]
    assert [row["strategy"] for row in rows] == STRATEGIES
    for row in rows:
        assert [name for name in ROW if name not in row] == []
        assert (row["completed"], row["refused"], row["batch_size"]) == (6, 0, 3)
        assert row["requests_identical"] + row["requests_near_tie"] == 6
        assert row["request_throughput"] == pytest.approx(6 / row["duration"])
        throughput = row["total_output_tokens"] / row["duration"]
        assert row["output_throughput"] == pytest.approx(throughput)


def test_all_strategies_yield_equal_tokens(bench):
    rows = strict(bench[0].stdout)["rows"]
    assert len({row["tokens_sha256"] for row in rows}) == 1
    assert len({(row["total_input_tokens"], row["total_output_tokens"]) for row in rows}) == 1


def test_the_four_shares_of_a_row_sum_to_one(bench):
    for row in strict(bench[0].stdout)["rows"]:
        shares = [row[f"{name}_share"] for name in ("token", "reserved", "internal", "external")]
        assert sum(shares) == pytest.approx(1) and all(0 <= share <= 1 for share in shares)


def test_a_figure_that_does_not_apply_to_mlx_lm_is_null(bench):
    *ours, theirs = strict(bench[0].stdout)["rows"]
    names = "block_size num_blocks external_fragmentation num_holes copied_bytes arena_bytes"
    for name in [*names.split(), "num_preemptions"]:
        assert theirs[name] is None
        assert all(row[name] is not None for row in ours)
    assert theirs["external_share"] == 0


def test_ratios_compare_every_strategy_to_mlx_lm(bench):
    ratios = strict(bench[0].stdout)["ratios"]
    assert [ratio["strategy"] for ratio in ratios] == STRATEGIES[:-1]
    for ratio in ratios:
        assert ratio["baseline"] == "mlx-lm"
        assert set(ratio["output_throughput"]) == {"median", "min", "max", "n"}


def test_a_result_has_all_its_tables_and_figures(bench):
    _, folder = bench
    files = {file.name for file in folder.iterdir()}
    assert files >= {"rows.parquet", "requests.parquet", "steps.parquet", "run.json"}
    figures = list(folder.glob("*.png"))
    assert figures and all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    assert [entry.name for entry in folder.parent.iterdir()] == ["good"], "a temporary file is left"
    found = results.read(folder)
    assert list(found["rows"]["strategy"]) == STRATEGIES
    assert len(found["requests"]) == 6 * len(STRATEGIES)
    assert found["run"]["environment"]["mlx_version"]


def test_run_json_has_no_nan_and_no_infinity(bench):
    strict((bench[1] / "run.json").read_text())


def test_runs_of_equal_seed_yield_equal_tokens(bench, run, tmp_path):
    rows = strict(bench[0].stdout)["rows"]
    code, stdout, _ = run("bench", "--json", *SMALL, "--strategies", "paged", "--out", tmp_path)
    (row,) = strict(stdout)["rows"]
    assert (code, row["tokens_sha256"]) == (0, rows[0]["tokens_sha256"])


def test_without_json_a_bench_prints_a_table_and_the_result_folder(run, tmp_path):
    code, stdout, stderr = run(*ONE[:-1], "--out", tmp_path, "--name", "table")
    assert (code, stderr) == (0, "")
    assert "cortexstream" in stdout and str(tmp_path / "table") in stdout
    assert max(map(len, stdout.splitlines()[1:3])) <= 120


def test_the_default_name_of_a_result_is_the_command_and_the_time(run, tmp_path):
    run(*ONE, "--out", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert pd.to_datetime(folder.name.removeprefix("bench-"), format="%Y%m%dT%H%M%SZ")


def test_outputs_of_one_token_print_no_warning_and_are_typed_as_all_others(tmp_path, bench):
    words = ["--strategies", "paged", "--out", tmp_path, "--name", "one"]
    done = process("bench", *SMALL[:-1], "0.001", *words)
    assert (done.returncode, done.stderr) == (0, "")
    for table in ("rows", "requests", "steps"):
        files = [str(folder / f"{table}.parquet") for folder in (tmp_path / "one", bench[1])]
        assert dataset(files).to_table().num_rows, "two results are one data set"
        types = [dict(zip(s.names, s.types, strict=True)) for s in map(read_schema, files)]
        assert types[0] == {name: types[1][name] for name in types[0]}
    rows = results.read(tmp_path / "one")["rows"]
    means = rows.groupby("strategy").mean(numeric_only=True)
    assert {"mean_tpot_ms", "prefix_hit_rate", "median_itl_ms", "duration_low"} <= set(means)


# --- names in use, refusals, a user's own strategies ----------------------------------------------


def test_a_name_in_use_is_refused_without_overwrite(run, tmp_path):
    words = (*ONE, "--out", tmp_path, "--name", "mine")
    assert run(*words)[0] == 0
    before = (tmp_path / "mine" / "run.json").read_bytes()
    code, stdout, stderr = run(*words)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "mine" in stderr and "choose another name, or --overwrite\n" in stderr
    assert (tmp_path / "mine" / "run.json").read_bytes() == before
    assert run(*words, "--overwrite", "--seed", "7")[0] == 0
    assert results.read(tmp_path / "mine")["run"]["arguments"]["seed"] == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_overwrite_does_not_replace_a_file(run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    code, stdout, stderr = run(*ONE, "--out", tmp_path, "--name", "mine", "--overwrite")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_request_that_cannot_fit_is_refused_by_name_and_counted(run, tmp_path):
    words = ["--strategies", "paged,mlx-lm", "--max-seq-len", "55", "--out", tmp_path]
    code, stdout, stderr = run("bench", "--json", *SMALL, *words)
    assert code == 0
    for row in strict(stdout)["rows"]:
        assert row["refused"] > 0 and row["completed"] + row["refused"] == 6
    refusals = [line for line in stderr.splitlines() if line.startswith("paged")]
    assert len(refusals) == strict(stdout)["rows"][0]["refused"]
    assert all("'r" in line and "55" in line for line in refusals)


def test_a_bench_whose_requests_are_all_refused_is_bad_input(refused):
    assert "'r0'" in refused(*ONE, "--max-seq-len", "1")


def test_refusals_of_an_earlier_strategy_are_not_printed_when_a_later_one_refuses_all(refused):
    words = "--strategies mlx-lm,paged --max-seq-len 55 --num-blocks 1 --block-size 4"
    refused("bench", "--json", *SMALL, *words.split())


OWN = """
from cortexlab.allocators.paged import Paged

class Mine(Paged):
    pass

class Unfinished:
    def __init__(self, num_blocks):
        self.num_blocks = num_blocks

number = 17
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with the modules ``own_allocators`` and ``broken_allocators``."""
    (tmp_path / "own_allocators.py").write_text(OWN)
    (tmp_path / "broken_allocators.py").write_text("def (\n")
    monkeypatch.chdir(tmp_path)
    yield
    for module in ("own_allocators", "broken_allocators"):
        sys.modules.pop(module, None)


def test_a_users_own_strategy_is_found_in_the_working_directory(own, run, tmp_path):
    words = ["--strategies", "own_allocators:Mine,paged", "--out", tmp_path / "out"]
    code, stdout, _ = run("bench", "--json", *SMALL, *words)
    mine, paged = strict(stdout)["rows"]
    assert code == 0 and "Mine" in mine["strategy"]
    assert mine["tokens_sha256"] == paged["tokens_sha256"]


@pytest.mark.parametrize(
    "name",
    [
        "nowhere:Mine",
        "own_allocators:Missing",
        "own_allocators:Unfinished",
        "own_allocators:number",
        "own_allocators:",
        ":Mine",
        ".own_allocators:Mine",
        "broken_allocators:Mine",
    ],
)
def test_a_users_own_strategy_that_cannot_be_used_is_refused_by_name(name, own, refused):
    line = refused(*ONE, "--strategies", name)
    assert any(part and part in line for part in (name, name.rpartition(":")[2], "17"))


# --- bad input ------------------------------------------------------------------------------------

BAD = [  # words of the command line, and a pattern of the line on standard error
    ("--strategies fancy", "'fancy'"),
    ("--strategies paged,fancy", "'fancy'"),
    ("--strategies paged,", "strategy"),
    ("--strategies=", "unknown strategy ''"),
    ("--model no-such-model", "'no-such-model'"),
    ("--workload holiday", "'holiday'"),
    ("--trace azure_2030", "'azure_2030'"),
    ("--trace nowhere.csv", "'nowhere.csv'"),
    ("--request-rate trace", "--trace"),
    *(
        (f"--{option} {value}", f"{option}.*{value}")
        for option in ("block-size", "num-blocks", "batch-size", "requests", "repeats")
        for value in ("0", "-1", "many", "1.5")
    ),
    ("--seconds 3", "--seconds is for --repeats auto"),
    ("--repeats auto --seconds -1", "seconds.*-1"),
    ("--num-blocks 0%", "num-blocks.*0%"),
    ("--num-blocks=-5%", "num-blocks.*-5%"),
    ("--num-blocks nan%", "num-blocks.*nan%"),
    ("--max-seq-len 0", "max-seq-len.*0"),
    ("--max-seq-len -1", "max-seq-len.*-1"),
    *(
        (f"--scale-lengths {value}", f"scale-lengths.*{value}")
        for value in ("0", "nan", "-1", "inf", "some")
    ),
    *((f"--request-rate {value}", f"request-rate.*{value}") for value in ("0", "-1", "abc", "nan")),
    *(
        (f"--burstiness {value}", f"burstiness.*{value}")
        for value in ("0", "-1", "nan", "inf", "abc")
    ),
    ("--seed -1", "seed.*-1"),
    ("--seed abc", "seed.*abc"),
    ("--name a/b", "'a/b'"),
    ("--name ..", "'..'"),
    ("--frobnicate", "--frobnicate"),
]
ENORMOUS = [
    ("--scale-lengths 1e12", "scale-lengths"),
    ("--scale-lengths 1e300", "scale-lengths"),
    ("--requests 1000000000000000", "requests"),
    ("--num-blocks 1000000000000", "num-blocks"),
    ("--num-blocks 1e300%", "num-blocks"),
    ("--block-size 100000000000000000000", "block-size"),
    ("--max-seq-len 100000000000", "max-seq-len"),
    (f"--model {'x' * 300}", "xxx"),
    (f"--trace {'x' * 300}.csv", "xxx"),
    (f"--name {'x' * 300}", "name"),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_refused_in_one_line_that_names_the_value(words, named, refused):
    assert re.search(named, refused(*ONE, *words.split(" ")))


@pytest.mark.parametrize(("words", "named"), ENORMOUS, ids=[words[:40] for words, _ in ENORMOUS])
def test_a_value_beyond_any_machine_is_bad_input(words, named, refused):
    assert named in refused(*ONE, *words.split())


CHEAP_TO_REFUSE = ["--requests 0", "--workload holiday", "--strategies fancy"]
CHEAP_TO_REFUSE += ["--trace nowhere.csv", f"--name {'x' * 300}"]


@pytest.mark.parametrize("words", CHEAP_TO_REFUSE)
def test_bad_input_is_refused_before_the_model_is_loaded(words, refused, monkeypatch):
    def load_model(name):
        pytest.fail("the model was loaded")

    monkeypatch.setattr("cortexlab.host.models.load_model", load_model)
    refused(*ONE, *words.split())


@pytest.mark.parametrize(
    "words", [[], ["frobnicate"], ["doctor", "--frobnicate"], ["fetch-model", "extra"]]
)
def test_bad_usage_is_refused_in_one_line(words, run):
    code, stdout, stderr = run(*words)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)


def test_a_results_folder_that_cannot_be_written_is_refused_before_any_work(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file" / "x") in refused(*ONE, out=tmp_path / "file" / "x")


@pytest.mark.parametrize("trace", ["azure_2023_conv", "mooncake_conversation"])
def test_a_seed_below_zero_is_refused_with_a_trace(trace, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("CORTEXLAB_TRACES", str(tmp_path))
    (tmp_path / "azure_2023_conv.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,37,4\n"
    )
    (tmp_path / "mooncake_conversation.jsonl").write_text(
        '{"timestamp": 0, "input_length": 37, "output_length": 4, "hash_ids": [0]}\n'
    )
    assert "seed" in refused(*ONE, "--trace", trace, "--request-rate", "trace", "--seed", "-1")


def test_a_broken_trace_is_named_with_its_line(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"timestamp": 0}\n')
    assert f"{tmp_path / 'bad.jsonl'}, line 1" in refused(*ONE, "--trace", tmp_path / "bad.jsonl")


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_truncated_model_file_is_refused_and_no_library_prints(tmp_path):
    folder, out = tmp_path / "cache", tmp_path / "out"
    folder.mkdir()
    (folder / GGUF).write_bytes(b"GGUF\x03\x00\x00\x00")
    done = process(*ONE, "--model", "smollm2", "--out", out, CORTEXLAB_CACHE=str(folder))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert GGUF in done.stderr and "corrupt or truncated" in done.stderr
    assert not out.exists()


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}
DAMAGED = {  # files of a local model folder: name -> text
    "empty folder": {},
    "config is no JSON": {"config.json": "{"},
    "config without a type": {"config.json": "{}"},
    "unknown type": {"config.json": '{"model_type": "abacus"}'},
    "no weights": {"config.json": json.dumps(CONFIG)},
    "truncated weights": {
        "config.json": json.dumps(CONFIG),
        "model.safetensors": "\x40\x00\x00\x00\x00\x00\x00\x00{",
    },
}


@pytest.mark.parametrize("files", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model_folder_is_refused(files, refused, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    assert str(folder) in refused(*ONE, "--model", folder)


def test_a_damaged_model_folder_is_refused_in_one_line_and_no_library_prints(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    done = process(*ONE, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "out").exists()


def test_an_unknown_strategy_is_refused_with_the_names_of_all_strategies(tmp_path):
    done = process(*ONE, "--strategies", "fancy", "--out", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    allowed = ", ".join(sorted([*allocators.STRATEGIES, "mlx-lm"]))
    assert done.stderr == f"cortexlab bench: unknown strategy 'fancy': use one of {allowed}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("name must be a text", "--name must be a text"),
        ("block_size of a/block_size 'block_size'", "--block-size of a/block_size 'block_size'"),
        ("choose another name, or overwrite=True", "choose another name, or --overwrite"),
        ("num_requests must be 1", "--requests must be 1"),
    ],
)
def test_a_parameter_that_a_message_names_is_told_as_an_option(message, expected):
    args = argparse.Namespace(name=None, overwrite=False, block_size=16, requests=1)
    assert options.named_as_options(message, args) == expected
    assert options.named_as_options(message, argparse.Namespace()) == message


def test_what_json_lacks_is_text_in_the_arguments_of_a_result():
    args = argparse.Namespace(command=None, rate=math.inf, low=-math.inf, gap=math.nan, seed=3)
    told = {"rate": "inf", "low": "-inf", "gap": "nan", "seed": 3}
    assert options.given_arguments(args) == told


@pytest.mark.parametrize("command", ["bench", "replay", "allocbench"])
def test_a_default_of_zero_is_on_the_help_page(command, run):
    _, stdout, _ = run(command, "--help")
    (seed,) = re.findall(r"--seed SEED ([^-]*)", stdout)
    assert seed.split()[-2:] == ["(default:", "0)"]


# --- results are written whole or not at all ------------------------------------------------------


SHORT = ["replay", "--requests", "30", "--json"]


def at_once(*each: list) -> list[tuple[int, str, str]]:
    """``(exit code, stdout, stderr)`` of commands that run at the same time."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "cortexlab"]
    started = [subprocess.Popen([*command, *map(str, words)], **piped) for words in each]
    told = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *words) for process, words in zip(started, told, strict=True)]


def test_of_six_runs_of_one_name_one_wins_and_the_others_are_refused(tmp_path):
    words = [*SHORT, "--out", tmp_path / "new", "--name", "mine", "--seed"]
    done = at_once(*([*words, seed] for seed in range(6)))
    assert sorted(code for code, *_ in done) == [0, 2, 2, 2, 2, 2]
    for seed, (code, stdout, stderr) in enumerate(done):
        if code == 2:
            assert stdout == "" and stderr.count("\n") == 1 and "mine" in stderr
        else:
            assert results.read(tmp_path / "new" / "mine")["run"]["arguments"]["seed"] == seed
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["mine"]


def test_six_runs_without_a_name_leave_six_whole_results(tmp_path):
    words = [*SHORT, "--out", tmp_path / "new", "--seed"]
    done = at_once(*([*words, seed] for seed in range(6)))
    assert [code for code, *_ in done] == [0] * 6
    found = [results.read(folder) for folder in (tmp_path / "new").iterdir()]
    assert sorted(each["run"]["arguments"]["seed"] for each in found) == [*range(6)]
    assert all({"rows", "requests", "steps"} < set(each) for each in found)


def test_default_names_of_one_second_differ(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, zone):
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=zone)

    monkeypatch.setattr(results, "datetime", Clock)
    (tmp_path / "bench-20260102T030405Z").mkdir()
    with ExitStack() as claims:
        claimed = [results.claimed(tmp_path, None, command="bench") for _ in range(2)]
        names = [claims.enter_context(each).name for each in claimed]
    assert names == ["bench-20260102T030405Z-2", "bench-20260102T030405Z-3"]


def test_a_folder_that_another_program_made_in_the_meantime_is_not_replaced(tmp_path):
    target = tmp_path / "mine"
    refused = pytest.raises(results.BadInput, match="another program")
    with refused, results.claimed(tmp_path, "mine"), results.written_atomically(target, False):
        target.mkdir()
        (target / "theirs").write_text("precious")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "theirs"]


HOLDER = """
import sys, time
from pathlib import Path
from cortexlab.results import store as results
with results.claimed(Path(sys.argv[1]), "mine", overwrite=True) as target:
    with results.written_atomically(target) as folder:
        (folder / "run.json").write_text("half")
        print("held", flush=True)
        time.sleep(120)
"""


def test_a_killed_run_blocks_its_name_no_longer_than_it_lives(run, tmp_path):
    words = (*SHORT, "--out", tmp_path, "--name", "mine")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        code, stdout, stderr = run(*words)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1) and "another process" in stderr
    finally:
        holder.kill()
        holder.communicate()
    assert visible(tmp_path) == []
    assert run(*words)[0] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"], "the killed run's are left"


def test_a_result_that_a_killed_run_had_taken_away_is_put_back(run, tmp_path):
    (tmp_path / ".mine.old").mkdir()
    (tmp_path / ".mine.old" / "run.json").write_text("old")
    code, _, stderr = run(*SHORT, "--out", tmp_path, "--name", "mine")
    assert code == 2 and "exist already" in stderr
    assert (tmp_path / "mine" / "run.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("out", ["/proc/nope/x", "/proc"])
def test_an_out_that_even_root_cannot_make_is_refused_before_the_first_step(out, run, monkeypatch):
    def replay(*_, **__):
        pytest.fail("a step was made")

    monkeypatch.setattr("cortexlab.replay.replay", replay)
    code, stdout, stderr = run(*SHORT, "--out", out, "--name", "mine")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and out in stderr


def test_a_refusal_after_the_name_is_taken_leaves_no_folder(run, tmp_path):
    code, *_ = run(*SHORT, "--out", tmp_path / "a" / "b", "--num-blocks", "fifty")
    assert code == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\nb", "\udcff"])
def test_a_name_that_makes_no_result_folder_is_refused_in_one_line(name, run, tmp_path):
    code, stdout, stderr = run(*SHORT, "--out", tmp_path, "--name", name)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and "--name must be" in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [4_000, 60_000], ids=["a table", "a figure"])
def test_a_full_disk_is_one_line_that_names_the_folder_and_keeps_the_old_result(limit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("old")
    command = [sys.executable, "-m", "cortexlab", "replay", "--requests", "300", "--overwrite"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--name", "mine"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(tmp_path / "mine") in done.stderr and "File too large" in done.stderr
    assert (tmp_path / "mine" / "run.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_a_japanese_name_is_told_where_standard_output_knows_ascii_alone(tmp_path):
    words = ["replay", "--requests", "30", "--out", tmp_path, "--name", "結果"]
    done = process(*words, PYTHONIOENCODING="ascii", MPLBACKEND="nonsense")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u7d50\u679c" in done.stdout and visible(tmp_path) == ["結果"]
    page = process("report", tmp_path / "結果", PYTHONIOENCODING="ascii", MPLBACKEND="nonsense")
    assert (page.returncode, page.stderr) == (0, "")


def visible(folder: Path) -> list[str]:
    """Sorted names of the entries that are not hidden."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def test_an_exception_leaves_no_half_result(tmp_path):
    with pytest.raises(ZeroDivisionError), results.written_atomically(tmp_path / "mine") as folder:
        (folder / "rows.parquet").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_earlier_result(tmp_path):
    with results.written_atomically(tmp_path / "mine") as folder:
        (folder / "run.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), results.written_atomically(tmp_path / "mine") as folder:
        (folder / "run.json").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "mine" / "run.json").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from cortexlab.results import store as results
with results.written_atomically(Path(sys.argv[1])) as folder:
    (folder / "rows.parquet").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", [None, "old"], ids=["a new result", "over an old one"])
def test_a_killed_writer_leaves_no_half_result(before, tmp_path):
    target = tmp_path / "mine"
    if before:
        target.mkdir()
        (target / "run.json").write_text(before)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target)], capture_output=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert visible(tmp_path) == (["mine"] if before else [])
    assert [file.name for file in target.glob("*")] == (["run.json"] if before else [])
    # The hidden folder of the killed writer blocks no later writer.
    with results.written_atomically(target) as folder:
        (folder / "run.json").write_text("new")
    assert (target / "run.json").read_text() == "new"


# --- the other commands ---------------------------------------------------------------------------


COMMANDS = ["doctor", "bench", "replay", "allocbench", "sweep", "compare", "report"]
COMMANDS += ["traces", "fetch-model", "lab"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_page(command, run):
    code, stdout, stderr = run(command, "--help")
    assert (code, stderr) == (0, "")
    assert command in stdout


def test_doctor_describes_the_machine_and_names_a_cure_for_each_problem(tmp_path):
    """A missing model is a problem, with exit code 1."""
    done = process("doctor", "--json", CORTEXLAB_CACHE=str(tmp_path))
    found = strict(done.stdout)
    names = "mlx_version device blas sgemm_gflops memory_bandwidth_gb_s model memory_bytes problems"
    assert {*names.split()} <= {*found}
    assert found["sgemm_gflops"] > 0 and found["memory_bandwidth_gb_s"] > 0
    assert found["memory_bytes"] > 1 << 28
    assert all(problem["what"] and problem["cure"] for problem in found["problems"])
    assert (done.stderr, list(tmp_path.iterdir())) == ("", [])
    if found["model"] is None:
        assert done.returncode == 1
        assert any("fetch-model" in problem["cure"] for problem in found["problems"])


def test_doctor_calls_a_damaged_model_a_problem(run, tmp_path, monkeypatch):
    (tmp_path / GGUF).write_bytes(b"GGUF")
    monkeypatch.setattr("cortexlab.host.models.find_smollm2", lambda: tmp_path / GGUF)
    code, stdout, _ = run("doctor")
    assert code == 1
    assert "GFLOP/s" in stdout and "corrupt or truncated" in stdout and "fetch-model" in stdout


def readme_strategy() -> str:
    """Source of the strategy `Tidy` in the README."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    return next(example for example in examples if "class Tidy" in example)


def bench_in(folder: Path, strategies: str) -> subprocess.CompletedProcess:
    """A bench whose working directory is ``folder``."""
    words = "bench --model tiny --requests 4 --workload lognormal --json --strategies"
    command = [sys.executable, "-m", "cortexlab", *words.split(), strategies]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_readmes_strategy_runs_and_keeps_the_contract(tmp_path):
    (tmp_path / "mine.py").write_text(readme_strategy())
    done = bench_in(tmp_path, "mine:Tidy,paged")
    assert done.returncode == 0, done.stderr
    tidy, paged = json.loads(done.stdout)["rows"]
    assert (tidy["strategy"], paged["strategy"]) == ("Tidy", "paged")
    assert tidy["tokens_sha256"] == paged["tokens_sha256"]
    namespace = {}
    exec(readme_strategy(), namespace)
    conformance.prove(namespace["Tidy"], has_room=conformance.has_enough)


def test_a_strategy_that_raises_is_refused_in_one_line(tmp_path):
    allocate = "def allocate(self, n):"
    source = readme_strategy().replace(allocate, f"{allocate}\n        n < 2 or 1 / 0")
    (tmp_path / "bad.py").write_text(source)
    done = bench_in(tmp_path, "bad:Tidy")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "ZeroDivisionError" in done.stderr


def test_lab_passes_unknown_options_to_jupyterlab(monkeypatch):
    seen = []
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr("os.execv", lambda path, arguments: seen.extend(arguments))
    cli.main(["lab", "--no-browser", "--port", "8889"])
    assert seen[-3:] == ["--no-browser", "--port", "8889"]
