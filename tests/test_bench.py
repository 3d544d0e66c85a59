"""`run_bench`: shares, sums, the baseline mlx-lm, and the recommendation."""

import itertools
import math
from collections import defaultdict

import pytest
from mlx_lm.generate import BatchGenerator

from cortexlab import answer, metrics
from cortexlab.bench import serve, summary
from cortexlab.bench.mlx_lm import Difference
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.bench.summary import Run
from cortexlab.options import MLX_LM
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


def test_the_pool_bounds_peak_memory_and_mlx_lm_has_no_pool(tiny_bench):
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
    """`BatchGenerator` raises its limit to `prefill_batch_size` unless the baseline prevents it."""
    sizes = []
    real = BatchGenerator.next

    def spied(generator):
        result = real(generator)
        sizes.append(len(result[1]))
        return result

    monkeypatch.setattr(BatchGenerator, "next", spied)
    # Lengths are mixed, because requests of equal length never exceed the limit.
    items = make_workload("lognormal", 20, seed=batch_size, scale_lengths=0.3)
    result = run_bench(tiny, items, [MLX_LM], Setting(batch_size=batch_size))
    assert result.held and max(sizes) == batch_size


def test_at_batch_one_the_row_is_of_the_faster_of_mlx_lms_two_generators(tiny, monkeypatch):
    items = [WorkItem(0.0, 10, 8)] * 4
    slow = {"batch": 0.0, "single": 0.0}
    for name, key in (("run_batch_generator", "batch"), ("run_one_by_one", "single")):
        real = getattr(serve, name)

        def delayed(*args, real=real, key=key, **kwargs):
            import time

            for request in real(*args, **kwargs):
                time.sleep(slow[key])
                yield request

        monkeypatch.setattr(serve, name, delayed)
    for loser in slow:
        slow.update(batch=0.0, single=0.0)
        slow[loser] = 0.2
        row = run_bench(tiny, items, [MLX_LM], Setting(batch_size=1)).rows[0]
        assert row["duration"] < 0.8 and row["completed"] == 4


def test_a_request_is_submitted_at_its_arrival_time(tiny):
    items = [WorkItem(0.0, 5, 2), WorkItem(0.4, 5, 2)]
    for strategy in ("paged", MLX_LM):
        run = run_bench(tiny, items, [strategy], Setting(batch_size=2)).runs[0]
        assert (
            run.duration > 0.4 and run.requests[1].first_token_at - run.requests[1].arrived_at < 0.3
        )


def test_latencies_follow_their_formulas():
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


def test_shares_equal_a_calculation_by_hand():
    """16 slots hold 10 tokens, 12 at the end, and 8 slots are unusable: 10, 2, 4 and 8 of 24."""
    slots = metrics.step_shares([(16, 10, 12)], unusable_slots=8)
    assert slots == {"token": 10, "reserved": 2, "internal": 4, "external": 8}
    shares = metrics.shares([(1.0, slots), (5.0, dict.fromkeys(metrics.SHARES, 0))])
    assert shares["external_share"] == pytest.approx(8 / 24) and sum(
        shares.values()
    ) == pytest.approx(1)


def test_the_hash_is_of_the_compact_json_text():
    import hashlib

    assert metrics.tokens_sha256([[1, 2], [3]]) == hashlib.sha256(b"[[1,2],[3]]").hexdigest()


def _run_of(name: str, requests: list[Request], seconds: float) -> Run:
    return Run(strategy=name, requests=requests, started_at=0.0, duration=seconds, steps=[])


def test_strategies_take_turns_in_going_first(tiny):
    names, items = ["paged", "runs", MLX_LM], [WorkItem(0.0, 5, 2)]
    order = [run.strategy for run in run_bench(tiny, items, names, repeats=3).runs]
    assert order == [*names, *names[1:], *names[:1], *names[2:], *names[:2]]


