"""The answer of a comparison: error rates and power on seeded synthetic ratios, and its words."""

import itertools
import math

import numpy as np
import pytest

from cortexlab import answer
from cortexlab.answer import Comparison, Difference, recommendation
from cortexlab.options import MLX_LM

BENCHES = 400
SD = 0.054  # of a log ratio: `bench --model tiny` on two cores
MOST_WRONG = 0.05 * BENCHES + 3 * math.sqrt(0.05 * 0.95 * BENCHES)


def speeds(rng, names: str, repeats: int, sd=SD, **slowed) -> dict:
    """Output tokens a second of each of ``names``, 100 but for noise of the machine, which slows a
    whole repeat, and of each run; ``slowed`` divides the speed of some.
    """
    turns = rng.normal(0, 0.1, repeats)
    return {
        name: 100 * np.exp(turns + rng.normal(0, sd / math.sqrt(2), repeats)) / slowed.get(name, 1)
        for name in names
    }


def rows_of(names, share=0.9, **shares) -> list[dict]:
    return [{"strategy": name, "token_share": shares.get(name, share)} for name in names]


def sentence(measured: dict, error=answer.ERROR, **shares) -> str:
    return recommendation(rows_of(measured, **shares), Comparison(measured, error))


def until_known(draw) -> Comparison:
    """The comparison at which a bench of at most twenty repeats, all of them in ``draw``, stops."""
    for before, done in itertools.pairwise((0, *answer.LOOKS)):
        error = answer.error_of_look(done, before, last=done == answer.LOOKS[-1])
        found = Comparison({name: each[:done] for name, each in draw.items()}, error)
        if found.known:
            break
    return found


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "df", "level", "known"),
    [
        (2, 1, 0.95, 12.7062 * math.sqrt(2)),  # of two: Student's t
        (2, 2, 0.95, 4.30265 * math.sqrt(2)),
        (2, 19, 0.98, 2.53948 * math.sqrt(2)),
        (4, 6, 0.95, 4.896),  # printed tables of the studentized range
        (5, 16, 0.95, 4.333),
        (10, 20, 0.95, 5.008),
    ],
)
def test_quantiles_of_the_studentized_range_are_those_of_printed_tables(k, df, level, known):
    assert answer.range_quantile(k, df, level) == pytest.approx(known, rel=2e-4)


@pytest.mark.parametrize("last", answer.LOOKS)
def test_the_looks_of_a_bench_take_the_whole_error_and_no_more(last):
    looks = [each for each in answer.LOOKS if each <= last]
    taken = [
        answer.error_of_look(done, before, done == last)
        for before, done in itertools.pairwise((0, *looks))
    ]
    assert min(taken) > 0 and sum(taken) == pytest.approx(answer.ERROR)


@pytest.mark.parametrize("names", ["ab", "abcde"])
@pytest.mark.parametrize("repeats", [3, 5, "auto"])
def test_equals_get_a_winner_in_one_bench_of_twenty_at_most(names, repeats):
    rng, wrong = np.random.default_rng(len(names)), 0
    for _ in range(BENCHES):
        draw = speeds(rng, names, 20 if repeats == "auto" else repeats)
        found = until_known(draw) if repeats == "auto" else Comparison(draw)
        wrong += "faster" in recommendation(rows_of(names), found)
    assert wrong <= MOST_WRONG


@pytest.mark.parametrize("names", ["ab", "abcde"])
def test_strategies_that_differ_in_noise_hardly_ever_get_a_winner(names):
    """Pooled noise alone would give one in ten benches a winner here."""
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(BENCHES):
        draw = speeds(rng, names, 5) | speeds(rng, names[-1], 5, sd=3 * SD)
        wrong += "faster" in sentence(draw)
    assert wrong <= 0.1 * BENCHES


@pytest.mark.parametrize("names", ["ab", "abcde"])
@pytest.mark.parametrize("repeats", [5, "auto"])
def test_a_strategy_slowed_by_a_fifth_is_found_in_five_repeats(names, repeats):
    rng, found = np.random.default_rng(2), 0
    for _ in range(BENCHES):
        draw = speeds(rng, names, 20 if repeats == "auto" else repeats, **{names[-1]: 1.2})
        each = until_known(draw) if repeats == "auto" else Comparison(draw)
        assert repeats == 5 or each.repeats <= 20
        found += all(each.between(name, names[-1]).faster for name in names[:-1])
    assert found >= 0.95 * BENCHES


