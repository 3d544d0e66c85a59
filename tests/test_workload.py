"""Workloads are seeded and bounded; a broken trace is refused with its file and line."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import real_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlab import CortexLabError
from cortexlab.workloads.synthetic import (
    LENGTHS,
    SHARED_PREFIX_TOKENS,
    WorkItem,
    conversations,
    make_workload,
    prompt_tokens,
    scale,
    with_arrivals,
)
from cortexlab.workloads.trace_jsonl import MOONCAKE_BUCKET_S
from cortexlab.workloads.traces import load_trace

BOUNDS = {  # shortest and longest prompt, shortest and longest output
    "lognormal": (8, 600, 4, 200),
    "heavy-tail": (8, 2000, 16, 200),
    "shared-prefix": (SHARED_PREFIX_TOKENS + 8, SHARED_PREFIX_TOKENS + 600, 4, 200),
}
every_workload = pytest.mark.parametrize("name", sorted(LENGTHS))


# --- made workloads -------------------------------------------------------------------------------


@every_workload
def test_equal_seeds_give_equal_workloads(name):
    assert make_workload(name, 20, seed=3, request_rate=2.0) == make_workload(
        name, 20, seed=3, request_rate=2.0
    )
    assert make_workload(name, 20, seed=3) != make_workload(name, 20, seed=4)


@pytest.mark.parametrize("name", BOUNDS)
def test_lengths_stay_inside_their_bounds(name):
    low, high, out_low, out_high = BOUNDS[name]
    items = make_workload(name, 5000, seed=1)
    assert all(
        low <= item.prompt_tokens <= high and out_low <= item.output_tokens <= out_high
        for item in items
    )
    assert max(item.prompt_tokens for item in items) > high / 2, "the tail is missing"


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [("lognormal", 100, 40), ("heavy-tail", 120, 60), ("chat", 1020, 129)],
)
def test_lengths_have_the_published_medians(name, prompt, output):
    items = make_workload(name, 5000, seed=1)
    assert np.median([item.prompt_tokens for item in items]) == pytest.approx(prompt, rel=0.1)
    assert np.median([item.output_tokens for item in items]) == pytest.approx(output, rel=0.1)


@pytest.mark.parametrize(("name", "sigma"), [("lognormal", 0.8), ("heavy-tail", 1.1)])
def test_prompt_lengths_have_the_published_sigma(name, sigma):
    logs = np.log([item.prompt_tokens for item in make_workload(name, 5000, seed=1)])
    quartiles = np.quantile(logs, [0.25, 0.75])
    assert quartiles[1] - quartiles[0] == pytest.approx(2 * 0.6745 * sigma, rel=0.1)


def test_a_turns_prompt_begins_with_the_conversation_so_far():
    items = conversations(6, 3, 48, request_rate=1.0, unit=16, seed=2)
    assert items == conversations(6, 3, 48, request_rate=1.0, unit=16, seed=2) and len(items) == 18
    assert [item.arrived_at for item in items] == sorted(item.arrived_at for item in items)
    by_conversation = {}
    for item in items:
        assert item.prefix_ids[:3] == (0, 1, 2), "a prompt begins with the system prompt"
        assert len(item.prefix_ids) == math.ceil(item.prompt_tokens / 16)
        by_conversation.setdefault(item.prefix_ids[3], []).append(item)
    assert len(by_conversation) == 6
    for turns in by_conversation.values():
        for before, turn in itertools.pairwise(turns):
            said = before.prompt_tokens + before.output_tokens
            assert turn.prompt_tokens > said
            assert (
                turn.prefix_ids[: before.prompt_tokens // 16]
                == before.prefix_ids[: before.prompt_tokens // 16]
            )
    with pytest.raises(CortexLabError, match="num_turns"):
        conversations(6, 0, 48, request_rate=1.0)


@every_workload
def test_the_longest_possible_request_fits_every_context(name, monkeypatch):
    longest = [draw.longest for draw in LENGTHS[name]]
    monkeypatch.setitem(LENGTHS, name, tuple(always(length) for length in longest))
    too_long = [
        context
        for context in range(600, 5000, 7)
        if make_workload(name, 1, context=context)[0].total_tokens > context
    ]
    assert too_long == []


def always(length: int):
    """A distribution with one length."""

    def draw(rng, n):
        return np.full(n, length)

    draw.longest = length
    return draw


def test_a_context_longer_than_every_request_changes_nothing():
    assert make_workload("lognormal", 20, context=800) == make_workload("lognormal", 20)


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.01, 10))
@settings(deadline=None)
def test_scaling_multiplies_both_lengths_and_rounds_up(prompt, output, factor):
    (item,) = scale([WorkItem(1.5, prompt, output)], factor)
    assert (item.arrived_at, item.prompt_tokens, item.output_tokens) == (
        1.5,
        math.ceil(prompt * factor),
        math.ceil(output * factor),
    )


def test_scaling_shrinks_the_shared_prefix_too():
    (item,) = scale([WorkItem(0.0, 600, 10, (7,), 512)], 0.25)
    assert (item.prompt_tokens, item.output_tokens, item.prefix_ids, item.prefix_block) == (
        150,
        3,
        (7,),
        128,
    )


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf, "2", None, True])
def test_a_scale_that_is_no_positive_number_is_refused_by_name_and_value(factor):
    with pytest.raises(ValueError, match=f"scale_lengths.*{factor}"):
        scale([WorkItem(0.0, 1, 1)], factor)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "holiday"}, r"'holiday'.*chat.*heavy-tail.*lognormal.*shared-prefix"),
        ({"num_requests": 0}, "num_requests.*0"),
        ({"num_requests": -4}, "num_requests.*-4"),
        ({"request_rate": 0}, "request_rate.*0"),
        ({"request_rate": -2.0}, "request_rate.*-2"),
        ({"request_rate": math.nan}, "request_rate.*nan"),
        ({"request_rate": 1.0, "burstiness": 0}, "burstiness.*0"),
        ({"request_rate": 1.0, "burstiness": math.inf}, "burstiness.*inf"),
        ({"burstiness": math.nan}, "burstiness.*nan"),
        ({"seed": -1}, "seed.*-1"),
    ],
)
def test_wrong_arguments_of_a_workload_are_refused_by_name_and_value(options, named):
    with pytest.raises(ValueError, match=named) as caught:
        make_workload(**{"name": "lognormal", "num_requests": 3} | options)
    assert isinstance(caught.value, CortexLabError)


# --- arrivals -------------------------------------------------------------------------------------


def test_by_default_all_requests_arrive_at_time_zero():
    assert {item.arrived_at for item in make_workload("chat", 10)} == {0.0}


def test_the_first_request_arrives_at_zero_and_the_others_in_order():
    times = [item.arrived_at for item in make_workload("chat", 50, request_rate=4.0)]
    assert times[0] == 0 and times == sorted(times) and len(set(times)) == 50


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrival_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness):
    items = with_arrivals(
        [WorkItem(0.0, 1, 1)] * 20_000, request_rate=5.0, burstiness=burstiness, seed=0
    )
    gaps = np.diff([item.arrived_at for item in items])
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_new_arrivals_keep_the_lengths():
    items = make_workload("lognormal", 10, seed=1)
    later = with_arrivals(items, 3.0, 1.0, seed=9)
    assert [(i.prompt_tokens, i.output_tokens) for i in later] == [
        (i.prompt_tokens, i.output_tokens) for i in items
    ]


# --- tokens ---------------------------------------------------------------------------------------


@every_workload
def test_a_prompt_has_its_length_and_tokens_of_the_vocabulary(name):
    items = make_workload(name, 8, seed=1)
    prompts = prompt_tokens(items, vocabulary=50, seed=1)
    assert [len(prompt) for prompt in prompts] == [item.prompt_tokens for item in items]
    assert all(isinstance(token, int) and 0 <= token < 50 for prompt in prompts for token in prompt)
    assert (
        prompts
        == prompt_tokens(items, vocabulary=50, seed=1)
        != prompt_tokens(items, vocabulary=50, seed=2)
    )


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_prompts_of_shared_prefix_differ_only_behind_the_prefix(factor):
    items = make_workload("shared-prefix", 6, scale_lengths=factor)
    prompts, shared = (
        prompt_tokens(items, vocabulary=1000),
        math.ceil(SHARED_PREFIX_TOKENS * factor),
    )
    assert len({tuple(prompt[:shared]) for prompt in prompts}) == 1
    assert len({tuple(prompt[shared : shared + 2]) for prompt in prompts}) == 6


def test_equal_prefix_ids_give_equal_tokens_block_by_block():
    items = [
        WorkItem(0, 10, 1, (1, 2, 3), 4),
        WorkItem(0, 12, 1, (1, 2, 4), 4),
        WorkItem(0, 9, 1, (5, 2, 3), 4),
    ]
    a, b, c = prompt_tokens(items, vocabulary=1000)
    assert a[:8] == b[:8] and a[8:] != b[8:10]
    assert c[:4] != a[:4] and c[4:8] == a[4:8]
    assert a[8:9] == c[8:9], "a partial last block has the first tokens of the whole one"


# --- traces: good files ---------------------------------------------------------------------------

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE_ROW = "2023-11-16 18:15:46.6805900,374,44\n"


def mooncake(**changes) -> str:
    """A line of a Mooncake trace; a column changed to None is left out."""
    row = {
        "timestamp": 27_000,
        "input_length": 600,
        "output_length": 20,
        "hash_ids": [0, 1],
    } | changes
    return json.dumps({name: value for name, value in row.items() if value is not None}) + "\n"


def saved(folder: Path, name: str, content: str | bytes) -> str:
    """Path of a new file with ``content``."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_azure_times_count_from_the_first_row_in_steps_of_100_ns(tmp_path):
    items = load_trace(
        saved(tmp_path, "a.csv", AZURE + AZURE_ROW + "2023-11-16 18:16:50.9951690,396,109\n")
    )
    assert [(item.prompt_tokens, item.output_tokens) for item in items] == [(374, 44), (396, 109)]
    assert items[0].arrived_at == 0
    assert items[1].arrived_at == pytest.approx(64.3145790, abs=1e-6)


