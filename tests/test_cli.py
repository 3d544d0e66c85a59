"""The command line as a user meets it: good runs leave whole results, bad input leaves one line and
nothing else.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from cortexlab import allocators
from cortexlab.cli import main as cli
from cortexlab.lab import conformance as proving
from cortexlab.results import store as results

STRATEGIES = ["static", "cortexstream", "paged", "mlx-lm"]
ROW = [
    "strategy",
    "block_size",
    "num_blocks",
    "batch_size",
    "completed",
    "refused",
    "duration",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "output_throughput",
    "token_share",
    "reserved_share",
    "internal_share",
    "external_share",
    "external_fragmentation",
    "num_holes",
    "copied_bytes",
    "peak_kv_bytes",
    "arena_bytes",
    "num_preemptions",
    "tokens_sha256",
    "requests_identical",
    "requests_near_tie",
    "max_gap",
]
ROW += [
    f"{statistic}_{name}_ms"
    for statistic in ("mean", "median", "p99")
    for name in ("ttft", "tpot", "itl", "e2el")
]
SMALL = [
    "--model",
    "tiny",
    "--requests",
    "6",
    "--batch-size",
    "3",
    "--seed",
    "1",
    "--workload",
    "lognormal",
    "--scale-lengths",
    "0.3",
]
ONE = [
    "bench",
    "--model",
    "tiny",
    "--requests",
    "2",
    "--batch-size",
    "2",
    "--workload",
    "lognormal",
    "--scale-lengths",
    "0.1",
    "--strategies",
    "cortexstream",
    "--json",
]


def process(*words, **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cortexlab", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def strict(text: str):
    """JSON as every reader takes it: without NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


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
    """Bad input: exit code 2, one line on standard error, nothing on standard output, nothing
    written. Gives the line.
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
    """One run of four strategies: the process and its folder."""
    out = tmp_path_factory.mktemp("results")
    done = process(
        "bench",
        "--json",
        *SMALL,
        "--strategies",
        ",".join(STRATEGIES),
        "--out",
        out,
        "--name",
        "good",
    )
    assert done.returncode == 0, done.stderr
    return done, out / "good"


def test_json_is_one_document_and_nothing_else(bench):
    done, _ = bench
    document = strict(done.stdout)
    assert set(document) >= {"environment", "rows", "ratios"}
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_every_row_has_every_field(bench):
    rows = strict(bench[0].stdout)["rows"]
    assert [row["strategy"] for row in rows] == STRATEGIES
    for row in rows:
        assert [name for name in ROW if name not in row] == []
        assert (row["completed"], row["refused"], row["batch_size"]) == (6, 0, 3)
        assert row["requests_identical"] + row["requests_near_tie"] == 6
        assert row["request_throughput"] == pytest.approx(6 / row["duration"])
        assert row["output_throughput"] == pytest.approx(
            row["total_output_tokens"] / row["duration"]
        )


def test_every_strategy_yields_the_same_tokens(bench):
    rows = strict(bench[0].stdout)["rows"]
    assert len({row["tokens_sha256"] for row in rows}) == 1
    assert len({(row["total_input_tokens"], row["total_output_tokens"]) for row in rows}) == 1


def test_shares_sum_to_one(bench):
    for row in strict(bench[0].stdout)["rows"]:
        shares = [row[f"{name}_share"] for name in ("token", "reserved", "internal", "external")]
        assert sum(shares) == pytest.approx(1) and all(0 <= share <= 1 for share in shares)


def test_what_does_not_apply_to_mlx_lm_is_null_and_never_zero(bench):
    *ours, theirs = strict(bench[0].stdout)["rows"]
    for name in (
        "block_size",
        "num_blocks",
        "external_fragmentation",
        "num_holes",
        "copied_bytes",
        "arena_bytes",
        "num_preemptions",
    ):
        assert theirs[name] is None
        assert all(row[name] is not None for row in ours)
    assert theirs["external_share"] == 0


def test_ratios_compare_every_strategy_to_mlx_lm(bench):
    ratios = strict(bench[0].stdout)["ratios"]
    assert [ratio["strategy"] for ratio in ratios] == STRATEGIES[:-1]
    assert all(
        ratio["baseline"] == "mlx-lm"
        and set(ratio["output_throughput"]) == {"median", "min", "max", "n"}
        for ratio in ratios
    )


def test_the_result_is_whole(bench):
    _, folder = bench
    assert {file.name for file in folder.iterdir()} >= {
        "rows.parquet",
        "requests.parquet",
        "steps.parquet",
        "run.json",
    }
    figures = list(folder.glob("*.png"))
    assert figures and all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    assert [entry.name for entry in folder.parent.iterdir()] == ["good"], (
        "nothing temporary is left"
    )
    found = results.read(folder)
    assert list(found["rows"]["strategy"]) == STRATEGIES
    assert len(found["requests"]) == 6 * len(STRATEGIES)
    assert found["run"]["environment"]["mlx_version"]


def test_run_json_is_json_for_every_reader(bench):
    strict((bench[1] / "run.json").read_text())


def test_a_seed_is_a_run(bench, run, tmp_path):
    rows = strict(bench[0].stdout)["rows"]
    code, stdout, _ = run("bench", "--json", *SMALL, "--strategies", "paged", "--out", tmp_path)
    (row,) = strict(stdout)["rows"]
    assert (code, row["tokens_sha256"]) == (0, rows[0]["tokens_sha256"])


def test_without_json_a_table_and_where_the_files_are(run, tmp_path):
    code, stdout, stderr = run(*ONE[:-1], "--out", tmp_path, "--name", "table")
    assert (code, stderr) == (0, "")
    assert "cortexstream" in stdout and str(tmp_path / "table") in stdout
    assert max(map(len, stdout.splitlines()[1:3])) <= 120


def test_the_default_name_is_command_and_time(run, tmp_path):
    run(*ONE, "--out", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert pd.to_datetime(folder.name.removeprefix("bench-"), format="%Y%m%dT%H%M%SZ")


# --- names in use, refusals, own strategies -------------------------------------------------------


def test_a_name_in_use_is_refused_unless_overwrite_is_said(run, tmp_path):
    words = (*ONE, "--out", tmp_path, "--name", "mine")
    assert run(*words)[0] == 0
    before = (tmp_path / "mine" / "run.json").read_bytes()
    code, stdout, stderr = run(*words)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "mine" in stderr and "--overwrite" in stderr
    assert (tmp_path / "mine" / "run.json").read_bytes() == before
    assert run(*words, "--overwrite", "--seed", "7")[0] == 0
    assert results.read(tmp_path / "mine")["run"]["arguments"]["seed"] == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_a_file_is_no_result_to_overwrite(run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    code, stdout, stderr = run(*ONE, "--out", tmp_path, "--name", "mine", "--overwrite")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_request_that_cannot_fit_is_refused_by_name_and_counted(run, tmp_path):
    code, stdout, stderr = run(
        "bench",
        "--json",
        *SMALL,
        "--strategies",
        "paged,mlx-lm",
        "--max-seq-len",
        "55",
        "--out",
        tmp_path,
    )
    assert code == 0
    for row in strict(stdout)["rows"]:
        assert row["refused"] > 0 and row["completed"] + row["refused"] == 6
    refusals = [line for line in stderr.splitlines() if line.startswith("paged")]
    assert len(refusals) == strict(stdout)["rows"][0]["refused"]
    assert all("'r" in line and "55" in line for line in refusals)


def test_when_every_request_is_refused_that_is_bad_input(refused):
    assert "'r0'" in refused(*ONE, "--max-seq-len", "1")


def test_when_every_request_is_refused_after_another_strategy_refused_some_it_is_still_one_line(
    refused,
):
    refused(
        "bench",
        "--json",
        *SMALL,
        "--strategies",
        "mlx-lm,paged",
        "--max-seq-len",
        "55",
        "--num-blocks",
        "1",
        "--block-size",
        "4",
    )


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
    (tmp_path / "own_allocators.py").write_text(OWN)
    (tmp_path / "broken_allocators.py").write_text("def (\n")
    monkeypatch.chdir(tmp_path)
    yield
    for module in ("own_allocators", "broken_allocators"):
        sys.modules.pop(module, None)


def test_a_strategy_of_ones_own_is_a_file_in_the_working_directory(own, run, tmp_path):
    code, stdout, _ = run(
        "bench",
        "--json",
        *SMALL,
        "--strategies",
        "own_allocators:Mine,paged",
        "--out",
        tmp_path / "out",
    )
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
def test_a_strategy_of_ones_own_that_cannot_be_used_is_refused_by_name(name, own, refused):
    line = refused(*ONE, "--strategies", name)
    assert any(part and part in line for part in (name, name.rpartition(":")[2], "17"))


# --- bad input ------------------------------------------------------------------------------------

BAD = [  # words, what the line names
    ("--strategies fancy", "'fancy'"),
    ("--strategies paged,fancy", "'fancy'"),
    ("--strategies paged,", "strategy"),
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
def test_bad_input_is_one_line_that_names_it(words, named, refused):
    assert re.search(named, refused(*ONE, *words.split(" ")))


@pytest.mark.parametrize(("words", "named"), ENORMOUS, ids=[words[:40] for words, _ in ENORMOUS])
def test_a_value_beyond_any_machine_is_bad_input_too(words, named, refused):
    assert named in refused(*ONE, *words.split())


@pytest.mark.parametrize(
    "words",
    [
        "--requests 0",
        "--workload holiday",
        "--strategies fancy",
        "--trace nowhere.csv",
        f"--name {'x' * 300}",
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(words, refused, monkeypatch):
    monkeypatch.setattr(
        "cortexlab.host.models.load_model", lambda name: pytest.fail("the model was loaded")
    )
    refused(*ONE, *words.split())


@pytest.mark.parametrize(
    "words", [[], ["frobnicate"], ["doctor", "--frobnicate"], ["fetch-model", "extra"]]
)
def test_bad_usage_is_one_line(words, run):
    code, stdout, stderr = run(*words)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)


def test_a_results_folder_that_cannot_be_written_is_refused_before_any_work(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file" / "x") in refused(*ONE, out=tmp_path / "file" / "x")


@pytest.mark.parametrize("trace", ["azure_2023_conv", "mooncake_conversation"])
def test_a_seed_below_zero_is_refused_with_a_trace_too(trace, refused, tmp_path, monkeypatch):
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


def test_a_truncated_model_file_is_refused(tmp_path):
    """In a process of its own: nothing below may print either."""
    folder, out = tmp_path / "cache", tmp_path / "out"
    folder.mkdir()
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    done = process(*ONE, "--model", "smollm2", "--out", out, CORTEXLAB_CACHE=str(folder))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert (
        "SmolLM2-135M-Instruct.Q4_1.gguf" in done.stderr and "corrupt or truncated" in done.stderr
    )
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
DAMAGED = {  # the files of a local model folder
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


def test_a_damaged_model_folder_is_one_line_in_a_process_of_its_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    done = process(*ONE, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "out").exists()


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = process(*ONE, "--strategies", "fancy", "--out", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    allowed = ", ".join(sorted([*allocators.STRATEGIES, "mlx-lm"]))
    assert done.stderr == f"cortexlab bench: unknown strategy 'fancy': use one of {allowed}\n"
    assert list(tmp_path.iterdir()) == []


# --- whole or not at all --------------------------------------------------------------------------


def visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def test_an_exception_leaves_no_half_result(tmp_path):
    with pytest.raises(ZeroDivisionError), results.written_atomically(tmp_path / "mine") as folder:
        (folder / "rows.parquet").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_result_that_was_there(tmp_path):
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
    with results.written_atomically(target) as folder:  # and the next writer is not in its way
        (folder / "run.json").write_text("new")
    assert (target / "run.json").read_text() == "new"


# --- the other commands ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["doctor", "bench", "replay", "allocbench", "sweep", "compare", "report", "fetch-model", "lab"],
)
def test_every_command_explains_itself(command, run):
    code, stdout, stderr = run(command, "--help")
    assert (code, stderr) == (0, "")
    assert command in stdout


def test_doctor_says_what_this_machine_is_and_what_is_missing(tmp_path):
    """Without the embedded model: a problem with its cure, and exit code 1."""
    done = process("doctor", "--json", CORTEXLAB_CACHE=str(tmp_path))
    found = strict(done.stdout)
    assert {
        "mlx_version",
        "device",
        "blas",
        "sgemm_gflops",
        "memory_bandwidth_gb_s",
        "model",
        "memory_bytes",
        "problems",
    } <= set(found)
    assert (
        found["sgemm_gflops"] > 0
        and found["memory_bandwidth_gb_s"] > 0
        and found["memory_bytes"] > 1 << 28
    )
    assert all(problem["what"] and problem["cure"] for problem in found["problems"])
    assert (done.stderr, list(tmp_path.iterdir())) == ("", [])
    if found["model"] is None:
        assert done.returncode == 1
        assert any("fetch-model" in problem["cure"] for problem in found["problems"])


def test_doctor_calls_a_damaged_model_a_problem(run, tmp_path, monkeypatch):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(
        "cortexlab.host.models.find_smollm2", lambda: tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    code, stdout, _ = run("doctor")
    assert code == 1
    assert "GFLOP/s" in stdout and "corrupt or truncated" in stdout and "fetch-model" in stdout


def readme_strategy() -> str:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    return next(
        block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "class Tidy" in block
    )


def test_the_readmes_own_strategy_runs_and_one_that_raises_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text(readme_strategy())
    (tmp_path / "bad.py").write_text(
        readme_strategy().replace(
            "def allocate(self, n):", "def allocate(self, n):\n        n < 2 or 1 / 0"
        )
    )
    command = [
        sys.executable,
        "-m",
        "cortexlab",
        "bench",
        "--model",
        "tiny",
        "--requests",
        "4",
        "--workload",
        "lognormal",
        "--json",
    ]
    good = subprocess.run(
        [*command, "--strategies", "mine:Tidy,paged"], cwd=tmp_path, capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    rows = json.loads(good.stdout)["rows"]
    assert [row["strategy"] for row in rows] == ["Tidy", "paged"] and rows[0][
        "tokens_sha256"
    ] == rows[1]["tokens_sha256"]
    namespace = {}
    exec(readme_strategy(), namespace)
    proving.prove(namespace["Tidy"], has_room=proving.has_enough)
    bad = subprocess.run(
        [*command, "--strategies", "bad:Tidy"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (
        2,
        "",
        1,
    ) and "ZeroDivisionError" in bad.stderr


def test_lab_passes_other_options_on(monkeypatch):
    seen = []
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr("os.execv", lambda path, arguments: seen.extend(arguments))
    cli.main(["lab", "--no-browser", "--port", "8889"])
    assert seen[-3:] == ["--no-browser", "--port", "8889"]