def test_intervals_of_all_pairs_hold_together():
    rng, missed = np.random.default_rng(3), 0
    for _ in range(BENCHES):
        found = Comparison(speeds(rng, "abcd", 4, d=2.0)).differences
        true = {name: 0.5 if name == "d" else 1.0 for name in "abcd"}
        missed += any(
            not each.low <= true[each.strategy] / true[each.against] <= each.high for each in found
        )
    assert missed <= MOST_WRONG


def test_a_slow_turn_slows_all_and_is_no_noise():
    turn = np.array([1.0, 3.0, 0.2, 2.0])
    found = Comparison({"a": 100 * turn, "b": 50 * turn})
    assert found.sd_log_ratio == pytest.approx(0, abs=1e-9)
    assert found.between("a", "b").ratio == pytest.approx(2)


def test_of_two_strategies_the_interval_is_students():
    ours, theirs = np.array([10.0, 12.0, 11.0]), np.array([9.0, 9.5, 10.5])
    logs = np.log(ours / theirs)
    found = Comparison({"a": ours, "b": theirs}).between("b", "a")
    half = 4.30265 * logs.std(ddof=1) / math.sqrt(3)
    assert found.sd_log_ratio == pytest.approx(logs.std(ddof=1))
    assert math.log(found.low) == pytest.approx(-logs.mean() - half, rel=1e-3)
    assert math.log(found.high) == pytest.approx(-logs.mean() + half, rel=1e-3)


def test_the_repeats_that_are_advised_make_the_interval_three_percent_wide():
    rng = np.random.default_rng(5)
    wanted = Comparison(speeds(rng, "abc", 6)).repeats_wanted()
    halves = [
        max(each.most / max(each.ratio, 1 / each.ratio) for each in found.differences)
        for found in (Comparison(speeds(rng, "abc", wanted)) for _ in range(20))
    ]
    assert 1.02 < np.median(halves) < 1.045


# --- words ----------------------------------------------------------------------------------------


def exact(**ratios) -> dict:
    """Four repeats with a noise of about 1 % in a log ratio."""
    noise = np.array([[1, -1, 1, -1], [1, 1, -1, -1], [-1, 1, 1, -1], [0, 0, 0, 0]])
    return {
        name.replace("_", "-"): 100 * ratio * np.exp(0.005 * noise[place % 4])
        for place, (name, ratio) in enumerate(ratios.items())
    }


def test_a_leader_is_named_with_the_interval_of_its_lead_over_each_other():
    text = sentence(exact(paged=1.0, runs=0.8, static=0.5))
    assert text == (
        "paged faster than runs by 23 % to 27 %, than static by 97 % to 103 %; share of the KV "
        "memory held that is tokens: 90 % for all."
    )


def test_where_speed_decides_memory_is_said_of_all():
    text = sentence(exact(paged=1.0, runs=0.8), runs=0.95)
    assert "memory decides" not in text
    assert text.endswith("memory held that is tokens: runs 95 %, then paged 90 %.")


def test_strategies_not_told_apart_are_named_with_the_largest_difference_still_possible():
    text = sentence(exact(paged=1.0, runs=0.98, static=0.8), static=0.5)
    assert text == (
        "paged or runs: no difference found (at most 4 %); both faster than static by 20 % to "
        "27 %; share of the KV memory held that is tokens: 90 % for both; at this noise about 5 "
        "repeats would show differences of 3 %."
    )


def test_equal_is_said_only_where_the_whole_interval_lies_within_three_percent():
    assert "a or b: equal within 3 %" in sentence(exact(a=1.0, b=1.0))
    assert "equal" not in sentence(exact(a=1.0, b=0.98))


def test_memory_decides_only_by_a_whole_percent_that_is_printed():
    measured = exact(paged=1.0, runs=1.0)
    assert "tokens: 91 % for both" in sentence(measured, paged=0.906, runs=0.9149)
    assert "tokens: 90 % for both" in sentence(measured, paged=0.894, runs=0.896), "89 and 90"
    decided = "memory decides, share of the KV memory held that is tokens: runs 91 %, then paged 89"
    assert decided in sentence(measured, paged=0.894, runs=0.914)


