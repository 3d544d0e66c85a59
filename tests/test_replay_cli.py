"""The commands `cortexlab replay` and `cortexlab allocbench`."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from conftest import strict

from cortexlab.allocators import STRATEGIES
from cortexlab.cli import main as cli
from cortexlab.metrics import SHARES
from cortexlab.replay import reference
from cortexlab.results import console

ROW = ["strategy", "block_size", "num_blocks", "batch_size", "completed", "refused", "duration"]
ROW += ["total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput"]
ROW += ["token_share", "reserved_share", "internal_share", "external_share"]
ROW += ["external_fragmentation", "num_holes", "num_preemptions", "requests", "tokens"]
ROW += ["utilization", "prefix_hit_rate", "prefix_hit_tokens_rate", "long_extent_share"]
ROW += ["extents_per_sequence", "peak_blocks", "copied_blocks", "seconds"]
ROW += [
    f"{statistic}_{name}_ms"
    for statistic in ("mean", "median", "p99")
    for name in ("ttft", "tpot", "itl", "e2el")
]
SMALL = ["replay", "--requests", "60", "--workload", "heavy-tail", "--request-rate", "40"]
SMALL += ["--seed", "1"]


@pytest.fixture
def run(capsys, tmp_path):
    """The command line in this process: ``(exit code, stdout, stderr)``. Results go to the folder
    ``out`` of ``tmp_path``.
    """

    def run(*words, out=tmp_path / "out"):
        capsys.readouterr()
        where = () if words[0] == "allocbench" else ("--out", str(out))
        try:
            code = cli.main([*map(str, words), *where])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_a_replay_of_every_strategy_has_a_row_each_and_a_whole_result(run, tmp_path):
    words = ["--num-blocks", "60%", "--json", "--name", "all"]
    code, stdout, stderr = run(*SMALL, "--strategies", ",".join(STRATEGIES), *words)
    assert (code, stderr) == (0, "")
    rows = strict(stdout)["rows"]
    assert [row["strategy"] for row in rows] == list(STRATEGIES)
    for row in rows:
        assert [name for name in ROW if name not in row] == []
        assert sum(row[f"{name}_share"] for name in SHARES) == pytest.approx(1)
        assert row["completed"] + row["refused"] == row["requests"] == 60
        assert row["prefix_hit_rate"] is row["prefix_hit_tokens_rate"] is None, "no prefix caching"
    folder = tmp_path / "out" / "all"
    files = {file.name for file in folder.iterdir()}
    assert files >= {"rows.parquet", "requests.parquet", "steps.parquet", "run.json", "memory.png"}
    requests = pd.read_parquet(folder / "requests.parquet")
    assert len(requests) == sum(row["completed"] for row in rows)
    assert (requests["finished_at"] >= requests["first_token_at"]).all()
    assert (requests["first_token_at"] > requests["arrived_at"]).all()


def test_a_replay_says_in_one_sentence_which_strategy_is_best(run, tmp_path):
    words = "--strategies static,paged,runs --num-blocks 60% --name said"
    code, stdout, _ = run(*SMALL, *words.split())
    made = json.loads((tmp_path / "out" / "said" / "run.json").read_text())
    assert code == 0 and made["recommendation"].startswith("Best: runs; mean TTFT in seconds: ")
    assert made["recommendation"] in " ".join(stdout.split())


def test_replays_of_equal_seed_print_equal_rows_but_for_the_wall_time(run):
    words = "--strategies paged,runs --num-blocks 40% --json --name again --overwrite"
    documents = []
    for _ in range(2):
        rows = strict(run(*SMALL, *words.split())[1])["rows"]
        assert all(row.pop("seconds") > 0 for row in rows)
        documents.append(json.dumps(rows))
    assert documents[0] == documents[1]


def test_larger_blocks_have_lower_utilization_and_fewer_extents(run):
    _, stdout, _ = run(*SMALL, "--block-size", "8,64,512", "--json")
    rows = strict(stdout)["rows"]
    assert [row["block_size"] for row in rows] == [8, 64, 512]
    assert rows[0]["utilization"] > rows[1]["utilization"] > rows[2]["utilization"]
    fewest = rows[2]["extents_per_sequence"]
    assert rows[0]["extents_per_sequence"] > fewest == pytest.approx(1, abs=1)


def test_a_users_own_strategy_is_in_the_printed_table(run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from cortexlab.allocators.paged import Paged\n\nclass Mine(Paged):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = run(*SMALL, "--strategies", "paged,mine:Mine")
    sys.modules.pop("mine", None)
    assert code == 0 and re.search(r"^Mine +16 ", stdout, re.MULTILINE)


def test_a_step_time_fitted_by_bench_is_used_by_the_replay(run, tmp_path):
    bench = "bench --model tiny --requests 3 --batch-size 2 --workload lognormal"
    bench += " --scale-lengths 0.2 --strategies paged --name fitted"
    assert run(*bench.split())[0] == 0
    file = tmp_path / "out" / "fitted" / "step_time.json"
    assert set(strict(file.read_text())) >= {"base_s", "token_s", "sequence_s", "r_squared"}
    reference, fitted = (
        strict(run(*SMALL, "--json", "--name", name, *given)[1])["rows"][0]
        for name, given in [("a", ()), ("b", ("--step-time", file))]
    )
    assert reference["median_tpot_ms"] != fitted["median_tpot_ms"]
    used = strict((tmp_path / "out" / "b" / "run.json").read_text())["step_time"]
    assert used == {name: strict(file.read_text())[name] for name in used}


def test_a_policy_that_fails_requests_ends_with_exit_code_1(run):
    words = "--strategies cortexstream --num-blocks 30% --oom-policy fail --json"
    code, stdout, _ = run(*SMALL, *words.split())
    (row,) = strict(stdout)["rows"]
    assert code == 1 and row["failed"] > 0
    assert row["completed"] + row["failed"] + row["refused"] == 60


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    _, stdout, _ = run(*SMALL, "--strategies", ",".join(STRATEGIES), "--num-blocks", "60%")
    assert max(map(len, stdout.splitlines()[: len(STRATEGIES) + 3])) <= width
    assert "TTFT s" in stdout and "left out for width" in stdout


def test_a_column_without_a_value_in_any_row_is_not_printed():
    row = dict.fromkeys([column.name for column in console.REPLAY_COLUMNS], 1.0)
    row |= {"completed_by_last_arrival": 1, "requests": 1}
    assert "hits" not in console.replay_table([row | {"prefix_hit_rate": None}], 200)
    assert "hits" in console.replay_table([row | {"prefix_hit_rate": 0.5}], 200)


def test_the_help_page_tells_the_reference_step_time(run):
    told = (
        f"{1e3 * reference.base_s:g} ms + {1e6 * reference.token_s:g} us a token + "
        f"{1e3 * reference.sequence_s:g} ms a sequence"
    )
    assert told in " ".join(run("replay", "--help")[1].split())


BAD = [
    ("--strategies fancy", "'fancy'"),
    ("--strategies mlx-lm", "'mlx-lm'"),
    ("--workload holiday", "'holiday'"),
    ("--trace nowhere.csv", "'nowhere.csv'"),
    *(
        (f"--{option} {value}", f"{option}.*{value}")
        for option in ("block-size", "num-blocks", "max-batch-size", "requests", "max-seq-len")
        for value in ("0", "-1", "many")
    ),
    ("--block-size 16,", "block-size"),
    ("--num-blocks 0%", "num-blocks.*0%"),
    ("--num-blocks foo", "--num-blocks must be unlimited, a whole number.* 60%, not 'foo'"),
    ("--num-blocks 1", "none of 60 can ever fit"),
    ("--growth sideways", "sideways"),
    ("--oom-policy hope", "hope"),
    ("--step-time nowhere.json", "nowhere.json"),
    ("--seed -1", "seed.*-1"),
    ("--name a/b", "'a/b'"),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_refused_in_one_line_that_names_the_value(words, named, run, tmp_path):
    code, stdout, stderr = run(*SMALL, *words.split(" "))
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert re.search(named, stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"base_s": 1}',
        '{"base_s": -1, "token_s": 0, "sequence_s": 0}',
        '{"base_s": "1", "token_s": 0, "sequence_s": 0}',
        '{"base_s": 0, "token_s": 0, "sequence_s": 0}',
    ],
)
def test_a_file_without_a_valid_step_time_is_refused(text, run, tmp_path):
    file = tmp_path / "step_time.json"
    file.write_text(text)
    code, _, stderr = run(*SMALL, "--step-time", file)
    assert code == 2 and stderr.count("\n") == 1 and "step time" in stderr


def test_prefix_caching_needs_the_traces_block_size_or_a_multiple(run, tmp_path):
    file = tmp_path / "small.jsonl"
    line = {"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}
    file.write_text(json.dumps(line) + "\n")
    words = ["replay", "--trace", file, "--prefix-caching"]
    code, _, stderr = run(*words, "--block-size", "16")
    assert code == 2 and "512" in stderr
    code, stdout, _ = run(*words, "--block-size", "1024", "--json")
    assert code == 0 and strict(stdout)["rows"][0]["prefix_hit_rate"] == 0


def test_prefix_caching_is_refused_for_a_strategy_that_hands_out_regions(run):
    words = "--workload shared-prefix --block-size 512 --strategies static --prefix-caching"
    code, _, stderr = run("replay", *words.split())
    assert code == 2 and "static" in stderr and "--prefix-caching shares" in stderr


def test_allocbench_prints_a_document_and_refuses_an_empty_pool(run):
    words = "--strategies segregated --num-blocks 256 --request-blocks 4 --json"
    code, stdout, stderr = run("allocbench", *words.split())
    assert (code, stderr) == (0, "")
    operations = {row["operation"] for row in strict(stdout)["rows"]}
    assert operations == {"allocate+free", "extend", "stats"}
    code, stdout, stderr = run("allocbench", "--num-blocks", "0")
    assert (code, stdout) == (2, "") and "num-blocks" in stderr


def test_a_replay_in_a_process_of_its_own_loads_no_mlx(tmp_path):
    code = (
        "import sys; from cortexlab.cli.main import main; "
        f"main({[*SMALL, '--out', str(tmp_path)]}); sys.exit('mlx.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0
