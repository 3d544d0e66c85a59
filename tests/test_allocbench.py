"""What bookkeeping costs, as `cortexlab allocbench` measures it. Nothing here is held to a time:
only to what the figures mean.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
from functools import partial

import pytest

from cortexlab.allocators import STRATEGIES
from cortexlab.allocators.contiguous import Segregated
from cortexlab.bench import allocator_cost as allocbench
from cortexlab.bench import pools
from cortexlab.errors import BadInput

ROW = ["strategy", "num_blocks", "occupancy", "request_blocks", "operation", "median_us", "p99_us"]
SMALL = ["--num-blocks", "256,512", "--occupancy", "0,0.5", "--request-blocks", "4"]

PEER = """
class Block:
    def __init__(self, block_id):
        self.block_id = block_id

class PagedCacheManager:
    def __init__(self, block_size=64, max_blocks=1000, enable_caching=True):
        self.queue = [Block(i) for i in range(1, max_blocks)]  # block 0 is its own
        self.blocks = {block.block_id: block for block in self.queue}

    @property
    def free_blocks(self):
        return len(self.queue)

    def get_new_blocks(self, num_blocks):
        if num_blocks > len(self.queue):
            raise ValueError("Cannot allocate")
        taken, self.queue = self.queue[:num_blocks], self.queue[num_blocks:]
        return taken

    def allocate_block(self):
        return self.queue.pop(0) if self.queue else None

    def free_block_batch(self, blocks):
        self.queue += blocks

    def free_block(self, block_id):
        self.queue.append(self.blocks[block_id])

    def get_stats(self):
        return {"free_blocks": len(self.queue)}
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Batches of 20 microseconds, and no peer but the one a test installs."""
    monkeypatch.setattr(allocbench, "BATCH_NS", 20_000)
    monkeypatch.setattr(allocbench, "find_peer", lambda: None)


@pytest.fixture
def peer(tmp_path, monkeypatch):
    package = tmp_path / "vllm_mlx"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the package itself must not run')")
    (package / "paged_cache.py").write_text(PEER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(allocbench, "find_peer", pools.find_peer)
    yield
    sys.modules.pop("vllm_mlx_paged_cache", None)


@pytest.fixture
def run(capsys):
    """The command: what it prints, once it has ended well."""

    def run(*words, resolve=None) -> str:
        parser = argparse.ArgumentParser()
        allocbench.add_arguments(parser)
        assert allocbench.run(parser.parse_args(words), resolve) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def medians(document: dict) -> dict:
    return {
        tuple(row[key] for key in ("strategy", "num_blocks", "occupancy", "operation")): row[
            "median_us"
        ]
        for row in document["rows"]
    }


# --- a good run -----------------------------------------------------------------------------------


def test_json_is_one_document_with_a_row_for_every_strategy_pool_occupancy_and_operation(run):
    printed = run("--json", *SMALL)
    document = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert printed.count("\n") == 1
    assert set(document) == {"environment", "rows", "ratios", "pools"}
    assert (
        document["environment"]["python_version"]
        and document["environment"]["vllm_mlx_version"] is None
    )
    assert [list(row) for row in document["rows"]] == [ROW] * len(document["rows"])
    assert (
        len(medians(document))
        == len(document["rows"])
        == len(document["ratios"])
        == len(STRATEGIES) * 2 * 2 * 3
    )
    assert {row["request_blocks"] for row in document["rows"]} == {4}


def test_what_was_measured_is_positive_and_what_does_not_apply_is_null(run):
    document = json.loads(run("--json", *SMALL, "--strategies", "static,segregated,paged"))
    for row in document["rows"]:
        never = (row["strategy"], row["operation"]) == ("static", "extend")
        assert (row["median_us"] is None) == never, row
        assert row["p99_us"] is None or row["p99_us"] >= row["median_us"] > 0
    for pool in document["pools"]:
        assert abs(pool["used_share"] - pool["occupancy"]) < 0.15
        assert (pool["turnover_median_us"] is None) == (pool["occupancy"] == 0)


def test_ratios_compare_each_row_with_its_smallest_pool_and_with_the_peer_in_the_same_pool(
    run, peer
):
    document = json.loads(run("--json", *SMALL, "--strategies", "paged,vllm-mlx,vllm-mlx-block"))
    at = medians(document)
    for ratio in document["ratios"]:
        name, num_blocks, occupancy, operation = (
            ratio[key] for key in ("strategy", "num_blocks", "occupancy", "operation")
        )
        for key, other in [
            ("to_smallest_pool", (name, 256)),
            *((f"to_{peer}", (peer, num_blocks)) for peer in pools.PEERS),
        ]:
            assert ratio[key] == pytest.approx(
                at[name, num_blocks, occupancy, operation] / at[*other, occupancy, operation]
            )


def test_the_printed_form_fits_80_columns_and_has_every_strategy_in_every_block(run, peer):
    lines = run(*SMALL).splitlines()
    assert max(map(len, lines)) <= 80
    for name in (*STRATEGIES, *pools.PEERS):
        assert sum(bool(re.match(f"{name} +[-0-9]", line)) for line in lines) == 4
    assert "of the time of vllm-mlx" in " ".join(lines)


def test_without_the_peer_nothing_is_said_to_be_its_figure(run):
    document = json.loads(run("--json", *SMALL, "--strategies", "paged"))
    assert {row["strategy"] for row in document["rows"]} == {"paged"}
    assert all(ratio["to_vllm-mlx"] is None for ratio in document["ratios"])
    assert "vllm-mlx is not installed" in run(*SMALL, "--strategies", "paged")


def test_a_strategy_of_the_users_own_is_measured_beside_ours(run):
    class Mine(Segregated):
        pass

    document = json.loads(
        run(
            "--json",
            *SMALL,
            "--strategies",
            "mine:Mine,paged",
            resolve={"mine:Mine": Mine}.__getitem__,
        )
    )
    assert list(dict.fromkeys(row["strategy"] for row in document["rows"])) == ["Mine", "paged"]


def test_importing_it_loads_no_mlx():
    code = (
        "import sys; from cortexlab.bench import allocator_cost; assert 'mlx' not in sys.modules "
        "and 'mlx.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- what is measured on --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_measuring_leaves_the_pool_as_it_found_it(strategy):
    pool = pools.pool_of(strategy, 512)
    pool.fill(8)
    pool.thin(0.5)
    assert pool.make_room(8)
    allocbench._round(pool, 8)
    pool.check()
    assert (
        pool.num_blocks - pool.free_blocks()
        == pool.used
        == sum(pool.size(held) for held, _ in pool.live)
    )
    pool.thin(0)
    assert (pool.free_blocks(), pool.live) == (512, [])


@pytest.mark.parametrize("way", pools.PEERS)
def test_the_peer_gets_all_its_blocks_back_and_has_as_many_as_ours(way, peer):
    pool = pools.peer_pool(pools.find_peer(), way, 256)
    assert pool.free_blocks() == 256
    pool.fill(8)
    pool.thin(0.5)
    assert set(allocbench._round(pool, 8)) == {*allocbench.OPERATIONS, allocbench.TURNOVER}
    assert pool.free_blocks() == 256 - pool.used >= 128
    pool.thin(0)
    assert pool.free_blocks() == 256


def test_a_churned_pool_has_holes_and_the_same_requests_wherever_they_found_room():
    pool = pools.pool_of("segregated", 4096)
    pool.fill(16)
    pool.thin(0.5)
    asked = sorted(size for _, size in pool.live)
    pool.churn()
    assert sorted([*(size for _, size in pool.live), *pool.waiting]) == asked
    assert pool.stats()["num_holes"] > 10
    assert 0.4 < pool.used / 4096 <= 0.5


def test_where_the_request_finds_no_room_others_leave_until_it_does():
    pool = pools.pool_of("best_fit", 256)
    pool.fill(4)
    assert pool.make_room(64) and pool.allocate(64) is not None
    assert not pools.pool_of("static", 256).make_room(64), "its regions are of 32 blocks"


def test_an_occupancy_out_of_reach_is_null_and_pools_says_how_far_it_got():
    class Half(Segregated):  # gives out half of its blocks and no more
        def allocate(self, num_blocks):
            return (
                super().allocate(num_blocks)
                if self.stats()["used_blocks"] + num_blocks <= self.num_blocks // 2
                else None
            )

    rows, states = allocbench.measure({"half": partial(pools.pool_of, Half)}, [256], [0, 0.9], 4)
    assert {
        (row["occupancy"], row["median_us"] is None)
        for row in rows
        if row["operation"] == "allocate+free"
    } == {
        (0, False),
        (0.9, True),
    }
    assert [0 <= state["used_share"] <= 0.5 for state in states] == [True, True]


def test_the_garbage_collector_is_on_again_afterwards_even_when_a_strategy_raises(run):
    def broken(num_blocks):
        raise RuntimeError("no")

    with pytest.raises(BadInput):
        run("--strategies", "mine:broken", resolve=lambda name: broken)
    assert gc.isenabled()


# --- strategies that err --------------------------------------------------------------------------


class Leaky(Segregated):
    """Keeps one allocation that it gets back."""

    count = 0

    def free(self, extents):
        self.count += 1
        if self.count != 7:
            super().free(extents)


class Raising(Segregated):
    def free(self, extents):
        raise RuntimeError("lost\nfor words")


class Short(Segregated):
    def allocate(self, num_blocks):
        return ()


class Crooked(Segregated):
    def check(self):
        raise AssertionError("the books do not agree")


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        (Leaky, "loses blocks"),
        (Raising, "RuntimeError.*words"),
        (Short, "0 blocks"),
        (Crooked, "AssertionError.*books"),
    ],
)
def test_a_strategy_that_loses_blocks_or_raises_is_named_in_one_line(strategy, named, run):
    with pytest.raises(BadInput, match=f"'{strategy.__name__}'.*{named}") as raised:
        run(*SMALL, "--strategies", "mine:it", resolve=lambda name: strategy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--strategies fancy", "'fancy'.*buddy.*vllm-mlx"),
        ("--strategies paged,", "''"),
        ("--strategies paged,paged", "'paged'.*twice"),
        ("--strategies mlx-lm", "'mlx-lm'"),
        ("--strategies vllm-mlx", "'vllm-mlx'.*not installed"),
        ("--num-blocks many", "num-blocks.*many"),
        ("--num-blocks 256,", "num-blocks.*256,"),
        ("--num-blocks 0", "num-blocks.*at least 1.*0"),
        ("--num-blocks 1000000000000", "num-blocks.*at most"),
        ("--occupancy 1", "occupancy.*1"),
        ("--occupancy -0.1", "occupancy.*-0.1"),
        ("--occupancy nan", "occupancy.*nan"),
        ("--occupancy 90%", "occupancy.*90%"),
        ("--request-blocks 0", "request-blocks.*0"),
        ("--request-blocks 300 --num-blocks 256", "request-blocks.*256.*300"),
        ("--seed -1", "seed.*-1"),
    ],
)
def test_bad_input_is_one_line_that_names_it(words, named, run):
    with pytest.raises(BadInput, match=named) as raised:
        run(*words.split())
    assert "\n" not in str(raised.value)