def test_memory_does_not_decide_by_its_noise():
    measured, rows = exact(paged=1.0, runs=1.0), rows_of(["paged", "runs"], runs=0.94)
    noisy = Comparison({"paged": [0.9, 0.95, 0.9, 0.9], "runs": [0.94, 0.94, 0.95, 0.9]})
    quiet = Comparison({"paged": [0.9, 0.901, 0.9, 0.9], "runs": [0.94, 0.94, 0.941, 0.94]})
    assert "memory decides" not in recommendation(rows, Comparison(measured), noisy)
    assert "memory decides" in recommendation(rows, Comparison(measured), quiet)


def test_shares_apart_by_noise_only_are_not_said_to_be_one():
    measured = exact(paged=1.0, runs=1.0, static=1.0)
    noisy = {"paged": [0.9, 0.95, 0.9, 0.9], "runs": [0.94, 0.94, 0.95, 0.9]}
    two = {name: measured[name] for name in noisy}
    text = recommendation(rows_of(noisy, runs=0.94), Comparison(two), Comparison(noisy))
    assert text.endswith("held that is tokens: no difference found (90 % to 94 %).")
    rows = rows_of(measured, runs=0.94, static=0.2)
    shares = Comparison(noisy | {"static": [0.2, 0.2, 0.2, 0.2]})
    text = recommendation(rows, Comparison(measured), shares)
    assert text.endswith("tokens: paged and runs 90 % to 94 %, then static 20 %.")


def test_a_winner_leads_by_a_percent_that_is_printed():
    assert not Difference("a", "b", 1.02, 1.009, 1.04, 0.01).faster
    assert Difference("a", "b", 1.02, 1.011, 1.04, 0.01).faster
    assert Difference("b", "a", 1 / 1.02, 1 / 1.04, 1 / 1.011, 0.01).slower


def test_mlx_lm_is_named_apart_and_never_ranked():
    text = sentence(exact(paged=1.0, runs=0.8, mlx_lm=2.0))
    assert text.startswith("paged faster than runs by")
    told = "mlx-lm's own batching, which no pool limits, faster than paged by 97 % to 103 %"
    assert told in text
    alike = sentence(exact(paged=1.0, mlx_lm=0.98))
    other = "mlx-lm's own batching, which no pool limits"
    assert alike.startswith(f"paged: no difference found from {other} (at")
    assert "; share of the KV memory held that is tokens: 90 %;" in alike
    equal = sentence(exact(paged=1.0, mlx_lm=1.0))
    assert equal.startswith(f"paged: equal to {other}, within 3 %;")
    assert f"; both: equal to {other}, within" in sentence(exact(a=1.0, b=1.0, mlx_lm=1.0))
    assert "repeats would show" in alike and "repeats would show" not in text
    only = recommendation([{"strategy": MLX_LM}], Comparison({MLX_LM: [1.0]}))
    assert only == "Only mlx-lm was run: name a strategy to compare."


def test_one_run_names_no_fastest_and_says_what_would():
    text = sentence({"paged": [1.0], "static": [2.0]}, static=0.5)
    assert text == (
        "One run cannot tell speed from noise: --repeats 5 can, or --repeats auto; share of the KV "
        "memory held that is tokens: paged 90 %, then static 50 %."
    )


def test_a_bench_that_was_to_go_on_until_it_knew_is_not_advised_to():
    found = Comparison({"paged": [1.0], "static": [2.0]})
    text = recommendation(rows_of(["paged", "static"]), found, auto=True)
    assert text.startswith("One run cannot tell speed from noise: --repeats 5 can, or more --seco")
    assert "auto" not in text


def test_a_bound_above_a_hundred_times_is_none():
    text = sentence({"a": [9.0, 0.0, 11.0], "b": [9.0, 10.0, 11.0]})
    assert text.startswith("a or b: no difference found (no bound);")


def test_a_bench_too_noisy_for_any_answer_says_so():
    text = sentence({"a": [100.0, 200.0, 90.0], "b": [150.0, 80.0, 160.0]})
    assert text.startswith("a or b: no difference found (at most 8 times)")
    assert "more than 1,000 repeats would show" in text