def test_a_bench_goes_on_until_it_knows_or_time_is_over(tiny, monkeypatch):
    items = [WorkItem(0.0, 5, 2)]
    speeds = {"paged": itertools.cycle([1.0, 1.01]), "runs": itertools.cycle([2.0, 2.01])}
    monkeypatch.setattr(Run, "throughput", property(lambda run: fixed[id(run)]))
    fixed = defaultdict(lambda: None)
    real = serve._Job.engine

    def timed(job, strategy):
        run = real(job, strategy)
        fixed[id(run)] = next(speeds[strategy])
        return run

    monkeypatch.setattr(serve._Job, "engine", timed)
    bench = run_bench(tiny, items, ["paged", "runs"], repeats="auto")
    assert [look["repeats"] for look in bench.looks] == [3]
    assert bench.comparison.between("runs", "paged").faster
    speeds |= {"runs": itertools.cycle([1.0, 1.3, 0.8])}
    bench = run_bench(tiny, items, ["paged", "runs"], repeats="auto")
    assert [look["repeats"] for look in bench.looks] == list(answer.LOOKS)
    assert sum(look["error"] for look in bench.looks) == pytest.approx(answer.ERROR)
    bench = run_bench(tiny, items, ["paged", "runs"], repeats="auto", seconds=0)
    assert bench.looks == [{"repeats": 1, "error": answer.ERROR}]
    assert "--repeats 5 can, or more --seconds;" in summary.recommendation(bench)


def test_the_recommendation_is_of_the_runs_and_of_the_rows(tiny_bench):
    text = summary.recommendation(tiny_bench)
    assert tiny_bench.comparison.repeats == 2 and tiny_bench.error == answer.ERROR
    names = [*tiny_bench.comparison.pooled, MLX_LM]
    assert sorted(names) == sorted(row["strategy"] for row in tiny_bench.rows)
    assert all(name in text for name in names)


def test_memory_is_judged_by_the_error_of_the_look_that_speed_is(tiny_bench, monkeypatch):
    seen = []
    monkeypatch.setattr(answer, "recommendation", lambda *given, **more: seen.extend(given))
    monkeypatch.setattr(tiny_bench, "error", 0.0075)
    summary.recommendation(tiny_bench)
    assert [each.error for each in seen[1:]] == [0.0075, 0.0075]


def test_an_interval_needs_two_values():
    assert metrics.median_interval([1.0]) is None
    low, high = metrics.median_interval([1.0, 2.0, 3.0])
    assert 1.0 <= low <= 2.0 <= high <= 3.0


def test_a_percentage_is_of_the_blocks_of_the_largest_full_batch():
    items = [WorkItem(0.0, 30, 3), WorkItem(0.0, 60, 5), WorkItem(0.0, 10, 1)]
    assert serve.full_pool(items, block_size=16, batch_size=2) == 2 + 4
    assert serve.bench_pool(Setting(num_blocks="50%", batch_size=2), items, 16) == math.ceil(3)
    for bad in ("x", "x%", "-1%", "nan%", 0, -3):
        with pytest.raises(ValueError, match=r"num_blocks"):
            serve.bench_pool(Setting(num_blocks=bad), items, 16)


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
    return _run_of(name, requests, 1.0)


def test_equality_takes_the_worst_repeat_and_does_not_count_a_short_output(tiny):
    tie, wrong = Difference(1e-4, 1e-3), Difference(5.0, 1e-3)
    good, near, bad = [7, 7], [8, 8], [9, 9]
    known = {((1, 2), tuple(good)): None, ((1, 2), tuple(near)): tie, ((1, 2), tuple(bad)): wrong}
    for runs in ([[good, near], [good, bad]], [[good, bad], [good, near]]):
        found = summary.equality([_run("paged", outputs, 2) for outputs in runs], tiny, known)
        assert found == {"requests_identical": 1, "requests_near_tie": 0, "max_gap": 5.0}
    short = summary.equality([_run("paged", [good], 3)], tiny, known)
    assert short["requests_identical"] == 0, "an output cut short is not identical"


def test_a_request_that_one_strategy_cannot_serve_is_left_out_for_all(tiny, capsys):
    items = [WorkItem(0.0, 10, 5), WorkItem(0.0, 60, 5), WorkItem(0.0, 20, 5)]
    result = run_bench(tiny, items, ["paged", MLX_LM], Setting(num_blocks=2, max_seq_len=128))
    assert [(row["completed"], row["refused"]) for row in result.rows] == [(2, 1), (2, 1)]
    assert "paged: refused: request 'r1'" in capsys.readouterr().err


def test_a_strategy_named_twice_is_refused(tiny):
    with pytest.raises(ValueError, match="'paged' is named twice"):
        run_bench(tiny, [WorkItem(0.0, 5, 5)], ["paged", MLX_LM, "paged"])