def test_azure_columns_may_stand_in_any_order_among_others(tmp_path):
    text = (
        "GeneratedTokens,Region,TIMESTAMP,ContextTokens\n44,west,2023-11-16 18:15:46.6805900,374\n"
    )
    (item,) = load_trace(saved(tmp_path, "a.csv", text))
    assert (item.prompt_tokens, item.output_tokens) == (374, 44)


def test_windows_line_ends_a_byte_order_mark_and_blank_lines_are_accepted(tmp_path):
    text = "\ufeff" + (AZURE + AZURE_ROW + "\n" + AZURE_ROW + "\n").replace("\n", "\r\n")
    assert len(load_trace(saved(tmp_path, "a.csv", text))) == 2


def test_mooncake_times_are_spread_inside_their_bucket_by_the_seed(tmp_path):
    path = saved(
        tmp_path, "m.jsonl", "".join(mooncake(timestamp=3000 * (i // 10)) for i in range(40))
    )
    times = [item.arrived_at for item in load_trace(path, seed=1)]
    assert times == sorted(times) and times[0] == 0 and len(set(times)) == 40
    assert times[-1] < 4 * MOONCAKE_BUCKET_S
    assert times == [item.arrived_at for item in load_trace(path, seed=1)]
    assert times != [item.arrived_at for item in load_trace(path, seed=2)]


def test_mooncake_hashes_become_prefix_ids_of_512_tokens(tmp_path):
    (item,) = load_trace(saved(tmp_path, "m.jsonl", mooncake(hash_ids=[46, 47])))
    assert (item.prompt_tokens, item.output_tokens, item.prefix_ids, item.prefix_block) == (
        600,
        20,
        (46, 47),
        512,
    )


# --- traces: bad files ----------------------------------------------------------------------------


def with_second(row: str) -> str:
    """An Azure trace of a good row and ``row``."""
    return AZURE + AZURE_ROW + row


def at(count: str) -> str:
    """An Azure trace whose second row has ``count`` prompt tokens."""
    return with_second(f"2023-11-16 18:15:47.0,{count},44\n")


BAD_AZURE = {  # fault -> (content, line of the fault, pattern of the message)
    "missing column": (
        "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.0,374\n",
        1,
        "GeneratedTokens",
    ),
    "negative": (at("-3"), 3, "ContextTokens.*-3"),
    "fractional": (at("3.5"), 3, r"ContextTokens.*3\.5"),
    "enormous": (at("1" + 30 * "0"), 3, "ContextTokens"),
    "more digits than int() takes": (at("9" * 5000), 3, "ContextTokens"),
    "NaN": (at("NaN"), 3, "ContextTokens.*NaN"),
    "not a number": (at("many"), 3, "ContextTokens.*many"),
    "empty field": (at(""), 3, "ContextTokens"),
    "a field too few": (with_second("2023-11-16 18:15:47.0,44\n"), 3, "2 fields"),
    "a field too many": (with_second("2023-11-16 18:15:47.0,1,2,3\n"), 3, "4 fields"),
    "no time": (with_second("yesterday,374,44\n"), 3, "TIMESTAMP.*yesterday"),
    "back in time": (with_second("2023-11-16 18:15:45.0,374,44\n"), 3, "TIMESTAMP"),
    "not UTF-8": (
        (AZURE + AZURE_ROW).encode() + b"2023-11-16 18:15:47.0,\xff\xfe,44\n",
        3,
        "UTF-8",
    ),
    "negative behind a blank line": (with_second("\n2023-11-16 18:15:47.0,-3,44\n"), 4, "-3"),
    "back in time behind a blank line": (
        with_second("\n2023-11-16 18:15:45.0,3,44\n"),
        4,
        "TIMESTAMP",
    ),
    "an endless field": (at("x" * 200_000), 3, ""),
}
BAD_MOONCAKE = {  # fault -> (content, line of the fault, pattern of the message)
    "bad JSON": (mooncake() + '{"timestamp": 3, "inp\n', 2, "JSON"),
    "not an object": (mooncake() + "[1, 2]\n", 2, "timestamp"),
    "a bare number": ("17\n", 1, "timestamp"),
    "missing column": (mooncake() + mooncake(output_length=None), 2, "output_length"),
    "negative": (mooncake() + mooncake(output_length=-1), 2, "output_length.*-1"),
    "fractional": (mooncake(input_length=600.5), 1, r"input_length.*600\.5"),
    "enormous": (mooncake(input_length=10**30), 1, "input_length"),
    "more digits than int() takes": (mooncake().replace("600", "9" * 5000), 1, ""),
    "NaN": (mooncake(output_length=math.nan), 1, "output_length.*nan"),
    "infinite time": (mooncake(timestamp=math.inf), 1, "timestamp.*inf"),
    "text": (mooncake(output_length="20"), 1, "output_length.*'20'"),
    "true": (mooncake(output_length=True), 1, "output_length.*True"),
    "too few hashes": (mooncake(hash_ids=[1]), 1, "hash_ids"),
    "no list of hashes": (mooncake(hash_ids="01"), 1, "hash_ids"),
    "a fractional hash": (mooncake(hash_ids=[1, 2.5]), 1, r"hash_ids.*2\.5"),
    "not UTF-8": (mooncake().encode() + b"\xff\xfe\n", 2, "UTF-8"),
    "nested without end": ("[" * 200_000 + "\n", 1, "JSON"),
    "negative behind a blank line": (mooncake() + "\n" + mooncake(output_length=-1), 3, "-1"),
}


def refused(path: str, line: int | None, said: str) -> str:
    """Assert that a trace is refused in one line with its path; returns the message."""
    with pytest.raises(CortexLabError, match=said or None) as caught:
        load_trace(path)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert path in message and "\n" not in message
    assert len(message) < 1000 + len(path), "the message is too long to read"
    if line is not None:
        assert f"line {line}:" in message
    return message


@pytest.mark.parametrize(("content", "line", "said"), BAD_AZURE.values(), ids=BAD_AZURE)
def test_a_bad_azure_file_is_refused_with_its_line(content, line, said, tmp_path):
    refused(saved(tmp_path, "bad.csv", content), line, said)


@pytest.mark.parametrize(("content", "line", "said"), BAD_MOONCAKE.values(), ids=BAD_MOONCAKE)
def test_a_bad_mooncake_file_is_refused_with_its_line(content, line, said, tmp_path):
    refused(saved(tmp_path, "bad.jsonl", content), line, said)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", ""),
        ("empty.jsonl", ""),
        ("blank.jsonl", " \n\n"),
        ("header.csv", AZURE),
        ("blank.csv", "\n\n\n"),
    ],
)
def test_a_file_without_requests_is_refused(name, content, tmp_path):
    refused(saved(tmp_path, name, content), None, "no requests")


@pytest.mark.parametrize("name", ["nowhere.csv", "nowhere.jsonl"])
def test_a_missing_file_is_refused_by_name(name, tmp_path):
    refused(str(tmp_path / name), None, "does not exist")


def test_an_unknown_trace_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"'azure_2030'.*azure_2023_conv.*mooncake_conversation"):
        load_trace("azure_2030")


