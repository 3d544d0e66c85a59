"""The measurement itself: shares, sums, baselines, and the sentence at the end."""

import math

import pytest
from mlx_lm.generate import BatchGenerator

from cortexlab import metrics
from cortexlab.bench import serve as bench
from cortexlab.bench.serve import MLX_LM, Run, Setting, run_bench
from cortexlab.scheduler.request import Request, RequestState
from cortexlab.workloads.synthetic import WorkItem, make_workload


@pytest.fixture(scope="module")
def tiny_bench(tiny):
    items = make_workload("lognormal", 12, seed=1, context=4096, scale_lengths=0.5)
    return run_bench(
        tiny, items, setting=Setting(batch_size=4, num_blocks="60%", seed=1), repeats=2
    )


def test_all_strategies_complete_all_requests_with_the_same_tokens(tiny_bench):
    assert tiny_bench.held
    assert {row["tokens_sha256"] for row in tiny_bench.rows} == {
        tiny_bench.rows[0]["tokens_sha256"]
    }
    assert all(
        (row["completed"], row["requests_identical"], row["max_gap"]) == (12, 12, 0)
        for row in tiny_bench.rows
    )


def test_shares_sum_to_one_in_every_row_and_step(tiny_bench):
    for row in tiny_bench.rows:
        assert sum(row[f"{name}_share"] for name in metrics.SHARES) == pytest.approx(1)
    slots = tiny_bench.steps()[[f"{name}_slots" for name in metrics.SHARES]]
    assert (slots >= 0).all().all()


def test_peak_memory_is_bounded_by_the_pool_and_mlx_lm_has_no_pool(tiny_bench):
    for row in tiny_bench.rows:
        if row["strategy"] == MLX_LM:
            assert (
                row["arena_bytes"]
                is row["num_blocks"]
                is row["copied_bytes"]
                is row["num_holes"]
                is None
            )
            assert row["reserved_share"] == row["external_share"] == 0
        else:
            assert 0 < row["peak_kv_bytes"] <= row["arena_bytes"]
            assert row["copied_bytes"] == 0


def test_every_token_has_a_time_and_sums_agree(tiny_bench):
    table = tiny_bench.requests()
    for row in tiny_bench.rows:
        part = table[(table["strategy"] == row["strategy"]) & (table["repeat"] == 0)]
        assert part["output_tokens"].sum() == row["total_output_tokens"]
        assert all(
            len(gaps) == tokens - 1
            for gaps, tokens in zip(part["itl_ms"], part["output_tokens"], strict=True)
        )
        assert (part["ttft_ms"] <= part["e2el_ms"]).all()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_mlx_lm_never_decodes_more_than_the_batch_limit(tiny, batch_size, monkeypatch):
    """Its constructor raises the limit to `prefill_batch_size`: the baseline must not let it."""
    sizes = []
    real = BatchGenerator.next

    def spied(generator):
        result = real(generator)
        sizes.append(len(result[1]))
        return result

    monkeypatch.setattr(BatchGenerator, "next", spied)
    items = make_workload(
        "lognormal", 20, seed=batch_size, scale_lengths=0.3
    )  # mixed lengths: equal ones never overshoot
    result = run_bench(tiny, items, [MLX_LM], Setting(batch_size=batch_size))
    assert result.held and max(sizes) == batch_size


def test_at_batch_one_the_faster_of_mlx_lms_two_ways_counts(tiny, monkeypatch):
    items = [WorkItem(0.0, 10, 8)] * 4
    slow = {"batch": 0.0, "single": 0.0}
    for name, key in (("run_batch_generator", "batch"), ("run_one_by_one", "single")):
        real = getattr(bench, name)

        def delayed(*args, real=real, key=key, **kwargs):
            import time

            for request in real(*args, **kwargs):
                time.sleep(slow[key])
                yield request

        monkeypatch.setattr(bench, name, delayed)
    for loser in slow:
        slow.update(batch=0.0, single=0.0)
        slow[loser] = 0.2
        row = run_bench(tiny, items, [MLX_LM], Setting(batch_size=1)).rows[0]
        assert row["duration"] < 0.8 and row["completed"] == 4


def test_requests_arrive_when_they_arrive(tiny):
    items = [WorkItem(0.0, 5, 2), WorkItem(0.4, 5, 2)]
    for strategy in ("paged", MLX_LM):
        run = run_bench(tiny, items, [strategy], Setting(batch_size=2)).runs[0]
        assert (
            run.duration > 0.4 and run.requests[1].first_token_at - run.requests[1].arrived_at < 0.3
        )


def test_latency_formulas():
    request = Request(
        "r",
        (1, 2),
        3,
        arrived_at=10.0,
        state=RequestState.FINISHED,
        output_tokens=[1, 2, 3],
        token_times=[11.0, 11.5, 12.5],
    )
    found = metrics.latencies(request)
    assert (found["ttft"], found["tpot"], found["e2el"], found["itl"]) == (
        1.0,
        0.75,
        2.5,
        [0.5, 1.0],
    )
    single = Request("s", (1,), 1, arrived_at=0.0, output_tokens=[1], token_times=[2.0])
    assert metrics.latencies(single)["tpot"] is None
    assert metrics.latency_summary([single])["mean_tpot_ms"] is None
    assert metrics.latency_summary([request, single])["median_ttft_ms"] == 1500