def test_a_strategy_behind_one_of_two_leaders_is_named_behind_that_one():
    found = Comparison(exact(a=1.0, b=0.98, c=0.97))
    assert not found.between("a", "b").known and found.between("a", "c").faster
    text = recommendation(rows_of("abc"), found)
    assert text.startswith("a or b: no difference found") and "a faster than c by" in text


def test_a_strategy_that_gave_no_token_is_the_slowest():
    assert "a faster than b" in sentence({"a": [9.0, 10.0, 11.0], "b": [0.0, 0.0, 0.0]})


def replayed(strategy: str, ttft: float, share: float, extents: float, **more) -> dict:
    row = {"strategy": strategy, "block_size": 16, "refused": 0, "failed": 0}
    row |= {"mean_ttft_ms": 1000 * ttft, "token_share": share, "extents_per_sequence": extents}
    return row | more


def test_of_a_replay_waiting_decides_then_memory_then_pieces():
    rows = [
        replayed("cortexstream", 379, 0.734, 1.0),
        replayed("paged", 5.111, 0.9821, 84.9),
        replayed("runs", 5.113, 0.9823, 5.6),
    ]
    assert recommendation(rows) == (
        "Best: runs; mean TTFT in seconds: paged and runs 5.11, then cortexstream 379; token share "
        "of the memory held: 98.2% for both; extents a sequence: runs 5.6, then paged 84.9."
    )
    assert recommendation(rows[1:2]).startswith("paged: mean TTFT in seconds: 5.11;")
    same = [rows[1], rows[1] | {"strategy": "other"}]
    assert recommendation(same).startswith("No difference found: paged or other;")


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (0.2, 0.28, "a 0.2, then b 0.28"),  # zeros at the end of 0.200 are not printed
        (1.0, 1.9, "a 1, then b 1.9"),
        (1.004, 1.996, "a 1, then b 2"),
        (10.0, 10.4, "a 10, then b 10.4"),
        (0.0, 0.5, "a 0, then b 0.5"),
        (4e-5, 4.7e-5, "a 4e-05, then b 4.7e-05"),
        (100.0, 101.2, "a 100, then b 101"),
        (1.0, 1.004, "1 for both"),
        (0.0, 0.0, "0 for both"),
        (4e-5, 4.001e-5, "4e-05 for both"),
        (100.2, 100.4, "100 for both"),
    ],
)
def test_of_a_replay_waiting_differs_where_a_table_prints_it(first, second, told):
    rows = [replayed("a", first, 0.9, 1.0), replayed("b", second, 0.9, 1.0)]
    assert f"mean TTFT in seconds: {told};" in recommendation(rows)


def test_a_replay_in_which_nothing_was_completed_compares_nothing():
    nothing = {"mean_ttft_ms": None, "token_share": None, "extents_per_sequence": None}
    rows = [replayed(name, 1.0, 0.9, 1.0, failed=3) | nothing for name in "ab"]
    assert recommendation(rows) == "Nothing to compare: no request was completed."


def test_requests_that_the_best_left_unserved_are_said_too():
    rows = [replayed(name, 1.0, 0.9, 1.0, refused=2) for name in "ab"]
    text = recommendation([*rows, replayed("c", 0.1, 0.9, 1.0, failed=3)])
    assert text.startswith("No difference found: a or b;")
    assert text.endswith("; a and b left 2 requests unserved each; c left 3 requests unserved.")
    one = replayed("d", 1.0, 0.9, 1.0, refused=1)
    assert recommendation([one]).endswith("; d left 1 request unserved.")


def test_of_a_replay_goodput_goes_before_waiting_and_unserved_requests_before_all():
    goodputs = {"goodput_2000_100": 5.0, "goodput_500_30": 1.0}
    rows = [
        replayed("a", 1.0, 0.9, 1.0, **goodputs),
        replayed("b", 2.0, 0.9, 1.0, **goodputs | {"goodput_2000_100": 6.0}),
        replayed("c", 0.1, 0.9, 1.0, **goodputs | {"goodput_2000_100": 9.0}, failed=37),
    ]
    text = recommendation(rows)
    assert text.startswith("Best: b; requests/s in time (2 s, 100 ms): b 6.00, then a 5.00;")
    assert text.endswith("c left 37 requests unserved.")
    two = [rows[0], rows[0] | {"block_size": 64}]
    assert "a in blocks of 16 or a in blocks of 64" in recommendation(two)
