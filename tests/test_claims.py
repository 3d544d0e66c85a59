"""Measurements of notebook 01: toy pools, churn, claims of CortexStream's documents."""

import mlx.core as mx
import pandas as pd
import pytest

from cortexlab import BadInput, make_allocator
from cortexlab.allocators import STRATEGIES
from cortexlab.lab import claims
from cortexlab.lab.claims import Claim, copied_bytes, published_scan
from cortexlab.lab.play import churn, play
from cortexlab.plots import allocators as plots_allocators

SCRIPT = "a+5 b+3 c+6 d+2 e+4 b- d- f+6 a+2"


def test_a_script_played_to_first_fit_and_to_paged():
    first_fit = play("cortexstream", SCRIPT, 24)
    assert (
        " ".join(first_fit.text().split())
        == "cortexstream aaaaaaa.cccccc..eeee.... refused: f+6 (9 free, longest 4)"
    )
    assert (
        first_fit.asked == {"a": 7, "b": 0, "c": 6, "d": 0, "e": 4, "f": 0}
        and first_fit.num_extents == 3
    )
    paged = play("paged", SCRIPT, 24)
    assert paged.verdict == "all served" and paged.spare_blocks == 0 and paged.num_extents > 4


def test_blocks_that_buddies_and_regions_hand_out_beyond_the_request_are_counted():
    assert play("buddy", "a+5 b+3", 16).spare_blocks == 4
    assert play("static", "a+5 b+3", 16).spare_blocks == 8, (
        "regions of eight, the largest request rounded up"
    )
    assert play("static", "a+5 b+3 c+1", 16).verdict == "refused: c+1 (0 free)"


def test_a_refused_sequence_may_leave_and_come_again():
    toy = play("cortexstream", "a+3 b+2 b- a- b+2", 4)
    assert toy.verdict == "refused: b+2 (1 free)" and toy.asked == {"a": 0, "b": 2}


@pytest.mark.parametrize("script", ["a", "a+", "a+0", "+3", "a-3", "b-", "a+2 b-"])
def test_a_script_that_makes_no_sense_is_refused(script):
    with pytest.raises(BadInput):
        play("paged", script, 8)


def test_churn_plays_equal_requests_to_all_strategies_and_repeats():
    rows = {name: churn(name, num_requests=500, seed=4) for name in STRATEGIES}
    assert (
        rows["paged"]
        == churn("paged", num_requests=500, seed=4)
        != churn("paged", num_requests=500, seed=5)
    )
    assert all(
        row["partial"] == 0 and row["refused_with_room"] <= row["refused"] for row in rows.values()
    )
    assert rows["paged"]["refused_with_room"] == 0 < rows["cortexstream"]["refused_with_room"]
    assert rows["paged"]["spare_share"] == rows["cortexstream"]["spare_share"] == 0
    assert rows["buddy"]["spare_share"] == pytest.approx(0.25, abs=0.03), "Knuth: a quarter"
    assert churn(lambda n: make_allocator("best_fit", n), num_requests=50)["strategy"] == "<lambda>"


def test_churn_counts_a_refusal_that_takes_blocks():
    class Leaky(STRATEGIES["paged"].placement):
        def allocate(self, n):
            extents = super().allocate(n)
            if extents is None:
                super().allocate(1)
            return extents

    assert churn(Leaky, num_requests=200)["partial"] > 0


def test_a_verdict_is_computed_from_the_cases():
    def verdict(**cases):
        return Claim("", "", "", cases).verdict

    assert verdict(a=True, b=True) == "holds"
    assert verdict(a=False, b=False) == "does not hold"
    assert verdict(a=True, b=False, c=True) == "holds only with a, c"


def test_the_published_scan_reads_to_the_end_of_the_region_it_takes():
    free = bytes([0, 1, 1, 0, 1, 1, 1, 0, 1])
    assert published_scan(free, 2) == (1, 4)
    assert published_scan(free, 3) == (4, 8)
    assert published_scan(free, 1) == (1, 4)
    assert published_scan(free, 4) == (None, 10)
    assert published_scan(bytes([1]) * 8, 1) == (0, 9), "all of an empty pool"


def test_first_fit_of_this_package_is_the_published_one():
    pool, free = make_allocator("first_fit", 40), bytearray([1]) * 40
    held = [pool.allocate(n) for n in (5, 3, 8, 1, 6, 4)]
    for extents in held:
        free[extents[0].start : extents[0].end] = bytes(extents[0].num_blocks)
    for extents in (held[1], held[3], held[4]):
        pool.free(extents)
        free[extents[0].start : extents[0].end] = bytes([1]) * extents[0].num_blocks
    for wanted in (2, 4, 7):
        found, _ = published_scan(free, wanted)
        (extent,) = pool.allocate(wanted)
        assert extent.start == found
        free[extent.start : extent.end] = bytes(wanted)


def test_a_copy_and_a_view_are_told_apart():
    arena = mx.arange(4096.0).reshape(4, 64, 16)
    assert copied_bytes(arena[:, 5:9], arena) == 0
    assert copied_bytes(arena[:, 5:9] + 0, arena) == 4 * 4 * 16 * 4


def test_the_claims_and_their_verdicts():
    found = claims.counted_claims()
    assert {name: claim.verdict for name, claim in found.items()} == {
        "no fragmentation": "holds only with requests of one size",
        "free blocks join": "holds only with all gone",
        "no partial allocation": "holds",
        "64 sequences": "holds only with `cortexstream`, `buddy`",
        "constant time": "does not hold",
        "memory efficiency": "holds only with `paged`",
        "views": "holds only with one full block",
        "zero copy": "holds only with 1 block, `[heads, slots, dim]`",
        "17.2 GB": "holds only with float32 in GB",
        "16.8 GB": "does not hold",
    }
    table = claims.markdown_table(found.values())
    assert len(table.splitlines()) == 2 + len(found) and all(
        line.count("|") == 5 for line in table.splitlines()
    )
    assert found == claims.counted_claims(), "counted claims repeat exactly"


def test_timed_claims_say_a_figure():
    assert all("µs" in claim.measured and claim.cases for claim in claims.timed_claims().values())


def test_figures_show_their_data():
    axes = plots_allocators.toy_pools([play(name, SCRIPT, 24) for name in STRATEGIES])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(STRATEGIES)
    assert "paged" in axes.get_title(loc="left")
    rows = pd.DataFrame([churn(name, num_requests=200) for name in ("static", "paged")])
    refused, spare, extents = plots_allocators.what_it_gives_up(rows)
    assert [bar.get_width() for bar in extents.patches] == rows["extents"].tolist()
    assert [bar.get_width() for bar in spare.patches] == (100 * rows["spare_share"]).tolist()
    assert all(panel.get_xlabel() for panel in (refused, spare, extents))
    costs = pd.DataFrame(
        [
            {
                "strategy": name,
                "num_blocks": size,
                "operation": operation,
                "median_us": None if name == "buddy" else 2.0,
            }
            for name in ("paged", "buddy")
            for size in (512, 2048)
            for operation in ("allocate+free", "turnover")
        ]
    )
    panels = plots_allocators.cost_by_pool_size(
        costs, ("allocate+free", "turnover"), 3.0, "claimed"
    )
    assert [line.get_label() for line in panels[0].lines] == ["paged", "claimed"], (
        "a strategy without a measurement is not drawn"
    )
