"""Traces of every format give the right requests; what is not taken as it stands is said; a refusal
is one line that helps.
"""

import gzip
import io
import itertools
import json
import sys
import time

import pyarrow
import pytest
from conftest import real_trace, strict
from test_workload import AZURE, AZURE_ROW, mooncake, refused, saved

from cortexlab import CortexLabError
from cortexlab.cli import main as cli
from cortexlab.workloads.trace_summary import repeated_prefix_share, summary
from cortexlab.workloads.traces import find_trace, load_trace, read_trace

AZURE_2024 = AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,1000,4\n"
BURST_GPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_GPT_2 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def request(timestamp=None, prompt=40, output=5, ids=None, **more) -> dict:
    """A row of Mooncake's columns; None is left out."""
    row = {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": ids}
    return {name: value for name, value in (row | more).items() if value is not None}


def seen(trace) -> list[tuple]:
    """Arrival, prompt and output of each request."""
    return [
        (pytest.approx(item.arrived_at, abs=1e-9), item.prompt_tokens, item.output_tokens)
        for item in trace.items
    ]


# --- formats --------------------------------------------------------------------------------------

FORMATS = {  # name -> (content, format, arrival, prompt and output of each request)
    "Azure 2024": (AZURE_2024, "Azure 2024", [(0, 2162, 5), (0.99007, 1000, 4)]),
    "Z, and offsets that differ": (
        AZURE + "2024-05-10 00:00:00Z,7,5\n2024-05-10T02:00:00.5+02:00,8,4\n",
        "Azure 2024",
        [(0, 7, 5), (0.5, 8, 4)],
    ),
    "an earlier instant further down": (
        AZURE + "2024-05-10 00:00:01+00:00,7,5\n2024-05-10 00:30:00.75+00:30,8,4\n",
        "Azure 2024",
        [(0, 8, 4), (0.25, 7, 5)],
    ),
    "blanks behind commas": (
        "TIMESTAMP, ContextTokens, GeneratedTokens\n2023-11-16, 7, 5\n2023-11-16 00:00:02, 8, 4\n",
        "Azure 2023",
        [(0, 7, 5), (2, 8, 4)],
    ),
    "BurstGPT": (
        BURST_GPT + "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,230,1317,API log\n",
        "BurstGPT",
        [(0, 472, 18), (40.5, 1087, 230)],
    ),
    "BurstGPT with sessions": (
        BURST_GPT_2 + "19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log\n"
        "19440161.0,d5983bf9,2,ChatGPT,36,29,65,Conversation log\n",
        "BurstGPT",
        [(0, 906, 446), (51, 36, 29)],
    ),
    "Vidur": (VIDUR + "0.0,374,44\n4.25,396,109\n", "Vidur", [(0, 374, 44), (4.25, 396, 109)]),
    "Vidur's lengths": (
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n4,2,6,2.0\n9,3,12,3.0\n",
        "Vidur",
        [(0, 4, 2), (0, 9, 3)],
    ),
    "Vidur out of order": (VIDUR + "9,3,1\n7.5,4,2\n", "Vidur", [(0, 4, 2), (1.5, 3, 1)]),
    "Splitwise": (
        "request_id,arrival_timestamp,prompt_size,token_size\n0,1.5,8,4\n1,2,9,5\n",
        "Splitwise",
        [(0, 8, 4), (0.5, 9, 5)],
    ),
    "Mooncake in float milliseconds, without ids": (
        jsonl(request(1000.5), request(1250.75, 600)),
        "Mooncake",
        [(0, 40, 5), (0.25025, 600, 5)],
    ),
    "AIPerf": (
        jsonl(
            request(100, session_id="a"),
            request(350, 7, session_id="b"),
            request(None, 50, delay=1000, session_id="a"),
            request(None, 8, delay=10.5, session_id="b"),
            request(None, 60, delay=2000, session_id="a"),
        ),
        "AIPerf",
        [(0, 40, 5), (0.25, 7, 5), (0.2605, 8, 5), (1, 50, 5), (3, 60, 5)],
    ),
    "vLLM in seconds": (
        jsonl(request(2, 40, ids=[1, 2, 3]), request(2.5, 17, ids=[1, 4])),
        "vLLM timed_trace",
        [(0, 40, 5), (0.5, 17, 5)],
    ),
    "vLLM in milliseconds": (
        jsonl(request(2000, 40, ids=[1, 2, 3]), request(2500, 17, ids=[1, 4])),
        "vLLM timed_trace",
        [(0, 40, 5), (0.5, 17, 5)],
    ),
    "vLLM in milliseconds, a mean gap under 60": (
        jsonl(request(2000, 40, ids=[1, 2, 3]), request(2040, 17, ids=[1, 4])),
        "vLLM timed_trace",
        [(0, 40, 5), (0.04, 17, 5)],
    ),
    "vLLM in whole seconds": (
        jsonl(request(2, 40, ids=[1, 2, 3]), request(2, 9, ids=[1]), request(3, 17, ids=[1, 4])),
        "vLLM timed_trace",
        [(0, 40, 5), (0, 9, 5), (1, 17, 5)],
    ),
    "Bailian": (
        jsonl(
            request(61.114, 33, chat_id=9, parent_chat_id=-1, type="text", turn=1, ids=[5, 6, 7]),
            request(62.5, 16, chat_id=10, parent_chat_id=9, type="text", turn=2, ids=[5]),
        ),
        "Bailian",
        [(0, 33, 5), (1.386, 16, 5)],
    ),
}


@pytest.mark.parametrize(("content", "name", "right"), FORMATS.values(), ids=FORMATS)
def test_a_format_is_told_by_its_columns(content, name, right, tmp_path):
    trace = read_trace(saved(tmp_path, "t.txt", content))
    assert trace.format == name
    assert seen(trace) == right


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_gaps_do_not_depend_on_the_machines_time_zone(zone, tmp_path, monkeypatch):
    """Clocks in New York went forward between these stamps."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    path = saved(tmp_path, "a.csv", AZURE + "2024-03-10 01:59:59,7,5\n2024-03-10 03:00:00,8,4\n")
    assert load_trace(path)[1].arrived_at == 3601
    monkeypatch.undo()
    time.tzset()


def test_bailians_ids_are_chained_so_that_an_id_stands_for_a_whole_prefix(tmp_path):
    chats = [[5, 6, 7], [5, 6, 8], [9, 6, 7]]
    rows = [request(at, 48, ids=ids, chat_id=at, parent_chat_id=-1) for at, ids in enumerate(chats)]
    a, b, c = load_trace(saved(tmp_path, "b.jsonl", jsonl(*rows)))
    assert a.prefix_block == 16 and a.prefix_ids[:2] == b.prefix_ids[:2]
    assert len({*a.prefix_ids, *b.prefix_ids, *c.prefix_ids}) == 3 + 1 + 3
    assert repeated_prefix_share([a, b, c]) == 2 / 9


def test_trace_block_says_how_many_tokens_an_id_stands_for(tmp_path):
    path = saved(tmp_path, "m.jsonl", jsonl(request(0, 100, ids=[1, 2]), request(40, 64, ids=[1])))
    assert "trace_block" in refused(path, 1, "512 of 100")
    items = load_trace(path, trace_block=64)
    assert [(item.prefix_ids, item.prefix_block) for item in items] == [((1, 2), 64), ((1,), 64)]
    with pytest.raises(CortexLabError, match=r"trace_block.*0"):
        load_trace(path, trace_block=0)


UNITS = {  # stamps -> trace_block, gap in seconds, the remark
    "whole": ([0, 40], None, 0.04, "milliseconds (all are whole numbers)"),
    "whole, a block": ([0, 1], 16, 0.001, "milliseconds (all are whole numbers)"),
    "whole and close": ([0, 1], None, 1, "seconds (a mean gap under 1 ms otherwise)"),
    "fractions": ([0, 40.5], 16, 40.5, "seconds (some have fractions)"),
    "far apart": ([0, 500.5], None, 0.5005, "milliseconds (a mean gap over 60 s otherwise)"),
}


@pytest.mark.parametrize(("stamps", "block", "gap", "said"), UNITS.values(), ids=UNITS)
def test_the_unit_beside_short_blocks_is_said_with_its_reason(stamps, block, gap, said, tmp_path):
    rows = [request(stamp, 40, ids=[1, 2, 3]) for stamp in stamps]
    trace = read_trace(saved(tmp_path, "v.jsonl", jsonl(*rows)), trace_block=block)
    assert trace.items[1].arrived_at == gap
    assert trace.remarks == [f"time stamps taken as {said}"]


# --- packed, and standard input -------------------------------------------------------------------


def zstandard(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKED = {"plain": bytes, "gz": gzip.compress, "zst": zstandard}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("content", [AZURE_2024, jsonl(request(7, 40), request(9, 50))])
def test_a_packed_file_and_standard_input_are_read(packed, content, tmp_path, monkeypatch):
    data = PACKED[packed](content.encode())
    whole = load_trace(saved(tmp_path, "t.csv", content))
    assert load_trace(saved(tmp_path, f"t.csv.{packed}", data)) == whole
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert load_trace("-") == whole


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_a_packed_file_that_is_cut_off_is_refused_by_name(packed, tmp_path):
    data = PACKED[packed]((AZURE + AZURE_ROW * 50_000).encode())
    refused(saved(tmp_path, f"t.csv.{packed}", data[: len(data) // 2]), None, "cannot read")


def test_a_sweep_reads_its_trace_again_so_it_cannot_be_standard_input():
    with pytest.raises(CortexLabError, match="read only once"):
        find_trace("-")


# --- the first rows -------------------------------------------------------------------------------


def test_only_the_first_requests_are_read_and_sorted_among_themselves(tmp_path):
    text = VIDUR + "9,1,1\n7,2,2\n0,0,2\n8,3,3\n1,4,4\nand so on\n"
    path = saved(tmp_path, "v.csv", text)
    trace = read_trace(path, num_requests=3)
    assert (seen(trace), trace.left_out) == ([(0, 2, 2), (1, 3, 3), (2, 1, 1)], 1)
    refused(path, 7, "1 fields")
    with pytest.raises(CortexLabError, match=r"num_requests.*0"):
        read_trace(path, num_requests=0)


def test_lines_behind_the_first_requests_are_not_asked_for(tmp_path, monkeypatch):
    """Standard input that never ends."""

    class Endless(io.RawIOBase):
        rows = itertools.chain([VIDUR.encode()], (b"%d,7,5\n" % at for at in itertools.count()))

        def readable(self):
            return True

        def readinto(self, buffer):
            row = next(self.rows)
            buffer[: len(row)] = row
            return len(row)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    assert len(load_trace("-", num_requests=300)) == 300


# --- times ----------------------------------------------------------------------------------------


def test_exact_times_stay_exact_for_every_seed(tmp_path):
    stamps = [0, 10000, 10040, 10080, 20000]
    path = saved(tmp_path, "m.jsonl", "".join(mooncake(timestamp=stamp) for stamp in stamps))
    for seed in range(3):
        trace = read_trace(path, seed)
        assert [item.arrived_at for item in trace.items] == [0, 10, 10.04, 10.08, 20]
        assert trace.spread_s is None and trace.remarks == []


@pytest.mark.parametrize(
    "stamps",
    [[0, 0, 0], [0, 60000, 120000], [0, 0, 60000], [0, 3000, 6000]],
    ids=["all equal", "every minute", "two at once", "every bucket once"],
)
def test_exact_times_that_are_multiples_of_a_bucket_stay_exact(stamps, tmp_path):
    path = saved(tmp_path, "m.jsonl", "".join(mooncake(timestamp=stamp) for stamp in stamps))
    trace = read_trace(path)
    assert [item.arrived_at for item in trace.items] == [stamp / 1000 for stamp in stamps]
    assert trace.spread_s is None and trace.remarks == []


@pytest.mark.parametrize(("num_exact", "spread"), [(1, True), (2, False)])
def test_times_are_spread_where_99_percent_lie_in_buckets(num_exact, spread, tmp_path):
    stamps = [3000 * (n // 10) for n in range(100 - num_exact)] + [31_500] * num_exact
    path = saved(tmp_path, "m.jsonl", "".join(mooncake(timestamp=stamp) for stamp in stamps))
    trace = read_trace(path)
    assert trace.spread_s == (3 if spread else None)
    assert any("spread" in remark for remark in trace.remarks) == spread


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_rows_of_the_real_mooncake_trace_are_spread_as_in_the_whole_one(seed):
    real_trace("mooncake_conversation")
    all_ = load_trace("mooncake_conversation", seed)
    for few in (300, 500, 2000):
        assert load_trace("mooncake_conversation", seed, few)[: few - 20] == all_[: few - 20]
    assert repeated_prefix_share(all_) == pytest.approx(0.3664, abs=5e-5)


# --- rows left out --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        BURST_GPT + "0,GPT-4,9,0,9,API log\n5,GPT-4,9,8,17,API log\n6,GPT-4,0,8,8,API log\n",
        jsonl(request(0, output=0), request(5), request(9, 0, ids=[])),
    ],
)
def test_rows_without_tokens_are_left_out_and_counted(content, tmp_path):
    trace = read_trace(saved(tmp_path, "t.txt", content))
    assert (len(trace.items), trace.left_out, trace.items[0].arrived_at) == (1, 2, 0)
    assert "2 of 3 rows left out" in trace.remarks[0]


def test_a_file_of_nothing_but_failures_is_refused(tmp_path):
    refused(saved(tmp_path, "b.csv", BURST_GPT + "0,GPT-4,9,0,9,API log\n"), None, "no requests.*1")


# --- refusals -------------------------------------------------------------------------------------

BAD = {  # fault -> (content, line, pattern of the message)
    "columns of no format": ("when,in,out\n1,2,3\n", 1, "when, in, out.*arrived_at"),
    "a table without a header": ("0,0.5,1.2,Gamma,1,2\n", 1, "arrived_at"),
    "one column short": (VIDUR.replace(",num_decode_tokens", "") + "1,2\n", 1, "num_decode_tokens"),
    "a JSON list": ('[{"timestamp": 1}]\n', 1, "one a line"),
    "messages": ('{"timestamp": 1, "messages": []}\n', 1, "input_length is missing.*arrived_at"),
    "no fraction": (AZURE + "2023-11-16 18:15:04.-5,7,5\n", 2, r"TIMESTAMP.*04\.-5"),
    "a stamp that is no number": (VIDUR + "soon,7,5\n", 2, "arrived_at.*'soon'"),
    "a stamp that is infinite": (VIDUR + "inf,7,5\n", 2, "arrived_at.*inf"),
    "a delay before a stamp": (jsonl(request(None, delay=5, session_id="a")), 1, "timestamp"),
    "a negative delay": (
        jsonl(request(0, session_id="a"), request(None, delay=-5, session_id="a")),
        2,
        "delay.*-5",
    ),
    "a session that is a list": (
        jsonl(request(0, session_id=[1])),
        1,
        r"session_id must be a text or a whole number, not \[1\]",
    ),
}


@pytest.mark.parametrize(("content", "line", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_refused_with_its_line_and_a_way_out(content, line, said, tmp_path):
    refused(saved(tmp_path, "t.txt", content), line, said)


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line in this process: ``(exit code, stdout, stderr)``, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        capsys.readouterr()
        return cli.main([*map(str, words)]), *capsys.readouterr()

    return run


def test_traces_prints_what_was_understood(run, tmp_path):
    prompts = {600: 0, 1200: 0, 1800: 3000}
    rows = [request(at, prompt, ids=[*range(-(-prompt // 512))]) for prompt, at in prompts.items()]
    path = saved(tmp_path, "m.jsonl", jsonl(*rows, request(6000, output=0)))
    code, stdout, stderr = run("traces", path, "--json")
    found = strict(stdout)
    assert (code, stderr, found) == (0, "", summary(read_trace(path)))
    assert (found["format"], found["requests"], found["left_out"]) == ("Mooncake", 3, 1)
    assert (found["spread_s"], found["prefix_block"]) == (3, 512)
    assert found["repeated_prefix_share"] == 5 / 9
    assert found["prompt_tokens"] == {"p50": 1200, "p90": 1680, "p99": 1788, "max": 1800}
    code, stdout, _ = run("traces", path)
    assert code == 0 and max(map(len, stdout.splitlines())) <= 80
    for part in ("Mooncake", "55.6%", "1,800", "spread", "1 of 4 rows left out"):
        assert part in stdout
    assert strict(run("traces", path, "--json", "--requests", "1")[1])["request_rate"] is None


def test_traces_without_a_file_lists_names_and_formats(run):
    code, stdout, _ = run("traces")
    assert code == 0 and max(map(len, stdout.splitlines())) <= 80
    for part in ("azure_2023_conv", "mooncake_conversation", "BurstGPT", "Bailian", "Vidur"):
        assert part in stdout
    assert len(strict(run("traces", "--json")[1])["known"]) == 2


def test_a_replay_says_what_it_did_not_take_as_it_stands(run, tmp_path):
    path = saved(tmp_path, "b.csv", BURST_GPT + "0,GPT-4,9,0,9,API log\n5,GPT-4,9,8,17,API log\n")
    words = ("--out", tmp_path / "out", "--name", "r")
    code, _, stderr = run("replay", "--trace", path, *words)
    assert (code, stderr) == (
        0,
        f"trace {path}: 1 of 2 rows left out (0 prompt or output tokens)\n",
    )
    said = json.loads((tmp_path / "out" / "r" / "run.json").read_text())["trace"]
    assert (said["format"], said["requests"], said["left_out"]) == ("BurstGPT", 1, 1)


def test_trace_block_is_for_traces(run, tmp_path):
    code, _, stderr = run("replay", "--trace-block", "16", "--out", tmp_path)
    assert code == 2 and "--trace-block needs --trace" in stderr