@pytest.mark.parametrize(
    ("name", "repository", "file"),
    [
        ("azure_2023_conv", "Azure/AzurePublicDataset", "AzureLLMInferenceTrace_conv.csv"),
        ("mooncake_conversation", "kvcache-ai/Mooncake", "conversation_trace.jsonl"),
    ],
)
def test_a_known_trace_that_is_missing_is_refused_with_its_public_source(
    name, repository, file, tmp_path, monkeypatch
):
    for variable in ("CORTEXLAB_TRACES", "CORTEXLAB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(ValueError) as caught:
        load_trace(name)
    assert all(part in str(caught.value) for part in (name, repository, file, str(tmp_path)))


@pytest.mark.parametrize("variable", ["CORTEXLAB_TRACES", "CORTEXLAB_CACHE"])
def test_a_known_trace_is_found_in_the_traces_folder_and_in_the_cache(
    variable, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    for name in ("CORTEXLAB_TRACES", "CORTEXLAB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))
    monkeypatch.setenv(variable, str(tmp_path))
    saved(tmp_path, "azure_2023_conv.csv", AZURE + AZURE_ROW)
    assert len(load_trace("azure_2023_conv")) == 1


# --- real traces ----------------------------------------------------------------------------------

QUANTILES = [0.5, 0.9, 0.99]


def lengths_of(items, column: str) -> list[int]:
    """`QUANTILES` and mean of a length, rounded."""
    values = [getattr(item, column) for item in items]
    return [round(v) for v in (*np.quantile(values, QUANTILES), np.mean(values))]


def test_the_real_azure_trace_has_the_published_statistics():
    items = real_trace("azure_2023_conv")
    assert len(items) == 19_366
    assert lengths_of(items, "prompt_tokens") == [1020, 2734, 4142, 1155]
    assert lengths_of(items, "output_tokens") == [129, 424, 601, 211]
    gaps = np.diff([item.arrived_at for item in items])
    assert 1 / gaps.mean() == pytest.approx(5.53, abs=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, abs=0.01)


def test_the_real_mooncake_trace_has_the_published_statistics():
    items = real_trace("mooncake_conversation")
    assert len(items) == 12_031
    assert lengths_of(items, "prompt_tokens") == [6909, 27_367, 85_400, 12_035]
    assert lengths_of(items, "output_tokens") == [350, 597, pytest.approx(1118, abs=1), 343]
    assert len(items) / items[-1].arrived_at == pytest.approx(3.40, abs=0.02)
    assert all(len(item.prefix_ids) == math.ceil(item.prompt_tokens / 512) for item in items)
    gaps = np.diff([item.arrived_at for item in items])
    assert np.mean(gaps == 0) < 0.01, "requests of one bucket arrive in a burst"