def test_shares_by_hand():
    """16 slots held with 10 tokens, 12 at the end; 8 slots unusable: 10, 2, 4 and 8 of 24."""
    slots = metrics.step_shares([(16, 10, 12)], unusable_slots=8)
    assert slots == {"token": 10, "reserved": 2, "internal": 4, "external": 8}
    shares = metrics.shares([(1.0, slots), (5.0, dict.fromkeys(metrics.SHARES, 0))])
    assert shares["external_share"] == pytest.approx(8 / 24) and sum(
        shares.values()
    ) == pytest.approx(1)


def test_hash_of_known_tokens():
    import hashlib

    assert metrics.tokens_sha256([[1, 2], [3]]) == hashlib.sha256(b"[[1,2],[3]]").hexdigest()


def _fake(**seconds) -> bench.Bench:
    """A bench whose strategies took these seconds, repeat by repeat, for 100 tokens."""
    made = bench.Bench(Setting())
    for name, times in seconds.items():
        for time in times:
            made.runs.append(
                Run(name, [Request("r", (1,), 100, output_tokens=[0] * 100)], 0, 0.0, time, [])
            )
        speed = 100 / sorted(times)[len(times) // 2]
        made.rows.append(
            {
                "strategy": name,
                "output_throughput": speed,
                "token_share": 0.5 + len(name) / 100,
                "peak_kv_bytes": 1,
            }
        )
    return made


def test_the_recommendation_tells_a_lead_from_noise():
    assert (
        "Use paged" in (text := bench.recommendation(_fake(paged=[1, 1, 1], static=[2, 2, 2])))
        and "+100%" in text
    )
    noisy = bench.recommendation(_fake(paged=[1, 2, 1], cortexstream=[2, 1, 1.5]))
    assert (
        "Use cortexstream" in noisy
        and "no difference in speed beyond noise" in noisy
        and "memory decides" in noisy
    )
    single = bench.recommendation(_fake(paged=[1], static=[2]))
    assert (
        "Fastest in this one run: paged" in single
        and "One run cannot tell speed from noise" in single
    )


def test_an_interval_needs_two_values():
    assert metrics.median_interval([1.0]) is None
    low, high = metrics.median_interval([1.0, 2.0, 3.0])
    assert 1.0 <= low <= 2.0 <= high <= 3.0


def test_percentages_of_the_pool():
    items = [WorkItem(0.0, 30, 3), WorkItem(0.0, 60, 5), WorkItem(0.0, 10, 1)]
    assert bench.full_pool(items, block_size=16, batch_size=2) == 2 + 4
    assert bench.bench_pool(Setting(num_blocks="50%", batch_size=2), items, 16) == math.ceil(3)
    for bad in ("x", "x%", "-1%", "nan%", 0, -3):
        with pytest.raises(ValueError, match=r"num-blocks"):
            bench.bench_pool(Setting(num_blocks=bad), items, 16)


def _run(name, outputs, max_tokens, finish="length"):
    requests = [
        Request(
            f"r{i}",
            (1, 2),
            max_tokens,
            output_tokens=tokens,
            state=RequestState.FINISHED,
            finish_reason=finish,
        )
        for i, tokens in enumerate(outputs)
    ]
    return Run(name, requests, 0, 0.0, 1.0, [])


def test_equality_takes_the_worst_repeat_and_counts_no_short_output(tiny):
    tie, wrong = bench.Difference(0, 1e-4, 1e-3), bench.Difference(0, 5.0, 1e-3)
    good, near, bad = [7, 7], [8, 8], [9, 9]
    known = {((1, 2), tuple(good)): None, ((1, 2), tuple(near)): tie, ((1, 2), tuple(bad)): wrong}
    for runs in ([[good, near], [good, bad]], [[good, bad], [good, near]]):
        found = bench._equality([_run("paged", outputs, 2) for outputs in runs], tiny, known)
        assert found == {"requests_identical": 1, "requests_near_tie": 0, "max_gap": 5.0}
    short = bench._equality([_run("paged", [good], 3)], tiny, known)
    assert short["requests_identical"] == 0, "two of three tokens are not the reference's output"


def test_what_one_strategy_cannot_serve_is_left_out_for_all(tiny, capsys):
    items = [WorkItem(0.0, 10, 5), WorkItem(0.0, 60, 5), WorkItem(0.0, 20, 5)]
    result = run_bench(tiny, items, ["paged", MLX_LM], Setting(num_blocks=2, max_seq_len=128))
    assert [(row["completed"], row["refused"]) for row in result.rows] == [(2, 1), (2, 1)]
    assert "paged: refused: request 'r1'" in capsys.readouterr().err


def test_a_strategy_named_twice_is_refused(tiny):
    with pytest.raises(ValueError, match="'paged' is named twice"):
        run_bench(tiny, [WorkItem(0.0, 5, 5)], ["paged", MLX_LM, "paged"])
